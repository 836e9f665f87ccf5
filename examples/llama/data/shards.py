"""Text in files laid out as C4 is: gzip, one JSON object with a "text" per line."""

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

from examples.llama import files
from examples.llama.data.documents import (
    BadLine,
    BadLines,
    DataError,
    Document,
    Split,
    text_of,
)

_NUMBER = re.compile(r"(\d{5,})-of-(\d{5,})")
# How browsers and file managers name a copy of a file.
_COPY = re.compile(
    r"(?:Copy of )?(.+?)(?: ?\(\d+\)| copy(?: \d+)?| - Copy(?: \(\d+\))?)?\.json\.gz"
)


class Shards:
    """The ``*.json.gz`` in ``folder``; each is named ``train`` or ``validation``.

    A reader of one split needs only that split.
    The digest of each file is remembered in the folder ``memory``.
    """

    def __init__(self, folder: Path, memory: Path):
        if not folder.is_dir():
            what = "a file, not a folder" if folder.is_file() else "no such folder"
            raise DataError(f"{folder}: {what}")
        self._folder, self._memory = folder, memory
        self.name = str(folder)

    def fingerprint(self, split: Split) -> str:
        """Returns a fingerprint of the files' bytes, whatever their names."""
        paths = _complete(self._folder, split)
        digests = [digest_of(path, self._memory) for path in paths]
        self._check_apart(dict(zip(digests, paths, strict=True)), split)
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def _check_apart(self, paths: Mapping[str, Path], split: Split) -> None:
        """Raises ``DataError`` for a file that is, by digest, in the other split too.

        Whoever reads one split alone must not wait for all of the other to be hashed:
        so only files of equal size are.
        """
        sizes = {path.stat().st_size for path in paths.values()}
        for other in _shards(self._folder):
            if not other.is_file() or _split_of(other) == split:
                continue
            is_alike = other.stat().st_size in sizes
            if is_alike and (twin := paths.get(digest_of(other, self._memory))):
                raise DataError(
                    f"{twin}: the same file as {other.name}, but held-out text must "
                    "not be trained on; remove one of them"
                )

    def documents(self, split: Split, bad: BadLines) -> Iterator[Document]:
        """Yields documents; a shard without any is an error, since its text is lost."""
        paths = _complete(self._folder, split)
        before, total = 0, sum(path.stat().st_size for path in paths)
        for path in paths:
            documents, last_why = 0, "its lines are all blank"
            for line in _lines(path):
                try:
                    text = _parse(line.content)
                except BadLine as why:
                    bad.add(f"{path}, line {line.number}", why)
                    last_why = f"its lines are all bad (line {line.number}: {why})"
                else:
                    documents += 1
                    yield Document(text, (before + line.read) / total)
            if not documents:
                raise DataError(
                    f"{path}: no document in it, {last_why}; fetch the file again"
                )
            before += path.stat().st_size


def digest_of(path: Path, memory: Path) -> str:
    """Returns the SHA-256 of a file, computed again only if size or time changed.

    Otherwise every start of a run would take minutes to read all of C4.
    """
    stat = path.stat()
    known_by = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    name = hashlib.sha256(os.fsencode(known_by)).hexdigest()[:32]
    note = memory / f"{name}.sha256"
    if (remembered := _remembered(note)) is not None:
        return remembered
    with files.named(path), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    files.make_folder(memory)
    files.write(note, digest)
    return digest


def _remembered(note: Path) -> str | None:
    """Returns the noted digest; None if there is none or it is invalid."""
    try:
        content = note.read_bytes()
    except FileNotFoundError:
        return None
    return content.decode() if re.fullmatch(rb"[0-9a-f]{64}", content) else None


class _Line(NamedTuple):
    number: int
    content: bytes
    read: int  # Bytes of the file, compressed as they are.


def _complete(folder: Path, split: Split) -> list[Path]:
    """Returns the shards in order. The last may be missing, but none in between."""
    paths = [path for path in _shards(folder) if _split_of(path) == split]
    if not paths:
        raise DataError(f"{folder}: no *{split}*.json.gz shard there")
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: not a regular file; a shard is one")
        if not path.stat().st_size:
            raise DataError(
                f"{path}: an empty file, so a gzip file that ends early; fetch it again"
            )
    _check_numbers(paths)
    return paths


def _shards(folder: Path) -> list[Path]:
    """Returns the shards in order, without hidden files and copies of another one."""
    names = {path.name for path in folder.glob("*.json.gz")}
    shards = []
    for name in sorted(name for name in names if not name.startswith(".")):
        match = _COPY.fullmatch(name)
        original = f"{match[1]}.json.gz" if match else name
        if original == name:
            shards.append(folder / name)
        elif original not in names:
            raise DataError(
                f"{folder / name}: by its name a copy of {original}, which is not "
                "there; rename it, or remove it"
            )
    return shards


def _split_of(path: Path) -> Split:
    """Returns the split by a word in the name; "pretrain" is not "train"."""
    words = set(re.split(r"[\W\d_]+", path.name.lower()))
    told: list[Split] = [split for split in get_args(Split) if split in words]
    if len(told) != 1:
        has = "both train and validation" if told else "neither train nor validation"
        raise DataError(
            f"{path}: its split cannot be told, for its name has {has} as a word; "
            "rename the file, or move it out of the folder"
        )
    return told[0]


def _check_numbers(paths: Sequence[Path]) -> None:
    """Checks numbers in names: each occurs once, with one total and no gaps."""
    numbered = [(path, match) for path in paths if (match := _NUMBER.search(path.name))]
    by_number = dict[int, Path]()
    for path, match in numbered:
        first, other = numbered[0]
        if match[2] != other[2]:
            raise DataError(
                f"{path}: one of {match[2]} shards, but {first.name} is one of "
                f"{other[2]}; keep those of one data set"
            )
        if int(match[1]) >= int(match[2]):
            raise DataError(f"{path}: numbers go from 00000 to one less than the total")
        twice = by_number.setdefault(int(match[1]), path)
        if twice != path:
            raise DataError(f"{path}: {twice.name} has the same number; keep one")
    for expected, number in enumerate(sorted(by_number)):
        if number != expected:
            there = by_number[number]
            missing = _NUMBER.sub(rf"{expected:05}-of-\2", there.name, count=1)
            raise DataError(
                f"{there.with_name(missing)}: missing, though {there.name} is there"
            )


def _lines(path: Path) -> Iterator[_Line]:
    """Yields all lines except blank ones.

    A file that ends early has lost an unknown part of the text: that is an error
    whether or not bad lines are skipped.
    """
    number = 0
    with files.named(path):
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
        except MemoryError as error:
            where = f"{path}, line {number + 1}"
            raise DataError(f"{where}: too much for the memory there is") from error


def _parse(line: bytes) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8: {error}") from error
    except ValueError as error:  # Also a number with too many digits.
        raise BadLine(f"not JSON: {error}") from error
    except RecursionError as error:
        raise BadLine("not JSON that can be read: nested too deeply") from error
    except MemoryError as error:
        raise BadLine("too much for the memory there is") from error
    return text_of(record)
