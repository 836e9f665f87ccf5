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

_RANK_ONE = Fraction(1, 10**18)  # Of any matrix.


def rank_for_budget(
    nbytes: int,
    params: Any,
    matrices: Matrices = None,
    *,
    transform: Callable[..., optax.GradientTransformation] = scale_by_lorapre_adam,
    **options: Any,
) -> Fraction:
    """The largest `rank` whose optimizer state takes at most `nbytes`.

    Every matrix gets the same share of its smaller side, rank one at least, as always
    where `rank` is a `Fraction`. The state is counted as `describe` counts it: all of
    it, dense moments too, one copy, over all devices. Ask with the arguments that the
    optimizer is made with::

        options = {"matrices": matrices, "second_moment": lp.Dense()}
        rank = lp.rank_for_budget(2 * 2**30, params, **options)
        tx = lp.lorapre_adamw(2e-3, rank, **options)

    More bytes never give a smaller rank. A share at which a matrix would become dense,
    since its rank no longer pays (`r (p+q) >= p q`, at half of the smaller side or
    above), is never taken: a budget beyond that, dense Adam's for instance, gives the
    largest share at which every matrix stays factored.

    Args:
      nbytes: The budget, in bytes. What the optimizer keeps besides `transform` (the
        count of a learning rate's schedule: 4 bytes) has to be taken off.
      params: Parameters: arrays or `jax.ShapeDtypeStruct`s; nothing is allocated.
      matrices: Which leaves are matrices; see `scale_by_lorapre_adam`.
      transform: What keeps the state; called with `rank=`, `matrices=` and `options`.
        `functools.partial(lp.lorapre_muon, learning_rate)`, for example.
      options: Other arguments of `transform`, such as `factor_dtype="bfloat16"`.

    Returns:
      A `fractions.Fraction` in (0, 1].

    Raises:
      TypeError: `nbytes` is not an int.
      ValueError: Rank one needs more bytes (the message says how many, and what takes
        them), or no leaf is factored at all.
      Whatever else `transform` and its `init` raise.
    """
    checks.check_count("nbytes", nbytes, 0)

    def report(rank: Fraction) -> Report:
        return describe(transform(rank=rank, matrices=matrices, **options), params)

    least = report(_RANK_ONE)
    factored = [leaf for leaf in least.leaves if leaf.is_factored]
    if not factored:
        raise ValueError(
            "rank_for_budget: no leaf is factored, so there is no rank to choose. "
            f"Dense are {_largest(least.leaves)}."
        )
    if least.total_bytes > nbytes:
        raise ValueError(_too_little(nbytes, least))

    def too_much(rank: Fraction) -> bool:
        at = report(rank)
        count = sum(leaf.is_factored for leaf in at.leaves)
        return at.total_bytes > nbytes or count < len(factored)

    # The ranks change at multiples of 1/min(p, q) only; at the first they are all one.
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
    return f"{text}: {_largest(dense)}." if dense else f"{text}."


def _largest(leaves: Iterable[LeafReport], most: int = 4) -> str:
    by_size = sorted(leaves, key=lambda leaf: -leaf.nbytes)
    rest = f" and {len(by_size) - most} more" if len(by_size) > most else ""
    named = (f"'{x.path}' ({x.nbytes:,}; {x.why_dense})" for x in by_size[:most])
    return ", ".join(named) + rest
