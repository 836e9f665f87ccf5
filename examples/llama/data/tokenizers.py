"""Tokenizers: bytes, a SentencePiece model, a tokenizer.json."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from examples.llama import files
from examples.llama.data import tokenizer_files
from examples.llama.data.documents import DataError
from examples.llama.data.tokenizer_files import NOTHING, Beside, saved_file

_END_OF_TEXT = "<|endoftext|>"
_ENDS_OF_TEXT = (_END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
# Enough to learn pieces from: more text takes longer and hardly changes them.
_BPE_CHARACTERS = 50_000_000


class Tokenizer(Protocol):
    vocab_size: int
    """One more than the largest id."""
    reach: int
    """One more than the largest id that a text can get."""
    begin: tuple[int, ...]
    """Ids that every text begins with, prompts too."""
    end: tuple[int, ...]
    """Ids that every document ends with, and no prompt; the end of text among them."""
    end_of_text: int
    """Id that is known to end a text."""
    pad: int
    """Id that fills a row up; it is never a target."""
    fingerprint: str
    """Of all that decides which ids a text gets."""

    def encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """Returns the ids of each text, (length,), without those around it."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decodes ids, without those that only the model has."""
        ...

    def save(self, folder: Path) -> None:
        """Saves it as the only one there, with its files; ``load_saved`` reads it."""
        ...


class ByteTokenizer:
    """Id = value of the UTF-8 byte; 256 ends a text."""

    vocab_size = reach = 257
    end_of_text = pad = 256
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = (end_of_text,)
    fingerprint = "byte"

    def encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        for text in texts:
            yield np.frombuffer(text.encode("utf-8"), np.uint8)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Saves nothing, since it has no file."""
        tokenizer_files.clear(folder)


class SentencePieceTokenizer:
    """A SentencePiece model, as T5's and Llama's.

    The file does not say what is put before a text; the settings beside it may.
    """

    def __init__(self, model: bytes, beside: Beside = NOTHING):
        self._model, self._beside = model, beside
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self.reach = self._pieces.vocab_size()
        self.end_of_text = self._pieces.eos_id()
        if self.end_of_text < 0:
            raise DataError("the model has no end of text (eos)")
        pad = self._pieces.pad_id()
        self.pad = pad if pad >= 0 else self.end_of_text
        begins = bool(beside.settings.get("add_bos_token"))
        if begins and self._pieces.bos_id() < 0:
            raise DataError(
                f"the model has no begin of text (bos), and {tokenizer_files.SETTINGS} "
                "beside it sets add_bos_token"
            )
        self.begin = (self._pieces.bos_id(),) if begins else ()
        self.end = (self.end_of_text,)
        self.fingerprint = _fingerprint(model, self)

    def encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        for ids in self._pieces.encode(list(texts)):
            yield np.asarray(ids, np.uint32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._pieces.decode([int(i) for i in ids if i < self.vocab_size])

    def save(self, folder: Path) -> None:
        name = tokenizer_files.SENTENCEPIECE
        tokenizer_files.save(folder, name, self._model, self._beside)


class PiecesTokenizer:
    """A tokenizer.json of Hugging Face's.

    What it puts around a text is its own post-processor's rule alone, as it is for
    transformers: settings such as add_bos_token are for files that have no such rule.
    """

    def __init__(self, description: str, beside: Beside = NOTHING):
        self._description, self._beside = description, beside
        pieces = tokenizers.Tokenizer.from_str(description)
        pieces.no_truncation()
        pieces.no_padding()
        ids = pieces.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1  # Some leave ids out.
        if self.vocab_size > 2**31:
            raise DataError(f"it has ids up to {self.vocab_size - 1:,}, over 31 bits")
        added = pieces.get_added_tokens_decoder()
        self._end = _end_of_text({token.content for token in added.values()}, beside)
        self.end_of_text = self.pad = ids[self._end]
        around = _around(pieces, self._end)
        self.begin, after = around
        ends = self.end_of_text in after  # Once, also where nothing is put there.
        self.end = after if ends else (*after, self.end_of_text)
        # A text that spells out a special token gets ordinary pieces for it.
        pieces.encode_special_tokens = True
        self._pieces = pieces
        in_texts = pieces.get_vocab(with_added_tokens=False).values()
        not_special = (i for i, token in added.items() if not token.special)
        self.reach = 1 + max({*in_texts, *not_special, *self.begin, *self.end})
        if self.reach > self.vocab_size:
            raise DataError(f"it puts ids around a text that it has not: {around}")
        self.fingerprint = _fingerprint(f"{self._end}\n{description}".encode(), self)

    def encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        found = self._pieces.encode_batch_fast(list(texts), add_special_tokens=False)
        for encoding in found:
            yield np.asarray(encoding.ids, np.uint32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._pieces.decode([int(i) for i in ids])

    def save(self, folder: Path) -> None:
        beside = self._beside
        if not beside.settings:
            settings = json.dumps({"eos_token": self._end}, indent=2) + "\n"
            named = {tokenizer_files.SETTINGS: settings.encode()}
            beside = Beside({**beside.contents, **named})
        content = self._description.encode()
        tokenizer_files.save(folder, tokenizer_files.PIECES, content, beside)


def load_file(path: Path) -> Tokenizer:
    """Loads a ``.model`` or a ``tokenizer.json``, and the files beside it."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    try:
        beside = tokenizer_files.read_beside(path)
        if path.suffix == ".model":
            model = files.read_bytes(path)
            if not model:  # Which SentencePiece would take.
                raise DataError("the file is empty")
            return SentencePieceTokenizer(model, beside)
        return PiecesTokenizer(files.read_text(path), beside)
    except BaseException as error:
        # The libraries have no class of their own for it, and a panic in Rust is not
        # even an Exception. Nor are Ctrl-C and SIGTERM, which are not about the file.
        is_panic = type(error).__module__ == "pyo3_runtime"
        if not (isinstance(error, Exception) or is_panic):
            raise
        raise DataError(f"{path}: not a tokenizer that can be used: {error}") from error


