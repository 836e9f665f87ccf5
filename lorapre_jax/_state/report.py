"""The report of `describe`, and its table."""

import dataclasses
import math
from typing import Any

from lorapre_jax._moments.methods import Dense, have_rank

_LARGE = 0.01  # Of all parameters: the dense leaves that the last line names.


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """One parameter's share of the optimizer state.

    Attributes:
      path, shape, dtype: The parameter's.
      batch_shape, p, q, rank: Its matrices and their factors' rank; None where it is
        dense.
      why_dense: Why it is dense; empty if it is factored.
      mend: What to write to have it factored; empty if nothing suggests itself.
      methods: How each moment is kept.
      nbytes: Bytes of state that belong to it, on all devices together.
      adamw_nbytes: The same for `optax.adamw`.
      device_nbytes: Bytes on one device; None where `describe` was given no state.
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
        return self.rank is not None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Report:
    """What `describe` returns; `str()` of it is a table.

    Attributes:
      leaves: One `LeafReport` per parameter, in tree order.
      other_bytes: State that belongs to no parameter, such as counters.
      total_bytes: The whole state, in bytes.
      adamw_bytes: The state of `optax.adamw` for the same parameters, in bytes.
      device_bytes: What one device holds of the state, in bytes; None where `describe`
        was given no state.
      replicated: Paths in the state of the factors that are replicated over mesh axes
        that their parameter is sharded over.
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
        """Of the parameters, by number."""
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
        """What to think of it, and what to do."""
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
