"""Runs every method at its best searched rate, on fresh seeds and other texts.

    python -m benchmarks.quality.table --scale a --data DIR

Rows go to results/quality/table_<scale>.jsonl; runs with a row there are not run again.
`--main` runs only the six methods of `make bench-quality`.
"""

import argparse
import dataclasses

from benchmarks.quality import jobs, rows
from benchmarks.quality.methods import METHODS
from benchmarks.quality.search import best_rate

SEEDS = (100, 101, 102)
MAIN = ("adamw", "muon", "fira/4", "default/8", "default/32", "default_muon/8")


def race(method: str, seed: int, args: argparse.Namespace) -> None:
    searched = rows.read(rows.FOLDER / f"search_{args.scale}.jsonl")
    searched_as = METHODS[method].rate_of or method
    best = best_rate(searched, args.scale, searched_as, args.dense_rate)
    key = dataclasses.replace(
        best, split="report", method=method, condition=args.condition, seed=seed
    )
    if args.steps:
        key = dataclasses.replace(key, steps=args.steps)
    jobs.done(key, args)


def main() -> None:
    parser = jobs.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--condition", default="plain", help="see conditions.py")
    parser.add_argument("--dense-rate", type=float, help="default: the common one")
    parser.add_argument("--main", action="store_true", help="the main six methods")
    args = parser.parse_args()
    args.out = args.out or rows.FOLDER / f"table_{args.scale}.jsonl"
    methods = args.methods or (MAIN if args.main else METHODS)
    tasks = [(method, seed, args) for seed in args.seeds for method in methods]
    jobs.run_all(race, tasks, args)


if __name__ == "__main__":
    main()
