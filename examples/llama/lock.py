"""The lock of a workdir: one job at a time works on a run.

The lock is a folder, ``lock``, with a file about the process that holds it. It is
filled under another name and then renamed, so it is there as a whole or not at all, and
of several processes that rename to one name, one succeeds.

A lock that a dead process has left is not removed: of two processes that find it, the
slower one might remove the lock of the quicker one. The next holder's folder stands
beside it, named after the dead one's id, and only one can get that name. Thus the locks
are a chain, from ``lock`` on, and whoever is last holds the lock. It removes the chain
at its end, the beginning first.
"""

import contextlib
import errno
import json
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import NamedTuple

from examples.llama import files, hosts
from examples.llama.ending import Code, before_end, end_now, forget

_NAME, _HOLDER = "lock", "holder.json"
_SECONDS_BETWEEN_SIGNS = 10
_SECONDS_TO_LIVE = 120
"""Without a sign, elsewhere; a shared file system may show one a minute late."""
_ATTEMPTS = 100


class WorkdirInUse(ValueError):
    """Another process works on the run; the message names it."""


class Holder(NamedTuple):
    """A process."""

    id: str
    host: str
    machine: str  # Where its process id means something; host names may be shared.
    pid: int
    started: str  # Tells it from a later process with the same id.
    since: str  # For people.


class Link(NamedTuple):
    """One link of the chain."""

    folder: Path
    holder: Holder
    signed: float  # When it gave its last sign, by the clock of the file system.


class Lock:
    """A context in which this process, the first of its job, owns ``workdir``.

    Raises ``WorkdirInUse`` if another process owns it. One of the same machine counts
    as long as it runs, one elsewhere as long as it gives signs of life.
    """

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._me = _this_process()
        self._over = threading.Event()

    def __enter__(self) -> "Lock":
        hosts.on_first(self._take)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if hosts.is_first():
            forget(self._release)
            # A lock that is left here counts as a dead process's, and is ignored.
            with contextlib.suppress(OSError, ValueError):
                self._release()

    def _take(self) -> None:
        files.make_folder(self._workdir)
        part = self._workdir / f"{_NAME}.{self._me.id}.part"
        part.mkdir()
        try:
            files.write(part / _HOLDER, json.dumps(self._me._asdict(), indent=2) + "\n")
            self._take_as(part)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        before_end(self._release)
        threading.Thread(target=self._give_signs, daemon=True).start()

    def _take_as(self, part: Path) -> None:
        """Renames ``part`` to the end of the chain, unless a process holds that."""
        place, now = part, (part / _HOLDER).stat().st_mtime
        for _ in range(_ATTEMPTS):
            chain = _chain(self._workdir)
            if chain:
                self.require_gone(chain[-1], now)
            place = _next(self._workdir, chain)
            if not _renamed(part, place):
                continue  # Another process was quicker.
            if self._is_holder(_chain(self._workdir)):
                return
            place.rename(part)  # The chain that it was to end is removed meanwhile.
        raise ValueError(
            f"{place} is not a lock as it should be: remove it if no run is at work on "
            f"{self._workdir}"
        )

    def _is_holder(self, chain: list[Link]) -> bool:
        return bool(chain) and chain[-1].holder.id == self._me.id

    def require_gone(self, link: Link, now: float) -> None:
        """Raise ``WorkdirInUse`` unless the process that holds ``link`` is dead.

        ``now`` is by the clock of the file system, which all machines share.
        """
        there, here, more = link.holder, self._me, ""
        if (there.host, there.machine) == (here.host, here.machine):
            process = _look_up(there.pid)
            is_later = process.started and process.started != there.started
            if is_later or not process.runs:
                return
        else:
            silent = max(now - link.signed, 0)
            if silent > _SECONDS_TO_LIVE:
                return
            more = (
                f" Its last sign of life is {silent:.0f} s old; after "
                f"{_SECONDS_TO_LIVE} s without one it no longer counts."
            )
        raise WorkdirInUse(
            f"{self._workdir} is in use by process {there.pid} on {there.host}, since "
            f"{there.since}.{more} Wait until it ends, or give another `workdir`."
        )

    def _give_signs(self) -> None:
        while not self._over.wait(_SECONDS_BETWEEN_SIGNS):
            with contextlib.suppress(OSError, ValueError):  # It may pass.
                self._give_sign()

    def _give_sign(self) -> None:
        chain = _chain(self._workdir)
        if self._is_holder(chain):
            os.utime(chain[-1].folder / _HOLDER)
        elif chain and not self._over.is_set():  # Taken for dead, as after a sleep.
            other = chain[-1].holder
            end_now(
                f"process {other.pid} on {other.host} has taken over {self._workdir}, "
                "since this one gave no sign of life",
                Code.IN_USE,
            )

    def _release(self) -> None:
        chain = _chain(self._workdir)
        if self._is_holder(chain):
            for link in chain:
                shutil.rmtree(link.folder, ignore_errors=True)


