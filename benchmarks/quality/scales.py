"""The models and texts of the race."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

from benchmarks.quality.rows import Split
from examples.llama.config import ModelConfig
from examples.llama.corpus import load_corpus
from examples.llama.data import join
from examples.llama.tokenizer import ByteTokenizer, Tokenizer, fingerprint


@dataclasses.dataclass(frozen=True)
class Scale:
    """One row of the comparison: a Llama, its tokens and how long it trains."""

    model: ModelConfig
    folder: str
    """Of the text, below the data folder."""
    vocab_size: int | None
    """Pieces of a SentencePiece model of the training text; None: bytes."""
    steps: int
    batch_size: int
    seq_len: int
    held_out_tokens: int = 65_536
    train_characters: int = 40_000_000
    """The beginning of each training text is enough."""


SCALES = {
    "a": Scale(
        ModelConfig(width=128, ffn_width=352, num_layers=2, scan_layers=False),
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
    # The 60M recipe: 10 % of the published steps, what the text at hand lasts for.
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
}


class Texts(NamedTuple):
    """Token streams, each (length,) integers; held-out ones by name."""

    train: np.ndarray
    held_out: dict[str, np.ndarray]
    vocab_size: int


def load_texts(scale: Scale, data: Path | None, split: Split, cache: Path) -> Texts:
    """The tokens of one split; no document is in both.

    Held-out text is the validation text of `data`'s folder, and of the other folder
    ("text" or "c4"); without `data`, all is Python's own library.
    """
    half = 0 if split == "choose" else 1
    corpus = load_corpus(data and data / scale.folder)
    training = _beginning(corpus.train[half::2], scale.train_characters)
    tokenizer: Tokenizer = ByteTokenizer()
    if scale.vocab_size is not None:
        # One tokenizer for both splits, so that their losses mean the same.
        source = _beginning(corpus.train[0::2], 10_000_000)
        tokenizer = _SentencePiece.trained(source, scale.vocab_size, cache)
    held_out = {scale.folder if data else "library": corpus.held_out}
    if data is not None:
        other = "c4" if scale.folder == "text" else "text"
        held_out[other] = load_corpus(data / other).held_out
    count = scale.held_out_tokens + 1
    return Texts(
        join(training, tokenizer),
        {
            name: join(_beginning(texts[half::2], 8 * count), tokenizer)[:count]
            for name, texts in held_out.items()
        },
        tokenizer.vocab_size,
    )


def _beginning(texts: list[str], characters: int) -> list[str]:
    lengths = np.cumsum([len(text) for text in texts])
    return texts[: int(np.searchsorted(lengths, characters)) + 1]


class _SentencePiece:
    """Byte-fallback BPE pieces; 2 ends a text."""

    end_of_text = 2

    def __init__(self, model: bytes):
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._pieces.vocab_size()

    def encode(self, texts):
        for ids in self._pieces.encode(list(texts), num_threads=1):
            yield np.asarray(ids, np.uint32)

    @classmethod
    def trained(cls, texts: list[str], vocab_size: int, cache: Path):
        name = fingerprint(text.encode() for text in texts)[:12]
        path = cache / f"sentencepiece-{vocab_size}-{name}.model"
        if not path.exists():
            _train_sentencepiece(texts, vocab_size, path)
        return cls(path.read_bytes())


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
