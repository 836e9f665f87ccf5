"""Estimates of the second moment beside the exact one, along a real run of AdamW.

    python -m benchmarks.quality.second_moment --data DIR

AdamW trains, and the other methods only see its gradients. The rows have quantiles of
the ratio of the estimated second moment to the exact one, over all entries of the
matrices, at some steps. `RotatedRankOne()` estimates the second moments of `B^T g` and
of the residual R, so it is compared with the exact averages of their squares.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorapre_jax as lp
from benchmarks import _record
from benchmarks.quality import jobs
from benchmarks.quality.conditions import Condition
from benchmarks.quality.methods import METHODS
from benchmarks.quality.rules import B1, B2
from benchmarks.quality.run import Race, pick
from benchmarks.quality.scales import SCALES, load_texts
from examples.llama.data.batches import train_batches
from examples.llama.data.rows import PackedRows
from lorapre_jax._numerics.averages import unbiased_decay

SHARE = 8  # Of the width: the rank.
STEPS = (1, 3, 10, 30, 100, 300)
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
EXACT = lp.Dense()  # Its state is an array of the gradient's shape.
ESTIMATES = {
    "RankOne()": lp.RankOne(),
    "LowRank()": lp.LowRank(),
    "AlgorithmOne()": lp.AlgorithmOne(),
}
FIRST = lp.LowRank()  # The first moment whose left factor is B.
ROTATED = lp.RotatedRankOne()
RULES = ("adamw", "default/8", "rank_one/8", "v factored", "paper/8")
"""The methods of the race that have these moments."""


def start(g: jax.Array, rank: int) -> dict[str, Any]:
    """Returns the state of every estimate for one matrix."""
    methods = {**ESTIMATES, "first": FIRST, "rotated": ROTATED}
    states: dict[str, Any] = {
        name: method.init((), *g.shape, rank, jnp.float32, 0)
        for name, method in methods.items()
    }
    shapes = {"g": g.shape, "B^T g": (g.shape[1], rank), "R": g.shape}
    return states | {name: jnp.zeros(shape) for name, shape in shapes.items()}


def look(states: dict[str, Any], g: jax.Array, count: jax.Array):
    """Returns pairs of the estimated and the exact root, and the new states."""
    b1, b2 = (unbiased_decay(jnp.asarray(b, g.dtype), count) for b in (B1, B2))
    mu, components, residual = FIRST.split_moment(states["first"], g, b1, 0)
    (root_v, root_w), nu = ROTATED.rotated_moment(
        states["rotated"], g, components, residual, b2
    )
    exact, after = {}, {"first": mu, "rotated": nu}
    for name, x in {"g": g, "B^T g": components, "R": residual}.items():
        exact[name], after[name] = EXACT.second_moment(states[name], x, B2, count, 0)
    found = {
        "RotatedRankOne(), B^T g": (root_v, exact["B^T g"]),
        "RotatedRankOne(), R": (root_w, exact["R"]),
    }
    for name, method in ESTIMATES.items():
        root, after[name] = method.second_moment(states[name], g, B2, count, 0)
        found[name] = root, exact["g"]
    return found, after


def ratios(pairs) -> np.ndarray:
    """Returns the ratios of estimated to exact second moments, of all entries."""
    columns = ([np.ravel(x) for x in side] for side in zip(*pairs, strict=True))
    root, exact = (np.concatenate(column).astype(np.float64) for column in columns)
    # Where all gradients were zero there is nothing to estimate.
    return (root[exact > 0] / exact[exact > 0]) ** 2


def main() -> None:
    args = jobs.texts_parser(__doc__).parse_args()
    scale = SCALES[args.scale]
    texts = load_texts(scale, args.data, "choose", args.cache)
    race = Race(scale, METHODS["adamw"], Condition(), texts)
    state = race.init(0)
    matrices = pick(state.params, "matrices")
    rank = scale.model.width // SHARE
    states = {path: start(leaf, rank) for path, leaf in matrices.items()}

    @jax.jit
    def step_of_all(states, params, batch, count):
        grads = race.condition.alter(race.gradient(params, batch)[1], count - 1)
        matrices = pick(grads, "matrices")
        seen = [look(states[path], g, count) for path, g in matrices.items()]
        found, after = zip(*seen, strict=True)
        return found, dict(zip(matrices, after, strict=True))

    rates = dict.fromkeys(race.rules, np.float32(1e-3))
    batches = train_batches(PackedRows(texts.train, scale.seq_len), scale.batch_size, 0)
    table = []
    for step in range(1, max(STEPS) + 1):
        batch = batches[step - 1]
        found, states = step_of_all(states, state.params, batch, jnp.int32(step))
        state, _ = race.train_step(state, batch, rates)
        if step in STEPS:
            for name in found[0]:
                quantiles = np.quantile(
                    ratios([pairs[name] for pairs in found]), QUANTILES
                )
                line = {
                    f"{q:g}": float(x)
                    for q, x in zip(QUANTILES, quantiles, strict=True)
                }
                table.append({"step": step, "estimate": name} | line)
    table.sort(key=lambda line: line["estimate"])
    print(_record.table(table))
    print(_record.save(f"quality/second_moment_{args.scale}", table, RULES))


if __name__ == "__main__":
    main()
