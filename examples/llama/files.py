"""Files that survive a kill, and what proves that they are as they were written."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """All of it or nothing, also when the machine stops.

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


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of the system name ``path``, also those of writing, which name no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def clear_unfinished(folder: Path) -> None:
    """Remove what ``write`` and ``new_folder`` leave in ``folder`` when killed."""
    for part in folder.glob("*.part"):
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``folder`` when all is well, and else is removed.

    Raises ``FileExistsError`` where ``folder`` is there already.
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
    """SHA-256 by path below ``folder``, of every file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[str(path.relative_to(folder))] = digest
    return found
