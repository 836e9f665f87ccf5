"""The median time of one update, its ratio to optax's Adam, and its roofline.

    python -m benchmarks.update_time                      # the 60M Llama's matrices
    python -m benchmarks.update_time --rank 128 16        # at each of these ranks
    python -m benchmarks.update_time --size 350m

The last columns are the update's operations and bytes (`_roofline.py`), and the share
that they reach, in the median time, of the rates of a product and of a copy. Those are
measured in the same run. Optimizers of optax have no rank.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lorapre_jax as lp
from benchmarks import _record, _roofline

# Width, feed-forward width, layers, rank of the published recipe; and one to try.
SIZES = {
    "60m": (512, 1376, 8, 128),
    "350m": (1024, 2736, 24, 256),
    "tiny": (128, 352, 1, 8),
}
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


def measured(
    size: str, ranks: Sequence[int], repeats: int, rates: _roofline.Rates
) -> list[dict[str, Any]]:
    """Returns a row for each transform, and for each rank if it has one."""
    params = matrices(*SIZES[size][:3])
    keys = jax.random.split(jax.random.key(0), len(params))
    grads = {
        name: jax.random.normal(key, params[name].shape)
        for name, key in zip(params, keys, strict=True)
    }
    subjects = [
        (rank if is_ours else None, name, tx)
        for rank in ranks
        for name, tx in transforms(params, rank).items()
        if (is_ours := not name.startswith("optax")) or rank == ranks[0]
    ]
    for rank, _, tx in subjects:
        if rank and not all(x.is_factored for x in lp.describe(tx, params).leaves):
            raise ValueError(
                f"At rank {rank} a matrix of size {size} stays dense. Take a lower one."
            )
    rows: list[dict[str, Any]] = []
    for rank, name, tx in subjects:
        compiling, median, worst = measure(tx, params, grads, repeats)
        row = {
            "transform": name,
            "rank": rank,
            "compile s": compiling,
            "median ms": 1e3 * median,
            "worst ms": 1e3 * worst,
        }
        row["of Adam"] = row["median ms"] / (rows or [row])[0]["median ms"]
        work = _roofline.work(name, params, rank or 0)
        rows.append(row | shares(work, median, rates))
    return rows


def shares(
    work: _roofline.Work | None, seconds: float, rates: _roofline.Rates
) -> dict[str, float | None]:
    """Returns the columns of the roofline, empty where there is no formula."""
    columns: dict[str, float | None] = {}
    for what, part in (("operations", "matmul"), ("bytes", "copy")):
        number = None if work is None else getattr(work, what)
        rate = getattr(rates, what)
        columns |= {
            f"10^9 {what}": number and number / 1e9,
            f"{part}: 10^9 {what} / s": rate / 1e9,
            f"of {part} rate": number and number / seconds / rate,
        }
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument(
        "--rank", type=int, nargs="+", help="by default that of the published recipe"
    )
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    rates = _roofline.measured_rates()
    ranks = args.rank or [SIZES[args.size][-1]]
    rows = measured(args.size, ranks, args.repeats, rates)
    device = jax.devices()[0]
    print(f"{args.size}, on {device.device_kind}\n\n{_record.table(rows)}")
    path = _record.save(f"update_time_{args.size}_{device.platform}", rows, RULES)
    print(f"\nWritten to {path.name}.")


if __name__ == "__main__":
    main()
