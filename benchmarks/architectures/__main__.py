"""Compares the optimizers on a mixer and on a convolution network.

    python -m benchmarks.architectures

Each optimizer has its own best learning rate, searched on the validation split with
seeds of its own. The results are of fresh seeds on the test split, which the search
never saw. Leaves that are not matrices are trained by AdamW under every optimizer, at
the rate that was best for AdamW on all leaves. So rows differ only in the rule for the
matrices and its rate.
"""

import argparse
import time
from typing import Any

import numpy as np

from benchmarks import _record
from benchmarks._comparison import best_rate, interval
from benchmarks.architectures.data import digits
from benchmarks.architectures.models import ARCHITECTURES, Architecture
from benchmarks.architectures.optimizers import RULES, coverage
from benchmarks.architectures.training import Run, make_run

SEARCH_SEEDS, SEEDS = (100, 101, 102), (0, 1, 2, 3, 4)
START = (2.0**-9, 2.0**-8, 2.0**-7)  # Where every search begins.
REFERENCES = ("adamw", "muon")
IN_THE_RACE = ("adamw", "muon", "default/8", "paper/8", "default_muon/8")
"""The race's names for these rules."""
Row = dict[str, Any]


def dense_rate_of(architecture: Architecture, steps: int) -> float:
    """Returns the best rate of AdamW for all leaves together."""
    run = make_run(architecture, "adamw", steps)
    return best_rate("adamw", lambda rate: validation_loss(run, rate, rate), START)[0]


def measure(
    architecture: Architecture, rule: str, dense_rate: float, steps: int
) -> Row:
    """Searches for the rate of the matrices, and returns the results of fresh seeds."""
    start = time.perf_counter()
    splits = digits()
    run = make_run(architecture, rule, steps)
    rate, scores = best_rate(
        rule, lambda rate: validation_loss(run, rate, dense_rate), START
    )
    finals = [
        run(splits["train"], splits["test"], rate, dense_rate, seed) for seed in SEEDS
    ]
    return {
        "optimizer": rule,
        "rate": rate,
        "dense rate": dense_rate,
        "validation loss by rate": scores,
        "training loss": [x.training for x in finals],
        "held-out loss": [x.held_out for x in finals],
        **coverage(architecture, rule),
        "seconds": time.perf_counter() - start,
    }


def validation_loss(run: Run, rate: float, dense_rate: float) -> float:
    splits = digits()
    train, held_out = splits["train"], splits["validation"]
    runs = [run(train, held_out, rate, dense_rate, seed) for seed in SEARCH_SEEDS]
    return float(np.mean([x.held_out for x in runs]))


def measure_all(name: str, steps: int) -> list[Row]:
    dense_rate = dense_rate_of(ARCHITECTURES[name], steps)
    rows: list[Row] = []
    for rule in RULES:
        row = measure(ARCHITECTURES[name], rule, dense_rate, steps)
        rows.append({"architecture": name, **row})
        grid = {
            f"{k:.3g}": round(v, 3) for k, v in row["validation loss by rate"].items()
        }
        print(f"{name}, {rule}: {grid}, {row['seconds']:.0f} s", flush=True)
    held_out = {row["optimizer"]: row["held-out loss"] for row in rows}
    for row in rows:
        for other in REFERENCES:
            row[f"minus {other}"] = (
                interval(np.subtract(row["held-out loss"], held_out[other]).tolist())
                if row["optimizer"] != other
                else None
            )
    return rows


def shown(row: Row) -> Row:
    """Returns the row for printing, with means, standard deviations and intervals."""

    def spread(losses: list[float]) -> str:
        return f"{np.mean(losses):.3f} ({np.std(losses, ddof=1):.3f})"

    def difference(pair: tuple[float, float] | None) -> str:
        return f"{pair[0]:+.3f} ± {pair[1]:.3f}" if pair else ""

    return {
        "network": row["architecture"],
        "optimizer": row["optimizer"],
        "learning rate": f"{row['rate']:.2g}",
        "training loss": spread(row["training loss"]),
        "held-out loss": spread(row["held-out loss"]),
        **{
            f"minus {other}'s": difference(row[f"minus {other}"])
            for other in REFERENCES
        },
        "factored": f"{row['factored share']:.0%}",
        "state of AdamW's": f"{row['state ratio']:.3f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    rows = [row for name in ARCHITECTURES for row in measure_all(name, args.steps)]
    print(f"\n{_record.table([shown(row) for row in rows])}")
    print(f"\nWritten to {_record.save('architectures', rows, IN_THE_RACE).name}.")


if __name__ == "__main__":
    main()
