"""Which text, as which tokens."""

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

from examples.llama.config._checks import (
    expand_home,
    require,
    require_positive,
    setting,
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text, its tokens, and the shape of batches.

    Text has C4's layout, with one JSON object with a "text" per line. By default it is
    the sources and help of Python's standard library.
    """

    GROUP: ClassVar[str] = "data."

    path: Path | None = None
    """Folder of *train*.json.gz and *validation*.json.gz (none: Python's library)."""
    hub: str | None = None
    """Data set to stream from the Hugging Face hub instead of a folder,
    owner/name[:config][@revision], such as allenai/c4:en; it needs train_tokens."""
    train_tokens: int | None = None
    """Training tokens to read, about, from the first document on (none: all)."""
    eval_tokens: int = 65_536
    """Held-out tokens to predict at an evaluation, always the same ones."""
    skip_bad_lines: bool = False
    """Skip lines without a document, and say how many and where, instead of refusing
    the text."""
    tokenizer: str = "byte"
    """byte; bpe, a byte-level BPE trained on the training text; or a file, a
    SentencePiece .model or a Hugging Face tokenizer.json."""
    vocab_size: int | None = None
    """Number of ids of the model (none: the tokenizer's); for bpe, pieces to train."""
    batching: Literal["packed", "one-per-row"] = "packed"
    """Join documents and cut them into full rows; or one document per row, cut or
    padded, as in the published recipe."""
    seq_len: int = 256
    """Predicted tokens per row."""
    batch_size: int = 16
    """Rows per step, over all devices."""
    workers: int = 0
    """Processes per host that read rows (0: a thread of the training process)."""
    cache: Path = Path("runs/tokens")
    """Folder of tokenised text, which runs may share."""

    def __post_init__(self) -> None:
        expand_home(self, "path", "cache", "tokenizer", "hub")
        require_positive(self, "seq_len", "batch_size", "eval_tokens")
        require(
            self.workers >= 0,
            f"{setting(self, 'workers')} must be 0 or more, got {self.workers}",
        )
        for name in ("train_tokens", "vocab_size"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        require(
            self.hub is None or self.path is None,
            f"`data.hub: {self.hub}` and `data.path: {self.path}` are two texts: give "
            "one of them",
        )
        require(
            self.hub is None or self.train_tokens is not None,
            "`data.hub` needs `data.train_tokens`: so many are fetched and kept, and a "
            "run that takes more (steps x batch_size x seq_len) begins another epoch",
        )
        require(
            self.tokenizer in ("byte", "bpe")
            or Path(self.tokenizer).suffix in (".model", ".json"),
            f"`data.tokenizer: {self.tokenizer}` is neither byte, bpe, a .model nor a "
            "tokenizer.json",
        )
        require(
            self.tokenizer != "bpe"
            or (self.vocab_size is not None and self.vocab_size >= 257),
            "`data.tokenizer: bpe` needs a `data.vocab_size` of at least 257 "
            f"(256 bytes and the end of text), got {self.vocab_size}",
        )
