"""A cache of tokens in files, which are mapped into memory.

A folder of the cache holds the tokens of one split of one text:

    ids.bin       the token ids of all documents, an end of text after each
    ends.bin      where each document ends in it, int64
    meta.json     how many there are, and which lines were left out
    digests.json  of these three files, SHA-256

Its name is a hash of the text, the tokenizer and what else decides the tokens, and its
digests are checked whenever it is opened, a second for every 2 GB or so: one that is
read is right. It gets that name when it is whole; a writer that is killed leaves a
folder under another name, which is never read. Several processes or hosts may write
the same one at once: the first to finish names it, the others find the same content
there.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.llama import files
from examples.llama.data.documents import (
    SKIPPING,
    BadLines,
    DataError,
    Document,
    Source,
    Split,
)
from examples.llama.data.progress import TokenisingProgress
from examples.llama.data.tokenizers import Tokenizer

_FORMAT = 2
_CHARACTERS_AT_ONCE = 1_000_000  # Handed to the tokenizer: enough for all cores.
_SECONDS_TO_ABANDON = 3600  # A folder that nothing is written to for so long.
_BYTES_AT_ONCE = 2**24  # Read to be checked; a multiple of all numbers' size.
_IDS, _ENDS, _META = _HASHED = "ids.bin", "ends.bin", "meta.json"
_DIGESTS = "digests.json"


@dataclasses.dataclass(frozen=True)
class Limit:
    """Reading stops with the document that brings the count to ``tokens``.

    A document counts its tokens without its end, but at most ``per_document``.
    """

    tokens: int | None = None
    per_document: int | None = None


class MappedArray:
    """A flat array in a file, (length,); sent to another process it is opened there."""

    def __init__(self, path: Path, dtype: str):
        self._path, self._dtype = path, dtype
        self._array = np.memmap(path, dtype, mode="r")

    def __reduce__(self):
        return MappedArray, (self._path, self._dtype)

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index):
        return self._array[index]


class Tokens(NamedTuple):
    """The documents of one split."""

    ids: MappedArray  # (tokens,) uint16 or uint32
    ends: MappedArray  # (documents,) int64
    bad_lines: int  # Left out.
    first_bad_lines: list[str]


def key_of(source: Source, split: Split, tokenizer: Tokenizer, limit: Limit) -> str:
    parts = [
        _FORMAT,
        source.fingerprint(split),
        tokenizer.fingerprint,
        dataclasses.astuple(limit),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def tokenise(
    source: Source,
    split: Split,
    tokenizer: Tokenizer,
    limit: Limit,
    cache: Path,
    progress: TokenisingProgress,
    skip_bad_lines: bool = False,
) -> Tokens:
    """Returns tokens from ``cache``; writes them first if they are not there."""
    folder = cache / key_of(source, split, tokenizer, limit)[:32]
    if not folder.exists():
        bad = BadLines(skip_bad_lines)
        documents = source.documents(split, bad)
        with _unfinished(folder) as part:
            with progress:
                _write(part, documents, tokenizer, limit, progress, bad)
            if not (part / _ENDS).stat().st_size:
                raise DataError(f"{source.name}: the {split} shards hold no text")
    tokens = _open(folder, tokenizer)
    if tokens.bad_lines and not skip_bad_lines:  # Written by a run that skips them.
        raise DataError(f"{tokens.first_bad_lines[0]}; {SKIPPING}")
    return tokens


@contextlib.contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """Yields a folder to fill, which then gets the name ``folder``."""
    for abandoned in folder.parent.glob(f"{folder.name}.*.part"):
        # Another process removes it too, or it is a file, of someone else's.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            newest = max(p.stat().st_mtime for p in (abandoned, *abandoned.iterdir()))
            if time.time() - newest > _SECONDS_TO_ABANDON:
                shutil.rmtree(abandoned, ignore_errors=True)
    part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.part")
    files.make_folder(part)
    try:
        yield part
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another process was quicker, with the same content.
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(
    part: Path,
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    limit: Limit,
    progress: TokenisingProgress,
    bad: BadLines,
) -> None:
    """Writes all files, and waits until they are safe on disk."""
    dtype = _dtype(tokenizer)
    ids_file, ends_file = part / _IDS, part / _ENDS
    ids_file.touch()
    ends_file.touch()
    number = length = 0
    for streams, done in _groups_of_ids(documents, tokenizer, limit):
        ends = length + np.cumsum([len(stream) for stream in streams])
        ids = np.concatenate(streams)
        _check_ids(ids, tokenizer)
        _append(ids_file, ids.astype(dtype))
        _append(ends_file, ends.astype("<i8"))
        number, length = number + len(streams), int(ends[-1])
        progress.update(done, number, length)
    for path in (ids_file, ends_file):
        with files.named(path), path.open("rb") as file:
            os.fsync(file.fileno())
    meta = {
        "documents": number,
        "tokens": length,
        "dtype": dtype.str,
        "bad_lines": bad.count,
        "first_bad_lines": bad.first,
    }
    files.write(part / _META, json.dumps(meta, indent=2))
    files.write(part / _DIGESTS, json.dumps(files.digests(part), indent=2))


def with_ends(texts: list[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yields the ids of each text, (length,), with those that begin and end it."""
    begin, end = (np.asarray(x, np.uint32) for x in (tokenizer.begin, tokenizer.end))
    for ids in tokenizer.encode(texts):
        yield np.concatenate([begin, ids.astype(np.uint32), end])