def load_saved(folder: Path) -> Tokenizer:
    """Loads what ``save`` wrote there; bytes if it wrote nothing."""
    path = saved_file(folder)
    return load_file(path) if path else ByteTokenizer()


def train_bpe(texts: Iterable[str], vocab_size: int) -> PiecesTokenizer:
    """Trains a byte-level BPE of at most ``vocab_size`` pieces; 0 ends a text."""
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
    return PiecesTokenizer(pieces.to_str(pretty=True))


def model_vocabulary(tokenizer: Tokenizer, size: int | None) -> int:
    """Returns the number of ids of the model: the given one, or the tokenizer's.

    It needs none for special tokens that no text gets. Raises ``DataError`` where there
    are too few of them.
    """
    if size is not None and size < tokenizer.reach:
        raise DataError(
            f"the tokenizer has {tokenizer.reach:,} ids for texts, the model only "
            f"{size:,}; give a `data.vocab_size` of at least {tokenizer.reach} "
            "(weights to begin with have a size of their own), or the model's own "
            "`data.tokenizer`"
        )
    return size or tokenizer.vocab_size


def unused_ids(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """Returns a note about a model with many more ids than its tokenizer."""
    if tokenizer.vocab_size > 0.9 * vocab_size:
        return []
    return [
        f"the tokenizer has only {tokenizer.vocab_size:,} of the model's "
        f"{vocab_size:,} ids: is it the one that was meant (`data.tokenizer`)?"
    ]


def _beginning(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Yields texts up to a number of characters."""
    read = 0
    for text in texts:
        yield text
        read += len(text)
        if read >= characters:
            return


def _end_of_text(added: set[str], beside: Beside) -> str:
    """Returns the name of that token, from the files beside it or a well-known one."""
    named = beside.token("eos_token")
    wanted = (named,) if named else _ENDS_OF_TEXT
    found = next((name for name in wanted if name in added), None)
    if found is None:
        raise DataError(
            f"no end of text: none of {', '.join(wanted)} is among its added tokens; "
            f'name it in {tokenizer_files.SETTINGS} beside it, {{"eos_token": ...}}'
        )
    return found


def _around(
    pieces: tokenizers.Tokenizer, text: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids that the post-processor puts before and after a text.

    ``text`` is one to find out with, that gets an id at least.
    """
    whole = pieces.encode(text)
    own = [i for i, of in enumerate(whole.sequence_ids) if of is not None]
    before, after = whole.ids[: own[0]], whole.ids[own[-1] + 1 :]
    bare = pieces.encode(text, add_special_tokens=False).ids
    if [*before, *bare, *after] != whole.ids:
        raise DataError("its post-processor does more than put tokens around a text")
    return tuple(before), tuple(after)


def _fingerprint(whole: bytes, tokenizer: Tokenizer) -> str:
    """Returns a fingerprint of the tokenizer's file and of the ids around a text."""
    digest = hashlib.sha256(whole)
    around = tokenizer.begin, tokenizer.end
    if around != ((), (tokenizer.end_of_text,)):
        digest.update(f"\n{around}".encode())
    return digest.hexdigest()
