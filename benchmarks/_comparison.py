"""Learning rates on a grid that brackets the best, and paired differences."""

import math
import statistics
from collections.abc import Callable, Sequence

from scipy import stats

MOST = 9
"""How many rates a search tries before it gives up."""


def best_rate(
    name: str, score: Callable[[float], float], rates: Sequence[float]
) -> tuple[float, dict[float, float]]:
    """Returns the rate with the least score, and all scores.

    A grid in factors of two grows until its best rate has a worse neighbour on either
    side. A run that diverged scores infinity.

    Raises:
      RuntimeError: The best of `MOST` rates is still an end of the grid.
    """
    scores: dict[float, float] = {}
    missing = list(rates)
    while missing:
        for rate in missing:
            found = score(rate)
            scores[rate] = found if math.isfinite(found) else math.inf
        best = min(scores, key=scores.__getitem__)
        beyond = {min(scores): best / 2, max(scores): best * 2}
        missing = [beyond[best]] if best in beyond else []
        if missing and len(scores) >= MOST:
            raise RuntimeError(f"{name}: the best of {sorted(scores)} is at the edge")
    return best, dict(sorted(scores.items()))


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Returns the mean, and the half-width of its 95 % interval by Student's t."""
    point = stats.t.ppf(0.975, len(differences) - 1)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), float(point * error)
