"""One gradient far larger than the others: how large do the updates after it get?

    python -m benchmarks.spike

The matrix is 256 x 256. There are 200 gradients of root mean square one. Each is a
matrix `P S_t Q` of rank 12, where P and Q are drawn once and `S_t: (12, 12)` at every
step, plus noise of a tenth of that size; all draws are normal. The 100th gradient is
multiplied by each factor in turn. There is no clipping and no `update_scale`; b1 = 0.9,
b2 = 0.95, and the rank is 16. The rows in results/spike.json have the largest root mean
square of an update after that gradient for each optimizer, as medians over five seeds.
Overshoots differ several-fold between seeds and between compilers.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorapre_jax as lp
from benchmarks import _record

SIDE, SIGNAL_RANK, NOISE, RANK, STEPS, SPIKE = 256, 12, 0.1, 16, 200, 100
FACTORS, SEEDS = (1, 3, 10, 30, 100), 5
PAPER = lp.AlgorithmOne()
OPTIMIZERS = {
    "Adam": optax.scale_by_adam(0.9, 0.95),
    "default": lp.scale_by_lorapre_adam(RANK),
    "Algorithm 1": lp.scale_by_lorapre_adam(
        RANK, first_moment=PAPER, second_moment=PAPER
    ),
}


def gradients(factor: float, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((2, SIDE, SIGNAL_RANK))
    cores = rng.standard_normal((STEPS, SIGNAL_RANK, SIGNAL_RANK))
    signal = left @ cores @ right.T / SIGNAL_RANK
    noise = rng.standard_normal((STEPS, SIDE, SIDE))
    grads = np.sqrt(1 - NOISE**2) * signal + NOISE * noise
    grads[SPIKE - 1] *= factor
    return jnp.asarray(grads, jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def largest_update(tx: Any, grads: jax.Array) -> jax.Array:
    """Returns the largest root mean square of an update after the spike."""

    def step(state, g):
        update, state = tx.update(g, state)
        return state, jnp.sqrt(jnp.mean(jnp.square(update)))

    sizes = jax.lax.scan(step, tx.init(grads[0]), grads)[1]
    return jnp.max(sizes[SPIKE:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    rows = []
    for factor in FACTORS:
        sizes: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
        for seed in range(SEEDS):
            grads = gradients(factor, seed)
            for name, tx in OPTIMIZERS.items():
                sizes[name].append(float(largest_update(tx, grads)))
        medians = {name: float(np.median(found)) for name, found in sizes.items()}
        rows.append({"factor": factor} | medians)
    print(_record.table(rows))
    print(_record.save("spike", rows, ("adamw", "default/8", "paper/8")))


if __name__ == "__main__":
    main()
