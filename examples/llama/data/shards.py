"""Text in files laid out as C4 is: gzip, one JSON object with a "text" per line."""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from examples.llama import files
from examples.llama.data.documents import (
    BadLine,
    BadLines,
    DataError,
    Document,
    Split,
    text_of,
)


class Shards:
    """``*train*.json.gz`` and ``*validation*.json.gz`` in ``folder``.

    One of the two is enough for whoever reads that alone.
    The digest of each file is remembered in the folder ``memory``.
    """

    def __init__(self, folder: Path, memory: Path):
        if not folder.is_dir():
            what = "a file, not a folder" if folder.is_file() else "no such folder"
            raise DataError(f"{folder}: {what}")
        self._folder, self._memory = folder, memory
        self.name = str(folder)

    def fingerprint(self, split: Split) -> str:
        """Of the files' bytes, whatever their names."""
        paths = _complete(self._folder, split)
        digests = [digest_of(path, self._memory) for path in paths]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def documents(self, split: Split, bad: BadLines) -> Iterator[Document]:
        paths = _complete(self._folder, split)
        before, total = 0, sum(path.stat().st_size for path in paths)
        for path in paths:
            for line in _lines(path):
                try:
                    text = _parse(line.content)
                except BadLine as why:
                    bad.add(f"{path}, line {line.number}", why)
                else:
                    yield Document(text, (before + line.read) / total)
            before += path.stat().st_size


def digest_of(path: Path, memory: Path) -> str:
    """SHA-256 of a file, computed again only if its size or its time has changed.

    All of C4 takes minutes to read, at every start of a run otherwise.
    """
    stat = path.stat()
    known_by = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    note = memory / f"{hashlib.sha256(known_by.encode()).hexdigest()[:32]}.sha256"
    if note.exists():
        return note.read_text()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    files.make_folder(memory)
    files.write(note, digest)
    return digest


class _Line(NamedTuple):
    number: int
    content: bytes
    read: int  # Bytes of the file, compressed as they are.


def _complete(folder: Path, split: Split) -> list[Path]:
    """The shards in order. The last ones may be missing, but none in between."""
    paths = sorted(folder.glob(f"*{split}*.json.gz"))
    if not paths:
        raise DataError(f"{folder}: no *{split}*.json.gz shard there")
    numbered = [re.search(r"(\d{5})-of-\d{5}", path.name) for path in paths]
    if all(numbered):
        for number, (path, match) in enumerate(zip(paths, numbered, strict=True)):
            assert match is not None
            if int(match[1]) != number:
                missing = path.name.replace(match[1], f"{number:05}", 1)
                raise DataError(
                    f"{folder / missing}: missing, though {path.name} is there"
                )
    return paths


def _lines(path: Path) -> Iterator[_Line]:
    """All but the blank ones.

    A file that ends early has lost an unknown part of the text: that is an error
    whether or not bad lines are skipped.
    """
    number = 0
    try:
        with path.open("rb") as file, gzip.open(file) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _Line(number, line, file.tell())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        where = f"{path}, line {number + 1}"
        raise DataError(
            f"{where}: broken gzip file: {error}; fetch the file again"
        ) from error


def _parse(line: bytes) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8: {error}") from error
    except ValueError as error:
        raise BadLine(f"not JSON: {error}") from error
    return text_of(record)
