"""Text to token ids: bytes, or a byte-level BPE trained on the spot."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from examples.llama import files

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    vocab_size: int
    end_of_text: int
    """Id that follows every document."""

    def encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """Ids of each text, (length,) integers, without the end of text."""
        ...


class ByteTokenizer:
    """Id = value of the UTF-8 byte; 256 ends a text."""

    vocab_size = 257
    end_of_text = 256

    def encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        for text in texts:
            yield np.frombuffer(text.encode("utf-8"), np.uint8)


class BPETokenizer:
    """Byte-level byte-pair encoding; 0 ends a text."""

    end_of_text = 0
    _batch = 1024  # texts handed over at a time: enough for every core, little memory

    def __init__(self, pieces: tokenizers.Tokenizer):
        # A text that spells out the end of text gets ordinary pieces for it.
        pieces.encode_special_tokens = True
        self._pieces = pieces
        self.vocab_size = pieces.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        for start in range(0, len(texts), self._batch):
            batch = list(texts[start : start + self._batch])
            for encoding in self._pieces.encode_batch_fast(
                batch, add_special_tokens=False
            ):
                yield np.asarray(encoding.ids, np.uint32)

    def decode(self, ids: np.ndarray) -> str:
        return self._pieces.decode(ids.tolist())


def train_bpe(
    texts: Sequence[str], vocab_size: int, cache_folder: Path
) -> BPETokenizer:
    """A BPE of at most ``vocab_size`` pieces, kept as a file in ``cache_folder``.

    The file's name holds a hash of the texts: other texts never meet a stale one.
    """
    name = f"bpe-{vocab_size}-{fingerprint(text.encode() for text in texts)[:12]}.json"
    path = cache_folder / name
    if path.exists():
        return BPETokenizer(tokenizers.Tokenizer.from_file(str(path)))
    pieces = tokenizers.Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(texts, trainer)
    cache_folder.mkdir(parents=True, exist_ok=True)
    files.write(path, pieces.to_str(pretty=True))
    return BPETokenizer(pieces)


def fingerprint(chunks: Iterable[bytes]) -> str:
    """SHA-256 of the chunks one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
