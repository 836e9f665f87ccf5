"""Searches each method's best learning rate, on the seeds and texts for choosing.

    python -m benchmarks.quality.search --scale a --data DIR

A grid in factors of 2 grows until the best rate is inside it. Rows go to
results/quality/search_<scale>.jsonl; runs with a row there are not run again.
`--ablations` does the same for ablations.py, with ablations_<scale>.jsonl.
"""

import argparse
import statistics
from collections.abc import Mapping

from benchmarks import _comparison
from benchmarks.quality import jobs, rows
from benchmarks.quality.ablations import ABLATIONS, ENTRANTS
from benchmarks.quality.methods import METHODS
from benchmarks.quality.rows import Key
from benchmarks.quality.scales import SCALES

DENSE_RATES = {"a": 4e-3, "b": 1.6e-2, "c": 2e-3, "d": 4e-3, "e": 4e-3}
"""Peak rate of the embedding, the head and the norms, the same for every method."""


def search(method: str, seed: int, args: argparse.Namespace) -> None:
    """Runs the rates that were given, or as many as it takes to bracket the best."""

    def score(rate: float) -> float:
        return rows.loss_of(jobs.done(key_of(method, rate, seed, args), args))

    if args.rates:
        for rate in args.rates:
            score(rate)
    else:
        _comparison.best_rate(method, score, ENTRANTS[method].rates)


def key_of(method: str, rate: float, seed: int, args: argparse.Namespace) -> Key:
    factor = ENTRANTS[method].dense_factor
    common = args.dense_rate or DENSE_RATES[args.scale]
    dense_rate = common if factor is None else factor * rate
    steps = args.steps or SCALES[args.scale].steps
    return Key(args.scale, "choose", "plain", method, rate, dense_rate, seed, steps)


def best_rate(
    known: Mapping[Key, rows.Row],
    scale: str,
    method: str,
    dense_rate: float | None = None,
) -> Key:
    """Returns the key with the least mean loss over the searched seeds.

    Args:
      dense_rate: The dense rate of the runs; None means the common one.
    """
    losses: dict[tuple[float, float], list[float]] = {}
    keys = {}
    wanted = {"scale": scale, "condition": "plain", "steps": SCALES[scale].steps}
    for key, row in rows.of(known, method=method, **wanted):
        losses.setdefault((key.rate, key.dense_rate), []).append(rows.loss_of(row))
        keys[key.rate, key.dense_rate] = key
    if not losses:
        raise SystemExit(f"{method}: no searched rates at scale {scale}")
    if ENTRANTS[method].dense_factor is None:
        common = dense_rate or DENSE_RATES[scale]
        losses = {pair: each for pair, each in losses.items() if pair[1] == common}
        if not losses:
            raise SystemExit(f"{method}: not searched at a dense rate of {common:g}")
    best = min(losses, key=lambda pair: statistics.fmean(losses[pair]))
    if not min(losses)[0] < best[0] < max(losses)[0]:
        raise SystemExit(f"{method}: the best rate, {best[0]:g}, is an end of its grid")
    return keys[best]


def main() -> None:
    parser = jobs.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rates", type=float, nargs="+", help="these, and no others")
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--dense-rate", type=float, help="default: the common one")
    args = parser.parse_args()
    kind, entrants = ("ablations", ABLATIONS) if args.ablations else ("search", METHODS)
    args.out = args.out or rows.FOLDER / f"{kind}_{args.scale}.jsonl"
    own = [name for name, method in entrants.items() if method.rate_of is None]
    tasks = [(m, s, args) for m in args.methods or own for s in args.seeds]
    jobs.run_all(search, tasks, args)


if __name__ == "__main__":
    main()
