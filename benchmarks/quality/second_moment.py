"""Factored second moments beside the exact one, along a real run of AdamW.

    python -m benchmarks.quality.second_moment --data ../shared/data

AdamW trains; the others only look at its gradients. A transform with b1 = 0 and eps = 0
returns `g / sqrt(v_hat)`, from which `v_hat` over the exact one follows. Quantiles over
all entries of the matrices, at some steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorapre_jax as lp
from benchmarks import _record
from benchmarks.quality import jobs
from benchmarks.quality.conditions import Condition
from benchmarks.quality.methods import METHODS, ours
from benchmarks.quality.run import Race, pick
from benchmarks.quality.scales import SCALES, load_texts
from examples.llama.data.batches import train_batches
from examples.llama.data.rows import PackedRows

STEPS = (1, 3, 10, 30, 100, 300)
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
ESTIMATES = {
    "exact": lp.Dense(),
    "RankOne()": lp.RankOne(),
    "OnlineRegression()": lp.OnlineRegression(),
    "OnlineRegression.paper()": lp.OnlineRegression.paper(),
}


def main() -> None:
    args = jobs.parser(__doc__).parse_args()
    scale = SCALES[args.scale]
    texts = load_texts(scale, args.data, "choose", args.cache)
    race = Race(scale, METHODS["adamw"], Condition(), texts)
    state = race.init(0)
    looks = {
        name: ours(8, second_moment=second, first_moment=lp.Dense(), eps=0.0, b1=0.0)
        for name, second in ESTIMATES.items()
    }
    looks = {name: rule(scale.model.width, 0.95) for name, rule in looks.items()}
    states = {n: tx.init(pick(state.params, "matrices")) for n, tx in looks.items()}

    @jax.jit
    def look(states, params, batch):
        grads = race.condition.alter(race.gradient(params, batch)[1], jnp.zeros(()))
        matrices, found, after = pick(grads, "matrices"), {}, {}
        for name, tx in looks.items():
            directions: Any
            directions, after[name] = tx.update(matrices, states[name])
            leaves = [jnp.ravel(directions[path]) for path in sorted(matrices)]
            found[name] = jnp.abs(jnp.concatenate(leaves))
        return found, after

    rates = dict.fromkeys(race.rules, np.float32(1e-3))
    batches = train_batches(PackedRows(texts.train, scale.seq_len), scale.batch_size, 0)
    table = []
    for step in range(1, max(STEPS) + 1):
        batch = batches[step - 1]
        found, states = look(states, state.params, batch)
        state, _ = race.train_step(state, batch, rates)
        if step in STEPS:
            exact = np.asarray(found.pop("exact"), np.float64)
            for name, direction in found.items():
                # Where the gradient is zero, so is every direction.
                seen = exact > 0
                over = (exact[seen] / np.asarray(direction, np.float64)[seen]) ** 2
                quantiles = dict(
                    zip(QUANTILES, np.quantile(over, QUANTILES), strict=True)
                )
                line = {f"{q:g}": float(x) for q, x in quantiles.items()}
                table.append({"step": step, "estimate": name} | line)
    table.sort(key=lambda line: line["estimate"])
    print(_record.table(table))
    print(_record.save("quality/second_moment", table))


if __name__ == "__main__":
    main()
