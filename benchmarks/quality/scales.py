"""The models and texts of the race."""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

from benchmarks.quality.rows import Split
from examples.llama.config import DataConfig, ModelConfig
from examples.llama.data import documents, text
from examples.llama.data.token_cache import with_ends
from examples.llama.data.tokenizers import (
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)


@dataclasses.dataclass(frozen=True)
class Scale:
    """A scale of the race: a Llama, its tokens and the length of training."""

    model: ModelConfig
    folder: str
    """The folder of the text, below the data folder."""
    vocab_size: int | None
    """Pieces of a SentencePiece model of the training text; None means bytes."""
    steps: int
    batch_size: int
    seq_len: int
    held_out_tokens: int = 65_536
    train_characters: int = 40_000_000
    """How much of the training text is used, from its beginning."""


_SMALL = ModelConfig(width=128, ffn_width=352, num_layers=2, scan_layers=False)
SCALES = {
    "a": Scale(
        _SMALL,
        folder="c4",
        vocab_size=None,
        steps=1200,
        batch_size=16,
        seq_len=128,
    ),
    "b": Scale(
        ModelConfig(width=256, ffn_width=688, num_layers=6, scan_layers=False),
        folder="text",
        vocab_size=4096,
        steps=600,
        batch_size=16,
        seq_len=128,
    ),
    # The published 60M model and batch, with 4 % of its steps for lack of text.
    "c": Scale(
        ModelConfig(
            width=512,
            ffn_width=1376,
            num_layers=8,
            num_heads=8,
            scan_layers=False,
            compute_dtype="bfloat16",
        ),
        folder="text",
        vocab_size=32_000,
        steps=400,
        batch_size=512,
        seq_len=256,
        train_characters=10**9,
    ),
    # Searched at these steps and raced for ten times as many: no document is seen
    # twice. (e) has eight times the tokens a step.
    "d": Scale(
        _SMALL, folder="text", vocab_size=None, steps=1200, batch_size=16, seq_len=128
    ),
    "e": Scale(
        _SMALL, folder="text", vocab_size=None, steps=120, batch_size=128, seq_len=128
    ),
}


class Texts(NamedTuple):
    """Token streams, each (length,) integers, with held-out ones by name."""

    train: np.ndarray
    held_out: dict[str, np.ndarray]
    vocab_size: int

    @property
    def digest(self) -> str:
        """A digest of all tokens, since losses on other texts are not comparable."""
        found = hashlib.sha256(self.train.tobytes())
        for tokens in self.held_out.values():
            found.update(tokens.tobytes())
        return found.hexdigest()[:12]


def load_texts(scale: Scale, data: Path | None, split: Split, cache: Path) -> Texts:
    """Returns the tokens of one split. No document is in both splits.

    Held-out texts are the validation texts of the scale's folder in `data` and of the
    other folder ("text" or "c4"). Without `data`, all text is Python's own library.
    """
    half = 0 if split == "choose" else 1
    folder = data and data / scale.folder
    train = read_texts(folder, "train")
    training = _beginning(train[half::2], scale.train_characters)
    tokenizer: Tokenizer = ByteTokenizer()
    if scale.vocab_size is not None:
        # One tokenizer for both splits, so that their losses mean the same.
        source = _beginning(train[0::2], 10_000_000)
        tokenizer = _sentencepiece(source, scale.vocab_size, cache)
    own = scale.folder if data else "library"
    held_out = {own: read_texts(folder, "validation")}
    if data is not None:
        other = "c4" if scale.folder == "text" else "text"
        held_out[other] = read_texts(data / other, "validation")
    count = scale.held_out_tokens + 1
    return Texts(
        token_stream(training, tokenizer),
        {
            name: token_stream(_beginning(texts[half::2], 8 * count), tokenizer)[:count]
            for name, texts in held_out.items()
        },
        tokenizer.vocab_size,
    )


def _beginning(texts: list[str], characters: int) -> list[str]:
    lengths = np.cumsum([len(text) for text in texts])
    return texts[: int(np.searchsorted(lengths, characters)) + 1]


def read_texts(folder: Path | None, split: documents.Split) -> list[str]:
    """Returns the texts of a folder with C4's layout, or of Python's own library."""
    return list(text.read_texts(text.open_source(DataConfig(folder)), split))


def token_stream(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """Returns all texts with an end of text after each, (length,) uint16."""
    return np.concatenate(list(with_ends(texts, tokenizer))).astype(np.uint16)


def _sentencepiece(
    texts: list[str], vocab_size: int, cache: Path
) -> SentencePieceTokenizer:
    """Returns a byte-fallback BPE tokenizer of these texts; token 2 ends a text."""
    digest = hashlib.sha256()
    for each in texts:
        digest.update(each.encode())
    path = cache / f"sentencepiece-{vocab_size}-{digest.hexdigest()[:12]}.model"
    if not path.exists():
        _train_sentencepiece(texts, vocab_size, path)
    return SentencePieceTokenizer(path.read_bytes())


def _train_sentencepiece(texts: list[str], vocab_size: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            max_sentence_length=1 << 20,
            num_threads=2,
            minloglevel=2,
        )
    unfinished.rename(path)


cached_texts = functools.lru_cache(maxsize=4)(load_texts)
