"""The best learning rate on a grid that brackets it, and paired comparisons."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats


def best_rate(
    score: Callable[[float], float], start: float
) -> tuple[float, dict[float, float]]:
    """The rate of least score among factors of two from `start`, and all scores.

    Goes on until the best one has a worse neighbour on either side. A run that
    diverged scores infinity.
    """
    scores: dict[float, float] = {}
    missing = [start / 2, start, start * 2]
    while missing:
        for rate in missing:
            found = score(rate)
            scores[rate] = found if math.isfinite(found) else math.inf
        best = min(scores, key=scores.__getitem__)
        missing = [rate for rate in (best / 2, best * 2) if rate not in scores]
    return best, dict(sorted(scores.items()))


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float]
) -> tuple[float, float]:
    """Mean of `ours - theirs`, seed by seed, and its 95 % interval's half-width."""
    difference = np.subtract(ours, theirs)
    n = len(difference)
    error = difference.std(ddof=1) / math.sqrt(n)
    return float(difference.mean()), float(stats.t.ppf(0.975, n - 1) * error)
