"""Which text, as which tokens."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from examples.llama.config._checks import require, require_positive


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text, as which tokens, in which shape.

    A folder of text is laid out as C4 is: one JSON object with a "text" per line. The
    text that is always there is Python's own standard library: sources and help.
    """

    path: Annotated[Path | None, tyro.conf.arg(name="data")] = None
    """Folder of *train*.json.gz and *validation*.json.gz (none: Python's library)."""
    tokenizer: Literal["byte", "bpe"] = "byte"
    """Bytes, or a byte-level BPE trained on the training text."""
    vocab_size: int | None = None
    """Pieces of the BPE vocabulary, with --tokenizer bpe."""
    seq_len: int = 256
    """Tokens per row that are predicted."""
    batch_size: int = 16
    """Rows per step, over all devices."""
    eval_tokens: int = 65_536
    """Held-out tokens to predict at an evaluation, always the same ones."""

    def __post_init__(self) -> None:
        require_positive(self, "seq_len", "batch_size", "eval_tokens")
        if self.tokenizer == "byte":
            require(self.vocab_size is None, "vocab_size is for --tokenizer bpe only")
        else:
            require(
                self.vocab_size is not None and self.vocab_size >= 257,
                "--tokenizer bpe needs a vocab_size of at least 257 "
                f"(256 bytes and the end of text), got {self.vocab_size}",
            )
