"""Estimates of the second moment beside the exact one, along a real run of AdamW.

    python -m benchmarks.quality.second_moment --data DIR

AdamW trains; the others only look at its gradients. Quantiles of `v_hat` over the exact
one, over all entries of the matrices, at some steps.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorapre_jax as lp
from benchmarks import _record
from benchmarks.quality import jobs
from benchmarks.quality.conditions import Condition
from benchmarks.quality.methods import B2, METHODS
from benchmarks.quality.run import Race, pick
from benchmarks.quality.scales import SCALES, load_texts
from examples.llama.data.batches import train_batches
from examples.llama.data.rows import PackedRows

SHARE = 8  # Of the width: the rank.
STEPS = (1, 3, 10, 30, 100, 300)
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
EXACT = lp.Dense()  # Its state is an array like the gradient.
ESTIMATES = {
    "RankOne()": lp.RankOne(),
    "OnlineRegression()": lp.OnlineRegression(),
    "OnlineRegression.paper()": lp.OnlineRegression.paper(),
}


def start(matrices: Mapping[str, jax.Array], rank: int) -> dict[str, Any]:
    """Of every estimate, every matrix's state."""
    states: dict[str, Any] = {"exact": jax.tree.map(jnp.zeros_like, dict(matrices))}
    for name, method in ESTIMATES.items():
        states[name] = {
            path: method.init((), *leaf.shape, rank, jnp.float32, 0)
            for path, leaf in matrices.items()
        }
    return states


def look(states, matrices, count):
    """Every estimate's root of `v_hat`, all entries in a row, and the new states."""
    found, after = {}, {}
    for name, method in {"exact": EXACT, **ESTIMATES}.items():
        seen = {
            path: method.second_moment(states[name][path], g, B2, count, 0)
            for path, g in matrices.items()
        }
        found[name] = jnp.concatenate([jnp.ravel(root) for root, _ in seen.values()])
        after[name] = {path: state for path, (_, state) in seen.items()}
    return found, after


def main() -> None:
    args = jobs.parser(__doc__).parse_args()
    scale = SCALES[args.scale]
    texts = load_texts(scale, args.data, "choose", args.cache)
    race = Race(scale, METHODS["adamw"], Condition(), texts)
    state = race.init(0)
    states = start(pick(state.params, "matrices"), scale.model.width // SHARE)

    @jax.jit
    def step_of_all(states, params, batch, count):
        grads = race.condition.alter(race.gradient(params, batch)[1], count - 1)
        return look(states, pick(grads, "matrices"), count)

    rates = dict.fromkeys(race.rules, np.float32(1e-3))
    batches = train_batches(PackedRows(texts.train, scale.seq_len), scale.batch_size, 0)
    table = []
    for step in range(1, max(STEPS) + 1):
        batch = batches[step - 1]
        found, states = step_of_all(states, state.params, batch, jnp.int32(step))
        state, _ = race.train_step(state, batch, rates)
        if step in STEPS:
            exact = np.asarray(found.pop("exact"), np.float64)
            for name, root in found.items():
                # Where all gradients were zero there is nothing to estimate.
                over = (np.asarray(root, np.float64)[exact > 0] / exact[exact > 0]) ** 2
                quantiles = np.quantile(over, QUANTILES)
                line = {
                    f"{q:g}": float(x)
                    for q, x in zip(QUANTILES, quantiles, strict=True)
                }
                table.append({"step": step, "estimate": name} | line)
    table.sort(key=lambda line: line["estimate"])
    print(_record.table(table))
    print(_record.save("quality/second_moment", table))


if __name__ == "__main__":
    main()
