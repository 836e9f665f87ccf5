"""Tokens as rows of one length, for training and evaluation."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class Batch(NamedTuple):
    """A batch for training or evaluation; a single row has no batch axis.

    It has NumPy arrays, or JAX arrays once it is on devices.
    """

    inputs: Any  # (batch, seq) int32
    targets: Any  # (batch, seq) int32
    mask: Any  # (batch, seq) float32, 1 where the target counts and 0 where not


class Rows(Protocol):
    """A source for grain, with random access to rows, also in another process."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


class PackedRows:
    """The documents one after the other, cut into rows wherever a row is full.

    Neighbouring rows share one token, so that every token but the first is predicted
    once per epoch. What is left at the end is too short for a row: unused, unless there
    is a ``pad`` to fill it up with.
    """

    def __init__(
        self, ids: Any, seq_len: int, pad: int | None = None, length: int | None = None
    ):
        """``ids`` (tokens,) integers, of which the first ``length`` are used."""
        self._ids, self._seq_len, self._pad = ids, seq_len, pad
        self._length = len(ids) if length is None else min(length, len(ids))

    def __len__(self) -> int:
        targets = self._length - 1
        if self._pad is not None:
            targets += self._seq_len - 1
        return targets // self._seq_len

    def __getitem__(self, index: int) -> Batch:
        start = index * self._seq_len
        end = min(start + self._seq_len + 1, self._length)
        return _row(self._ids[start:end], self._seq_len, self._pad or 0)


class DocumentRows:
    """One document per row, cut or padded with ``pad``, as in the published recipe.

    As in the recipe, a document that is cut still ends with its end of text.
    """

    def __init__(self, ids: Any, ends: Any, seq_len: int, pad: int):
        """``ids`` (tokens,) integers; ``ends`` (documents,), after each end of text."""
        self._ids, self._ends, self._seq_len, self._pad = ids, ends, seq_len, pad

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Batch:
        start = int(self._ends[index - 1]) if index else 0
        end = int(self._ends[index])
        ids = self._ids[start:end]
        if len(ids) > self._seq_len + 1:
            ids = np.append(ids[: self._seq_len], ids[-1:])
        return _row(ids, self._seq_len, self._pad)


def held_out_batches(rows: Rows, batch_size: int) -> Iterator[Batch]:
    """Yields every row once. The last batch is padded with rows that do not count."""
    for start in range(0, len(rows), batch_size):
        end = min(start + batch_size, len(rows))
        batch = stack([rows[i] for i in range(start, end)])
        missing = start + batch_size - end
        yield Batch(*(np.pad(part, ((0, missing), (0, 0))) for part in batch))


def stack(rows: Sequence[Batch]) -> Batch:
    return Batch(*(np.stack(parts) for parts in zip(*rows, strict=True)))


def _row(ids: np.ndarray, seq_len: int, pad: int) -> Batch:
    """Returns a row of up to ``seq_len + 1`` tokens."""
    padded = np.full(seq_len + 1, pad, np.int32)
    padded[: len(ids)] = ids
    mask = (np.arange(seq_len) < len(ids) - 1).astype(np.float32)
    return Batch(padded[:-1], padded[1:], mask)