def _groups_of_ids(
    documents: Iterable[Document], tokenizer: Tokenizer, limit: Limit
) -> Iterator[tuple[list[np.ndarray], float | None]]:
    """Yields ids of some documents, each with its end, and the share done so far."""
    counted, documents = 0, iter(documents)
    # A token is seldom less than a character, so hardly a document too many is read.
    while group := _group(documents, (limit.tokens or sys.maxsize) - counted):
        streams = []
        for stream in with_ends([document.text for document in group], tokenizer):
            streams.append(stream)
            counted += min(len(stream) - 1, limit.per_document or len(stream))
            if limit.tokens is not None and counted >= limit.tokens:
                yield streams, 1.0
                return
        yield streams, counted / limit.tokens if limit.tokens else group[-1].read


def _group(documents: Iterator[Document], characters: int) -> list[Document]:
    """Returns the next documents, up to a number of characters."""
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= min(characters, _CHARACTERS_AT_ONCE):
            break
    return group


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def _check_ids(ids: np.ndarray, tokenizer: Tokenizer) -> None:
    """Checks ids against the vocabulary; others have no embedding, and a NaN loss."""
    largest, count = int(ids.max()), tokenizer.reach
    if largest >= count:
        raise DataError(f"the id {largest}, where texts get {count} ids alone")


def _append(path: Path, numbers: np.ndarray) -> None:
    with files.named(path), path.open("ab") as file:
        file.write(numbers.tobytes())


def _open(folder: Path, tokenizer: Tokenizer) -> Tokens:
    """Opens a folder; ``DataError`` if it is not what this tokenizer wrote."""
    try:
        return _checked(folder, tokenizer)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{folder}: damaged: {error}; remove the folder, and the text is tokenised "
            "again"
        ) from error


def _checked(folder: Path, tokenizer: Tokenizer) -> Tokens:
    dtype, digests = _dtype(tokenizer), {name: hashlib.sha256() for name in _HASHED}
    for ids in _blocks(folder / _IDS, dtype, digests[_IDS]):
        _check_ids(ids, tokenizer)
    length = 0
    for ends in _blocks(folder / _ENDS, np.dtype("<i8"), digests[_ENDS]):
        if np.diff(ends, prepend=length).min() <= 0:
            raise ValueError(f"{_ENDS}: a document ends before it begins")
        length = int(ends[-1])
    content = (folder / _META).read_bytes()
    digests[_META].update(content)
    found = {name: digest.hexdigest() for name, digest in digests.items()}
    if json.loads((folder / _DIGESTS).read_bytes()) != found:
        raise ValueError("its files are not what was written")
    meta = json.loads(content)
    ids = MappedArray(folder / _IDS, dtype.str)
    ends = MappedArray(folder / _ENDS, "<i8")
    if (len(ids), len(ends), length) != (meta["tokens"], meta["documents"], len(ids)):
        raise ValueError("its files are not of the same text")
    return Tokens(ids, ends, meta["bad_lines"], meta["first_bad_lines"])


def _blocks(path: Path, dtype: np.dtype, digest: Any) -> Iterator[np.ndarray]:
    """Yields the numbers in a file in blocks, and updates ``digest`` with them."""
    with files.named(path), path.open("rb") as file:
        while block := file.read(_BYTES_AT_ONCE):
            digest.update(block)
            yield np.frombuffer(block, dtype)
