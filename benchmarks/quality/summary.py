"""Summarises rows: means, spreads, paired differences, ranges of good rates."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks import _comparison
from benchmarks.quality import rows
from benchmarks.quality.methods import METHODS
from benchmarks.quality.rows import Key, Row

Rows = Mapping[Key, Row]
REFERENCE = "adamw"


@dataclasses.dataclass(frozen=True)
class Line:
    """One method, over its seeds."""

    key: Key
    """The key of one of its rows; method and rates are the same in all."""
    losses: Sequence[float]
    differences: Sequence[float]
    """Differences to the reference's loss on the same seed, with the same batches."""
    others: Mapping[str, float]
    """Mean losses on other texts."""
    matrix_state: float
    """Bytes of the matrices' optimizer state, in units of the reference's."""
    all_state: float

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for one seed, or if a run diverged."""
        several = len(self.losses) > 1 and math.isfinite(self.loss)
        return statistics.stdev(self.losses) if several else None


def summary(known: Rows, reference: str = REFERENCE) -> list[Line]:
    """Returns a line per method, the best first, compared with the reference.

    Raises:
      SystemExit: A method has rows of two rates, or there is no reference.
    """
    by_method: dict[str, dict[int, tuple[Key, Row]]] = {}
    for key, row in known.items():
        runs = by_method.setdefault(key.method, {})
        setting = key.rate, key.dense_rate, key.steps
        others = {(k.rate, k.dense_rate, k.steps) for k, _ in runs.values()}
        if others - {setting} or key.seed in runs:
            raise SystemExit(f"{key.method}: rows of two rates or numbers of steps")
        runs[key.seed] = key, row
    if reference not in by_method:
        raise SystemExit(f"no rows of {reference}, the reference")
    base = {seed: row for seed, (_, row) in by_method[reference].items()}
    lines = [_line(runs, base) for runs in by_method.values()]
    return sorted(lines, key=lambda line: line.loss)


def _line(runs: Mapping[int, tuple[Key, Row]], base: Mapping[int, Row]) -> Line:
    key, row = next(iter(runs.values()))
    losses = {seed: rows.loss_of(row) for seed, (_, row) in runs.items()}
    others = {
        name: statistics.fmean(
            r["other_losses"].get(name, math.inf) for _, r in runs.values()
        )
        for name in row["other_losses"]
    }
    state, base_state = (r["state_bytes"] for r in (row, next(iter(base.values()))))
    return Line(
        key=key,
        losses=list(losses.values()),
        differences=[
            losses[seed] - rows.loss_of(base[seed])
            for seed, (_, row) in runs.items()
            if seed in base and row is not base[seed]
        ],
        others=others,
        matrix_state=state["matrices"] / base_state["matrices"],
        all_state=sum(state.values()) / sum(base_state.values()),
    )


def interval(differences: Sequence[float], digits: int = 4) -> str:
    """Returns the mean, and for three or more the half-width of the 95 % interval."""
    if not differences:
        return ""
    if not all(map(math.isfinite, differences)):
        return "diverged"
    if len(differences) < 3:
        return f"{statistics.fmean(differences):+.{digits}f}"
    mean, half = _comparison.interval(differences)
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


def searched(known: Rows) -> dict[tuple[str, float | None], dict[float, float]]:
    """Returns the mean loss at every rate, by method and dense rate.

    The dense rate is None if the method ties it to the rate.
    """
    found: dict[tuple[str, float | None], dict[float, list[float]]] = {}
    for key, row in known.items():
        method = METHODS.get(key.method)
        tied = method is not None and method.dense_factor is not None
        losses = found.setdefault((key.method, None if tied else key.dense_rate), {})
        losses.setdefault(key.rate, []).append(rows.loss_of(row))
    return {
        name: {rate: statistics.fmean(each) for rate, each in sorted(losses.items())}
        for name, losses in found.items()
    }


def valley(losses: Mapping[float, float], depth: float = 0.05) -> str:
    """Returns the ratio of the highest to the lowest rate within `depth` nats.

    Between tried rates the loss is interpolated linearly in the logarithm of the rate.
    If the range extends beyond the tried rates, the ratio is a lower bound.
    """
    rates = np.log(sorted(losses))
    values = np.minimum([losses[r] for r in sorted(losses)], 1e3)
    grid = np.linspace(rates[0], rates[-1], 2001)
    inside = grid[np.interp(grid, rates, values) <= values.min() + depth]
    bound = "≥ " if inside[0] == grid[0] or inside[-1] == grid[-1] else ""
    return f"{bound}x{np.exp(inside[-1] - inside[0]):.1f}"


def under_conditions(table: Rows) -> dict[str, dict[str, list[float]]]:
    """Returns held-out losses by condition and method, seed by seed.

    It has the methods that raced under another condition than the plain one. A
    condition has the seeds on which all of its methods raced. The result is empty if
    there is only one condition.

    Raises:
      SystemExit: A method has rows of two rates, or the reference did not race.
    """
    losses: dict[str, dict[str, dict[int, float]]] = {}
    for key, row in table.items():
        found = losses.setdefault(key.condition, {}).setdefault(key.method, {})
        if key.seed in found:
            raise SystemExit(
                f"{key.method} [{key.condition}]: rows of two rates or numbers of steps"
            )
        found[key.seed] = rows.loss_of(row)
    if len(losses) < 2:
        return {}
    for condition, every in losses.items():
        if REFERENCE not in every:
            raise SystemExit(f"{condition}: no rows of {REFERENCE}, the reference")
    methods = {m for name, found in losses.items() if name != "plain" for m in found}
    together = {}
    for condition, every in losses.items():
        found = {m: every[m] for m in sorted(methods & every.keys())}
        seeds = sorted(set.intersection(*(set(by_seed) for by_seed in found.values())))
        together[condition] = {m: [x[s] for s in seeds] for m, x in found.items()}
    return together
