"""What the sources of text have in common."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

Split = Literal["train", "validation"]
SKIPPING = "`data.skip_bad_lines: true` leaves such lines out"
_SHOWN = 5


class DataError(ValueError):
    """The text cannot be read; the message names file and line."""


class BadLine(Exception):
    """Why a line holds no document."""


class Document(NamedTuple):
    text: str
    read: float | None  # Part of its source read by then, 0 to 1; None: not known.


class BadLines:
    """What becomes of lines that hold no document: an error, or a count of them.

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
        """Changes when any text of the split does; takes no time to speak of."""
        ...

    def documents(self, split: Split, bad: BadLines) -> Iterator[Document]:
        """In a fixed order, one at a time in memory where the text may be large."""
        ...


def text_of(record: Any) -> str:
    """The document in a line of C4, a dict with a "text".

    A document of nothing but white space is a fault: it would be a row without a
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
