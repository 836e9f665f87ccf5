"""The report that `describe` returns, and its table."""

import dataclasses
import math
from typing import Any

from lorapre_jax._moments.dense import Dense
from lorapre_jax._moments.methods import have_rank

_LARGE = 0.01  # The last line names dense leaves above this share of all parameters.


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """One parameter's share of the optimizer state: a row of `Report.leaves`.

    Attributes:
      path: Keys of the parameter, joined by slashes.
      shape: Shape of the parameter.
      dtype: Dtype of the parameter.
      batch_shape: Sizes of the batch axes; None if it is not seen as matrices.
      p: Rows of one matrix; None likewise.
      q: Columns of one matrix; None likewise.
      rank: Rank of its factors; None if it is dense.
      why_dense: Why it is dense; empty if it is factored.
      mend: What to write so that it is factored; empty without advice.
      methods: How each moment is kept, for example `(LowRank(), RankOne())`.
      nbytes: Bytes of state that belong to it, on all devices together.
      adamw_nbytes: Bytes of its state in `optax.adamw`.
      device_nbytes: Bytes of its state on one device; None if `describe` was given no
        state.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    batch_shape: tuple[int, ...] | None
    p: int | None
    q: int | None
    rank: int | None
    why_dense: str
    mend: str
    methods: tuple[Any, ...]
    nbytes: int
    adamw_nbytes: int
    device_nbytes: int | None = None

    @property
    def is_factored(self) -> bool:
        """Whether a moment of it is kept as factors or as statistics."""
        return self.rank is not None

    @property
    def size(self) -> int:
        """Number of elements of the parameter."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Report:
    """What `describe` returns. `str(report)` is a table with a row per parameter.

    The last line of the table says what share of the parameters is factored, which
    large leaves are dense, why, and what to write.

    Attributes:
      leaves: One `LeafReport` per parameter, in tree order.
      other_bytes: Bytes of state that belong to no parameter, such as counters.
      total_bytes: Bytes of the whole state.
      adamw_bytes: Bytes of the state of `optax.adamw` for the same parameters.
      device_bytes: Bytes of the state on one device; None if `describe` was given no
        state.
      replicated: Paths in the state of factors that are replicated over mesh axes that
        their parameter is sharded over.
    """

    leaves: tuple[LeafReport, ...]
    other_bytes: int
    total_bytes: int
    adamw_bytes: int
    device_bytes: int | None = None
    replicated: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """`total_bytes / adamw_bytes`."""
        return self.total_bytes / self.adamw_bytes

    @property
    def factored_share(self) -> float:
        """Share of the parameters in factored leaves, by number of elements."""
        total = sum(leaf.size for leaf in self.leaves)
        return sum(leaf.size for leaf in self.leaves if leaf.is_factored) / max(
            total, 1
        )

    def __str__(self) -> str:
        per_device = self.device_bytes is not None
        rows = [("leaf", "shape", "state", "bytes", "of AdamW's", "on a device")]
        for leaf in self.leaves:
            share = leaf.nbytes / leaf.adamw_nbytes if leaf.adamw_nbytes else 1.0
            rows.append(
                (leaf.path, _times(leaf.shape), _kept(leaf), f"{leaf.nbytes:,}",
                 f"{share:.3f}", f"{leaf.device_nbytes or 0:,}")
            )  # fmt: skip
        rows.append(("other", "", "", f"{self.other_bytes:,}", "", ""))
        rows.append(
            ("total", "", "", f"{self.total_bytes:,}", f"{self.ratio:.3f}",
             f"{self.device_bytes or 0:,}")
        )  # fmt: skip
        lines = _aligned([row if per_device else row[:-1] for row in rows])
        rule = "-" * max(map(len, lines))
        table = [lines[0], rule, *lines[1:-2], rule, *lines[-2:]]
        return "\n".join([*table, *self._words()])

    def _words(self) -> list[str]:
        """Returns the lines below the table: what is unexpected, and what to write."""
        words = []
        if self.replicated:
            words.append(
                f"Replicated, though their parameters are sharded: "
                f"{', '.join(self.replicated)}. See `check_state_sharding`."
            )
        total = sum(leaf.size for leaf in self.leaves)
        large = [
            leaf
            for leaf in sorted(self.leaves, key=lambda leaf: -leaf.size)
            if not leaf.is_factored
            and len(leaf.shape) > 1
            and leaf.size >= _LARGE * total
        ]
        share = f"{self.factored_share:.1%} of the parameters are factored"
        if not any(leaf.is_factored for leaf in self.leaves):
            share = "Nothing is factored, and no state is saved"
        if not large:
            return [*words, f"{share}; no large leaf is dense."]
        named = ", ".join(f"'{leaf.path}' ({leaf.why_dense})" for leaf in large[:4])
        more = f" and {len(large) - 4} more" if len(large) > 4 else ""
        mends = dict.fromkeys(leaf.mend for leaf in large if leaf.mend)
        return [*words, f"{share}. Large and dense: {named}{more}.", *mends]


def _kept(leaf: LeafReport) -> str:
    if not leaf.is_factored:
        return f"dense: {leaf.why_dense}"
    kinds = [type(m).__name__ for m in leaf.methods if not isinstance(m, Dense)]
    size = _times((*(leaf.batch_shape or ()), leaf.p, leaf.q))
    at_rank = f" at rank {leaf.rank}" if have_rank(leaf.methods) else ""
    return f"{size}{at_rank}: {', '.join(kinds)}"


def _times(shape) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i >= 3 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
