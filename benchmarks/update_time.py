"""The median time of one update, and its ratio to optax's Adam.

python -m benchmarks.update_time                  # the 60M Llama's matrices
python -m benchmarks.update_time --size 350m
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lorapre_jax as lp
from benchmarks import _record

# Width, feed-forward width, layers, rank of the published recipe.
SIZES = {"60m": (512, 1376, 8, 128), "350m": (1024, 2736, 24, 256)}
PAPER = lp.AlgorithmOne()
RULES = ("adamw", "muon", "default/8", "paper/8", "default_muon/8")
"""The race's names for these rules."""
AXES = optax.contrib.MuonDimensionNumbers(-2, -1)


def matrices(width, ffn, layers):
    shapes = dict.fromkeys(("q", "k", "v", "o"), (width, width))
    shapes |= {"gate": (width, ffn), "up": (width, ffn), "down": (ffn, width)}
    return {name: jnp.zeros((layers, *shape)) for name, shape in shapes.items()}


def transforms(params, rank):
    shared: dict[str, Any] = {"rank": rank, "matrices": lp.MatrixAxes(-2, -1)}
    axes = jax.tree.map(lambda _: AXES, params)
    return {
        "optax adam": optax.scale_by_adam(),
        "optax muon": optax.contrib.scale_by_muon(weight_dimension_numbers=axes),
        "lorapre_adam, default": lp.scale_by_lorapre_adam(**shared),
        "lorapre_adam, slices of 1": lp.scale_by_lorapre_adam(
            **shared, slices_at_once=1
        ),
        "lorapre_adam, paper": lp.scale_by_lorapre_adam(
            first_moment=PAPER, second_moment=PAPER, **shared
        ),
        "lorapre_muon": lp.scale_by_lorapre_muon(**shared),
    }


def measure(tx, params, grads, repeats):
    """Returns seconds to compile, and the median and most seconds of one update."""
    state = tx.init(params)
    start = time.perf_counter()
    update = jax.jit(tx.update, donate_argnums=1).lower(grads, state).compile()
    compiling = time.perf_counter() - start
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        updates, state = jax.block_until_ready(update(grads, state))
        times.append(time.perf_counter() - start)
        del updates
    return compiling, statistics.median(times[2:]), max(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    *shape, rank = SIZES[args.size]
    params = matrices(*shape)
    keys = jax.random.split(jax.random.key(0), len(params))
    grads = {
        name: jax.random.normal(key, params[name].shape)
        for name, key in zip(params, keys, strict=True)
    }
    rows, base = [], None
    for name, tx in transforms(params, rank).items():
        compiling, median, worst = measure(tx, params, grads, args.repeats)
        base = base or median
        rows.append(
            {
                "transform": name,
                "compile s": compiling,
                "median ms": 1e3 * median,
                "worst ms": 1e3 * worst,
                "of Adam": median / base,
            }
        )
    device = jax.devices()[0]
    print(f"{args.size}, rank {rank}, on {device.device_kind}\n\n{_record.table(rows)}")
    path = _record.save(f"update_time_{args.size}_{device.platform}", rows, RULES)
    print(f"\nWritten to {path.name}.")


if __name__ == "__main__":
    main()
