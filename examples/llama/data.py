"""Tokens in rows: shuffled training batches by step number, fixed held-out batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from examples.llama.config import DataConfig
from examples.llama.corpus import DataError, load_corpus
from examples.llama.tokenizer import ByteTokenizer, Tokenizer, fingerprint, train_bpe


class TextData(NamedTuple):
    """Two token streams, each (length,) uint16 or uint32."""

    train: np.ndarray
    held_out: np.ndarray
    vocab_size: int

    def fingerprint(self) -> str:
        """Changes when any token that a run trains on or is measured on changes."""
        parts = (self.train, self.held_out)
        return fingerprint(
            f"{part.dtype} {len(part)}:".encode() + part.tobytes() for part in parts
        )


class Batch(NamedTuple):
    """To train on or to be measured on; a single row lacks the batch axis.

    Arrays of NumPy, or of JAX once they lie on devices.
    """

    inputs: Any  # (batch, seq) int32
    targets: Any  # (batch, seq) int32
    mask: Any  # (batch, seq) float32, 1 where the target counts and 0 where not


def load_text(config: DataConfig, cache_folder: Path) -> TextData:
    """Read, tokenize and join the documents; a BPE is cached in ``cache_folder``."""
    corpus = load_corpus(config.path)
    tokenizer: Tokenizer = ByteTokenizer()
    if config.tokenizer == "bpe":
        assert config.vocab_size is not None  # checked by DataConfig
        tokenizer = train_bpe(corpus.train, config.vocab_size, cache_folder)
    train = join(corpus.train, tokenizer)
    if len(train) <= config.seq_len:
        raise DataError(
            f"the training text has {len(train)} tokens, a single row of seq_len "
            f"{config.seq_len} needs {config.seq_len + 1}"
        )
    held_out = join(corpus.held_out, tokenizer)[: config.eval_tokens + 1]
    return TextData(train, held_out, tokenizer.vocab_size)


def join(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """One stream of all documents, an end-of-text token after each."""
    small = tokenizer.vocab_size <= np.iinfo(np.uint16).max + 1
    dtype = np.uint16 if small else np.uint32
    end = np.asarray([tokenizer.end_of_text], dtype)
    parts = [
        part for ids in tokenizer.encode(texts) for part in (ids.astype(dtype), end)
    ]
    return np.concatenate(parts)


class Rows:
    """Row ``i`` has ``seq_len`` tokens as inputs and, one later, as targets.

    Neighbouring rows share one token, so that every token is predicted once per
    epoch. What is left at the end of the stream is too short for a row and unused.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int):
        self._tokens, self._seq_len = tokens, seq_len

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._seq_len

    def __getitem__(self, index: int) -> Batch:
        start = index * self._seq_len
        row = self._tokens[start : start + self._seq_len + 1].astype(np.int32)
        return Batch(row[:-1], row[1:], np.ones(self._seq_len, np.float32))


def train_rows(tokens: np.ndarray, seq_len: int, seed: int) -> grain.MapDataset[Batch]:
    """Endless rows, in another order every epoch.

    Random access makes a row a pure function of (seed, number): a resumed run goes on
    with exactly the tokens it would have seen, and a host reads its own rows alone.
    """
    rows = grain.MapDataset.source(Rows(tokens, seq_len)).seed(seed)
    return rows.shuffle().repeat()


def train_batches(
    tokens: np.ndarray, seq_len: int, batch_size: int, seed: int
) -> grain.MapDataset[Batch]:
    """Endless batches; number ``step`` is ``batches[step]``."""
    return train_rows(tokens, seq_len, seed).batch(batch_size)


def held_out_batches(
    tokens: np.ndarray, seq_len: int, batch_size: int
) -> Iterator[Batch]:
    """Every token but the first as a target exactly once, in batches of one shape."""
    count = len(tokens) - 1
    size = batch_size * seq_len
    for start in range(0, count, size):
        chunk = tokens[start : start + size + 1].astype(np.int32)
        real = len(chunk) - 1
        padded = np.pad(chunk, (0, size - real))
        yield Batch(
            inputs=padded[:-1].reshape(batch_size, seq_len),
            targets=padded[1:].reshape(batch_size, seq_len),
            mask=(np.arange(size) < real).astype(np.float32).reshape(-1, seq_len),
        )
