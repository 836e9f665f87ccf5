"""Files that survive a kill, what proves that they are as they were written, and
files of others, which may be anything."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LARGEST = 2**28  # Bytes of a text; the largest tokenizers are files of some 2**25.
_PART = re.compile(r"\.[0-9a-f]{32}\.part$")


class BadFile(ValueError):
    """A file is not what it should be; the message names it."""


def require_regular(path: Path) -> None:
    """Raise ``BadFile`` for a device or a pipe, which may never end, also by a link.

    Raises ``OSError`` if there is nothing or a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(path.stat().st_mode):
        raise BadFile(f"{path}: not a regular file")


def read_bytes(path: Path, largest: int = _LARGEST) -> bytes:
    """Returns the content of a regular file from elsewhere, up to a number of bytes."""
    require_regular(path)
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise BadFile(f"{path}: not what it should be: it has over {largest:,} bytes")
    return content


def read_text(path: Path, largest: int = _LARGEST) -> str:
    """Returns the text in such a file."""
    try:
        return read_bytes(path, largest).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(f"{path}: not UTF-8: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in such a file."""
    text = read_text(path)
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise BadFile(f"{path}: nested too deeply") from error
    except ValueError as error:
        raise BadFile(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadFile(f"{path}: not a JSON object")
    return found


def write(path: Path, content: str | bytes) -> None:
    """Writes all of a file or nothing, also if the machine stops.

    Several processes may write the same file: the last one's stays.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with named(path), part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, unless they exist.

    Raises ``ValueError`` if there is a file in the place of one of them.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        above = (folder, *folder.parents)
        file = next((p for p in above if p.exists() and not p.is_dir()), folder)
        raise ValueError(f"{folder}: {file} is a file, not a folder") from error


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Adds ``path`` to errors of the system that name no file, such as in writing."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def clear_unfinished(folder: Path) -> None:
    """Removes only what ``write`` leaves in ``folder`` when it is killed."""
    for part in folder.glob("*.part"):
        if _PART.search(part.name) and part.is_file():
            part.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to fill, which becomes ``folder``, or is removed after an error.

    Raises ``FileExistsError`` if ``folder`` exists already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; give another name")
    part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.part")
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def digests(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file below ``folder``, by path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with named(path), path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[str(path.relative_to(folder))] = digest
    return found