def require_free(workdir: Path) -> None:
    """Raises ``WorkdirInUse`` as ``Lock`` does, on all processes before they connect.

    Otherwise processes of two jobs might connect to each other, which ends both.
    """
    chain = _chain(workdir)
    if chain:
        with tempfile.NamedTemporaryFile(dir=workdir) as file:
            now = os.fstat(file.fileno()).st_mtime
        Lock(workdir).require_gone(chain[-1], now)


def _chain(workdir: Path) -> list[Link]:
    """Returns the chain up to the holder of the lock; empty without a holder."""
    chain: list[Link] = []
    while link := _read(_next(workdir, chain)):
        if link.holder.id in [before.holder.id for before in chain]:
            raise _damaged(link.folder, "the chain of locks has no end")
        chain.append(link)
    return chain


def _next(workdir: Path, chain: list[Link]) -> Path:
    """Returns the folder of the next link of the chain."""
    return workdir / (f"{_NAME}.{chain[-1].holder.id}" if chain else _NAME)


def _read(folder: Path) -> Link | None:
    path = folder / _HOLDER
    try:
        holder, signed = Holder(**files.read_json(path)), path.stat().st_mtime
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        if not folder.exists():  # The workdir is none, as `files.make_folder` tells.
            return None
        raise _damaged(folder, "a file, not a folder") from error
    except (ValueError, TypeError, IsADirectoryError) as error:
        why = str(error).removeprefix(f"{path}: ")
        raise _damaged(folder, why) from error
    *texts, pid = (*holder._replace(pid=""), holder.pid)
    if not (type(pid) is int and 0 < pid < 2**31):
        raise _damaged(folder, f"pid is {pid!r}")
    if not all(isinstance(text, str) for text in texts):
        raise _damaged(folder, "a value is no text")
    return Link(folder, holder, signed)


def _damaged(folder: Path, why: str) -> ValueError:
    return ValueError(
        f"{folder / _HOLDER} is damaged: {why}; remove {folder} if no run is at work "
        "there"
    )


def _renamed(part: Path, place: Path) -> bool:
    try:
        part.rename(place)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    return True


def _this_process() -> Holder:
    return Holder(
        id=uuid.uuid4().hex,
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_look_up(os.getpid()).started,
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def _machine() -> str:
    """Identifies the boot and the space of process ids; empty except on Linux."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


class Process(NamedTuple):
    runs: bool
    started: str = ""  # In ticks since the boot; empty where that is not told.


def _look_up(pid: int) -> Process:
    """Looks up a process of this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return Process(runs=False)
    except PermissionError:
        pass  # Another user's.
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return Process(runs=True)
    state, *fields = stat.rpartition(b")")[2].split()  # What is before holds its name.
    return Process(runs=state not in b"ZX", started=fields[18].decode())
