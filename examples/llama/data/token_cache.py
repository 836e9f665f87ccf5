"""Text tokenised once, into files that are mapped into memory.

A folder of the cache holds the tokens of one split of one text:

    ids.bin    the token ids of all documents, an end of text after each
    ends.bin   where each document ends in it, int64
    meta.json  how many there are, and which lines were left out

Its name is a hash of the text, the tokenizer and what else decides the tokens, so one
that is there is always right. It gets that name when it is whole; a writer that is
killed leaves a folder under another name, which is never read. Several processes or
hosts may write the same one at once: the first to finish names it, the others find the
same content there.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.llama import files
from examples.llama.data.documents import (
    BadLines,
    DataError,
    Document,
    Source,
    Split,
)
from examples.llama.data.progress import TokenisingProgress
from examples.llama.data.tokenizers import Tokenizer

_FORMAT = 1
_CHARACTERS_AT_ONCE = 1_000_000  # Handed to the tokenizer: enough for all cores.
_SECONDS_TO_ABANDON = 3600  # A folder that nothing is written to for so long.


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
    """From ``cache``, where it is put first if it is not there."""
    folder = cache / key_of(source, split, tokenizer, limit)[:32]
    if not folder.is_dir():
        bad = BadLines(skip_bad_lines)
        documents = source.documents(split, bad)
        with _unfinished(folder) as part:
            with progress:
                _write(part, documents, tokenizer, limit, progress, bad)
            if not (part / "ends.bin").stat().st_size:
                raise DataError(f"{source.name}: the {split} shards hold no text")
    tokens = _open(folder)
    if tokens.bad_lines and not skip_bad_lines:  # Written by a run that skips them.
        raise DataError(
            f"{tokens.first_bad_lines[0]}; --skip-bad-lines leaves such lines out"
        )
    return tokens


@contextlib.contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A folder to fill, which then gets the name ``folder``."""
    for abandoned in folder.parent.glob(f"{folder.name}.*.part"):
        with contextlib.suppress(FileNotFoundError):  # Another process removes it too.
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
    """All files, safe on disk."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    number = length = 0
    with (
        (part / "ids.bin").open("wb") as ids_file,
        (part / "ends.bin").open("wb") as ends_file,
    ):
        for streams, done in _groups_of_ids(documents, tokenizer, limit):
            ends = length + np.cumsum([len(stream) for stream in streams])
            ids_file.write(np.concatenate(streams).astype(dtype).tobytes())
            ends_file.write(ends.astype("<i8").tobytes())
            number, length = number + len(streams), int(ends[-1])
            progress.update(done, number, length)
        for file in (ids_file, ends_file):
            file.flush()
            os.fsync(file.fileno())
    meta = {
        "documents": number,
        "tokens": length,
        "dtype": dtype.str,
        "bad_lines": bad.count,
        "first_bad_lines": bad.first,
    }
    with (part / "meta.json").open("w") as file:
        json.dump(meta, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def with_ends(texts: list[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Ids of each text, (length,) integers, and its end of text."""
    for ids in tokenizer.encode(texts):
        yield np.append(ids.astype(np.uint32), np.uint32(tokenizer.end_of_text))


def _groups_of_ids(
    documents: Iterable[Document], tokenizer: Tokenizer, limit: Limit
) -> Iterator[tuple[list[np.ndarray], float | None]]:
    """Ids of some documents, each with its end, and the part that is done by then."""
    counted = 0
    for group in _groups(documents):
        streams = []
        for stream in with_ends([document.text for document in group], tokenizer):
            streams.append(stream)
            counted += min(len(stream) - 1, limit.per_document or len(stream))
            if limit.tokens is not None and counted >= limit.tokens:
                yield streams, 1.0
                return
        yield streams, counted / limit.tokens if limit.tokens else group[-1].read


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Not empty, of about ``_CHARACTERS_AT_ONCE``."""
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= _CHARACTERS_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _open(folder: Path) -> Tokens:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        ids = MappedArray(folder / "ids.bin", meta["dtype"])
        ends = MappedArray(folder / "ends.bin", "<i8")
        if (len(ids), len(ends)) != (meta["tokens"], meta["documents"]):
            raise ValueError("a file is not as long as it was")
        return Tokens(ids, ends, meta["bad_lines"], meta["first_bad_lines"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: damaged: {error}; remove the folder, and the text is tokenised "
            "again"
        ) from error
