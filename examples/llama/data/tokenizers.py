"""Text to token ids and back: bytes, a SentencePiece model, a tokenizer.json."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from examples.llama import files
from examples.llama.data.documents import DataError

_END_OF_TEXT = "<|endoftext|>"
_ENDS_OF_TEXT = (_END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_SENTENCEPIECE_FILE, _PIECES_FILE = "tokenizer.model", "tokenizer.json"
_SETTINGS_FILE = "tokenizer_config.json"  # Hugging Face's name, beside tokenizer.json.
# Enough to learn pieces from: more text takes longer and hardly changes them.
_BPE_CHARACTERS = 50_000_000


class Tokenizer(Protocol):
    vocab_size: int
    """One more than the largest id."""
    end_of_text: int
    """Id that follows every document."""
    pad: int
    """Id that fills a row up; it is never a target."""
    fingerprint: str
    """Of all that decides which ids a text gets."""

    def encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """Ids of each text, (length,) integers, without the end of text."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Without the ids that only the model has."""
        ...

    def save(self, folder: Path) -> None:
        """As the one file there, under its usual name; ``load_saved`` reads it."""
        ...


class ByteTokenizer:
    """Id = value of the UTF-8 byte; 256 ends a text."""

    vocab_size = 257
    end_of_text = pad = 256
    fingerprint = "byte"

    def encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        for text in texts:
            yield np.frombuffer(text.encode("utf-8"), np.uint8)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """It has no file."""
        _clear(folder)


class SentencePieceTokenizer:
    """A SentencePiece model, as T5's and Llama's."""

    def __init__(self, model: bytes):
        self._model = model
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._pieces.vocab_size()
        self.end_of_text = self._pieces.eos_id()
        if self.end_of_text < 0:
            raise DataError("the model has no end of text (eos)")
        pad = self._pieces.pad_id()
        self.pad = pad if pad >= 0 else self.end_of_text
        self.fingerprint = hashlib.sha256(model).hexdigest()

    def encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        for ids in self._pieces.encode(list(texts)):
            yield np.asarray(ids, np.uint32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._pieces.decode([int(i) for i in ids if i < self.vocab_size])

    def save(self, folder: Path) -> None:
        _clear(folder, but=_SENTENCEPIECE_FILE)
        files.write(folder / _SENTENCEPIECE_FILE, self._model)


class PiecesTokenizer:
    """A tokenizer.json of Hugging Face's, whose end of text is given by its name."""

    def __init__(self, description: str, end_of_text: str):
        self._description, self._end = description, end_of_text
        pieces = tokenizers.Tokenizer.from_str(description)
        # A text that spells out the end of text gets ordinary pieces for it.
        pieces.encode_special_tokens = True
        pieces.no_truncation()
        pieces.no_padding()
        self._pieces = pieces
        ids = pieces.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1  # Some leave ids out.
        self.end_of_text = self.pad = ids[end_of_text]
        whole = f"{end_of_text}\n{description}"
        self.fingerprint = hashlib.sha256(whole.encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        found = self._pieces.encode_batch_fast(list(texts), add_special_tokens=False)
        for encoding in found:
            yield np.asarray(encoding.ids, np.uint32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._pieces.decode([int(i) for i in ids])

    def save(self, folder: Path) -> None:
        _clear(folder, but=_PIECES_FILE)
        files.write(folder / _PIECES_FILE, self._description)
        settings = json.dumps({"eos_token": self._end}, indent=2)
        files.write(folder / _SETTINGS_FILE, settings + "\n")


def load_file(path: Path) -> Tokenizer:
    """Of a SentencePiece ``.model`` or a ``tokenizer.json``."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        if path.suffix == ".model":
            if not path.stat().st_size:  # Which SentencePiece would take.
                raise DataError("the file is empty")
            return SentencePieceTokenizer(path.read_bytes())
        description = path.read_text(encoding="utf-8")
        end = _end_of_text(json.loads(description), path.with_name(_SETTINGS_FILE))
        return PiecesTokenizer(description, end)
    except Exception as error:  # The libraries have no class of their own for it.
        raise DataError(f"{path}: not a tokenizer that can be used: {error}") from error


def load_saved(folder: Path) -> Tokenizer:
    """What ``save`` wrote there; bytes where it wrote nothing."""
    path = saved_file(folder)
    return load_file(path) if path else ByteTokenizer()


def saved_file(folder: Path) -> Path | None:
    """That which ``save`` wrote there, if any."""
    paths = [folder / name for name in (_SENTENCEPIECE_FILE, _PIECES_FILE)]
    return next((path for path in paths if path.exists()), None)


def _clear(folder: Path, but: str | None = None) -> None:
    """Of what other tokenizers saved there, as for a run that never got anywhere."""
    for name in {_SENTENCEPIECE_FILE, _PIECES_FILE} - {but}:
        (folder / name).unlink(missing_ok=True)


def copy_saved(source: Path, target: Path) -> bool:
    """From folder to folder, with what is told beside it; whether there is one."""
    path = saved_file(source)
    if path is None:
        return False
    for name in (path.name, _SETTINGS_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return True


def train_bpe(texts: Iterable[str], vocab_size: int) -> PiecesTokenizer:
    """A byte-level BPE of at most ``vocab_size`` pieces; 0 ends a text."""
    pieces = tokenizers.Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(_beginning(texts, _BPE_CHARACTERS), trainer)
    return PiecesTokenizer(pieces.to_str(pretty=True), _END_OF_TEXT)


def model_vocabulary(tokenizer: Tokenizer, size: int | None) -> int:
    """Ids that the model is to have: as many as asked for, or the tokenizer's.

    Raises ``DataError`` where there are too few of them.
    """
    if size is not None and size < tokenizer.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, the model only {size:,}; "
            f"give a vocab_size of at least {tokenizer.vocab_size}, or the model's own "
            "tokenizer"
        )
    return size or tokenizer.vocab_size


def unused_ids(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """A note on a model with many more ids than its tokenizer, such as on bytes."""
    if tokenizer.vocab_size > 0.9 * vocab_size:
        return []
    return [
        f"the tokenizer has only {tokenizer.vocab_size:,} of the model's "
        f"{vocab_size:,} ids: is it the one that was meant (--tokenizer)?"
    ]


def _beginning(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Texts until there are so many characters."""
    read = 0
    for text in texts:
        yield text
        read += len(text)
        if read >= characters:
            return


def _end_of_text(description: dict[str, Any], settings: Path) -> str:
    """The name of that token: as told by the file beside it, or a well-known one."""
    added = {token["content"] for token in description.get("added_tokens", ())}
    named = None
    if settings.exists():
        named = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
    wanted = (named,) if named else _ENDS_OF_TEXT
    found = next((name for name in wanted if name in added), None)
    if found is None:
        raise DataError(
            f"no end of text: none of {', '.join(wanted)} is among its added tokens; "
            f'name it in {settings.name} beside it, {{"eos_token": ...}}'
        )
    return found
