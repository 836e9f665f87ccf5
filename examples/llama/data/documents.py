"""The interface of sources of text, and their errors."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

Split = Literal["train", "validation"]
SKIPPING = "`data.skip_bad_lines: true` leaves such lines out"
_SHOWN = 5


class DataError(ValueError):
    """The text cannot be read; the message names file and line."""


class BadLine(Exception):
    """A line has no document; the message says why."""


class Document(NamedTuple):
    text: str
    read: float | None  # Part of its source read by then, 0 to 1; None: not known.


class BadLines:
    """Handles lines without a document: raises an error, or counts them.

    Attributes:
      count: Lines left out.
      first: Where and why, of the first few.
    """

    def __init__(self, skip: bool):
        self._skip = skip
        self.count = 0
        self.first: list[str] = []

    def add(self, where: str, why: BadLine) -> None:
        """Raises ``DataError`` unless such lines are to be skipped."""
        if not self._skip:
            raise DataError(f"{where}: {why}; {SKIPPING}")
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(f"{where}: {why}")


class Source(Protocol):
    name: str
    """For messages."""

    def fingerprint(self, split: Split) -> str:
        """Returns a text that changes if any document does, in little time."""
        ...

    def documents(self, split: Split, bad: BadLines) -> Iterator[Document]:
        """Yields documents in a fixed order; a large text is not held in memory."""
        ...


def text_of(record: Any) -> str:
    """Returns the document in a line of C4, a dict with a "text".

    A document of white space only is an error: it would be a row without a
    target, and in real data it means that something was lost.
    """
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise BadLine('no "text" field with a string')
    if not text.strip():
        raise BadLine("an empty document")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # Half of a pair, which JSON can spell.
        raise BadLine(f"not Unicode text: {error}") from error
    return text
