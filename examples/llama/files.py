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
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """With those that it is in; nothing where it is there.

    Raises ``ValueError`` where a file is in its place, or in that of one of those.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        above = (folder, *folder.parents)
        file = next((p for p in above if p.exists() and not p.is_dir()), folder)
        raise ValueError(f"{folder}: {file} is a file, not a folder") from error


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
