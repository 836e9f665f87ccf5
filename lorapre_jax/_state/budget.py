"""The largest rank whose optimizer state fits into a number of bytes."""

import bisect
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import optax

from lorapre_jax._adam import scale_by_lorapre_adam
from lorapre_jax._leaves import checks
from lorapre_jax._leaves.selection import Matrices
from lorapre_jax._state.memory import describe
from lorapre_jax._state.report import LeafReport, Report

_RANK_ONE = Fraction(1, 10**18)  # Rank one for any matrix.


def rank_for_budget(
    nbytes: int,
    params: Any,
    matrices: Matrices = None,
    *,
    transform: Callable[..., optax.GradientTransformation] = scale_by_lorapre_adam,
    **options: Any,
) -> Fraction:
    """Returns the largest `rank` whose optimizer state takes at most `nbytes`.

    The rank is a share of the smaller side of each matrix, the same for all of them, as
    always if `rank` is a `Fraction`; no matrix has less than rank one. The state is
    counted as `describe` counts it: the whole state, dense moments too, one copy, over
    all devices. Call it with the arguments that the optimizer is made with.

    More bytes never give a smaller rank. A share at which a matrix would become dense,
    because its rank no longer pays (`r (p + q) >= p q`, from half of the smaller side
    on), is never returned. With a larger budget, such as that of dense Adam, the result
    is the largest share at which every matrix stays factored.

    Args:
      nbytes: The budget in bytes. Subtract what the optimizer keeps besides `transform`
        (4 bytes for the count of a learning-rate schedule).
      params: Parameters: arrays or `jax.ShapeDtypeStruct`s. Nothing is allocated.
      matrices: Which leaves are matrices; see `scale_by_lorapre_adam`.
      transform: What keeps the state. It is called with `rank=`, `matrices=` and
        `options`; for example `functools.partial(lp.lorapre_muon, learning_rate)`.
      options: Other arguments of `transform`, such as `factor_dtype="bfloat16"`.

    Returns:
      A `fractions.Fraction` in (0, 1].

    Raises:
      TypeError: `nbytes` is not an int.
      ValueError: Rank one needs more bytes (the message says how many, and which leaves
        take them), or no leaf is factored.
      Whatever else `transform` and its `init` raise.

    Examples:
      >>> import jax
      >>> import lorapre_jax as lp
      >>> params = {"up": jax.ShapeDtypeStruct((256, 1024), "float32")}
      >>> rank = lp.rank_for_budget(500_000, params, factor_dtype="bfloat16")
      >>> tx = lp.lorapre_adamw(2e-3, rank, factor_dtype="bfloat16")
      >>> print(rank, lp.describe(tx, params).total_bytes <= 500_000)
      193/256 True

    See also:
      `describe`; :doc:`which rank </choosing>`; :doc:`what a rank costs
      </results/rank>`.
    """
    checks.check_count("nbytes", nbytes, 0)

    def report(rank: Fraction) -> Report:
        return describe(transform(rank=rank, matrices=matrices, **options), params)

    least = report(_RANK_ONE)
    factored = [leaf for leaf in least.leaves if leaf.is_factored]
    if not factored:
        raise ValueError(
            "rank_for_budget: no leaf is factored, so there is no rank to choose. "
            f"These leaves are dense: {_largest(least.leaves)}."
        )
    if least.total_bytes > nbytes:
        raise ValueError(_too_little(nbytes, least))

    def too_much(rank: Fraction) -> bool:
        at = report(rank)
        count = sum(leaf.is_factored for leaf in at.leaves)
        return at.total_bytes > nbytes or count < len(factored)

    # Ranks change at multiples of 1/min(p, q) only. At the least, all ranks are one.
    sides = {min(leaf.p, leaf.q) for leaf in factored if leaf.p and leaf.q}
    shares = sorted({Fraction(k, side) for side in sides for k in range(1, side + 1)})
    return shares[bisect.bisect_left(shares, True, key=too_much) - 1]


def _too_little(nbytes: int, least: Report) -> str:
    dense = [leaf for leaf in least.leaves if not leaf.is_factored and leaf.nbytes]
    in_dense = sum(leaf.nbytes for leaf in dense)
    text = (
        f"rank_for_budget: the budget is {nbytes:,} bytes, but at rank one the state "
        f"takes {least.total_bytes:,}, {in_dense:,} of them for dense leaves"
    )
    named = f": {_largest(dense)}" if dense else ""
    return f"{text}{named}. Raise the budget, or factor more leaves."


def _largest(leaves: Iterable[LeafReport], most: int = 4) -> str:
    by_size = sorted(leaves, key=lambda leaf: -leaf.nbytes)
    more = f" and {len(by_size) - most} more" if len(by_size) > most else ""
    named = (f"'{x.path}' ({x.nbytes:,}; {x.why_dense})" for x in by_size[:most])
    return ", ".join(named) + more
