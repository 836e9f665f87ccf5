"""Times a training step of all methods, in one process on one core.

    python -m benchmarks.quality.timing --scale a

The report takes its times from here, because the other commands run on machines that do
other work at the same time. Nothing else may run at the same time as this command.
Times are means over as many steps as there are between two projections of a method, so
that each mean has one projection.
"""

import os
import statistics
import time
from typing import Any

import jax
import numpy as np

from benchmarks import _record
from benchmarks.quality import jobs
from benchmarks.quality.conditions import Condition
from benchmarks.quality.methods import METHODS
from benchmarks.quality.rules import REFRESH
from benchmarks.quality.run import Race
from benchmarks.quality.scales import SCALES, load_texts
from examples.llama.data.batches import train_batches
from examples.llama.data.rows import PackedRows

ROUNDS = 10
STEPS = REFRESH // ROUNDS


def main() -> None:
    parser = jobs.texts_parser(__doc__)
    parser.add_argument("--methods", nargs="+", help="default: all")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    scale = SCALES[args.scale]
    texts = load_texts(scale, args.data, "choose", args.cache)
    batches = train_batches(PackedRows(texts.train, scale.seq_len), scale.batch_size, 0)
    runs: dict[str, list[Any]] = {}
    for name in args.methods or METHODS:
        race = Race(scale, METHODS[name], Condition(), texts)
        runs[name] = [race, race.init(0), []]
        _steps(runs[name], batches, 1)  # Compiles.
    for _ in range(ROUNDS):
        for run in runs.values():
            run[2].append(_steps(run, batches, STEPS))
    means = {name: statistics.fmean(run[2]) for name, run in runs.items()}
    lines = [
        {
            "method": name,
            "seconds a step": round(mean, 5),
            "to AdamW": round(mean / means["adamw"], 3),
        }
        for name, mean in means.items()
    ]
    print(_record.table(lines))
    print(_record.save(f"quality/timing_{args.scale}", lines, means))


def _steps(run: list[Any], batches: Any, steps: int) -> float:
    """Takes these steps, and returns the seconds of one of them."""
    race, state, _ = run
    rates = dict.fromkeys(race.rules, np.float32(1e-3))
    start = time.perf_counter()
    for step in range(steps):
        state, loss = race.train_step(state, batches[step], rates)
    jax.block_until_ready(loss)
    run[1] = state
    return (time.perf_counter() - start) / steps


if __name__ == "__main__":
    main()
