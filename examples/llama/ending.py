"""How a command ends: its exit codes, and an end at once from any thread."""

import contextlib
import enum
import os
import signal
import threading
from collections.abc import Callable
from typing import Any, NoReturn


class Code(enum.IntEnum):
    """Exit codes; those between 64 and 78 are as in sysexits.h."""

    DONE = 0
    REFUSED = 1  # bad data, or not this run's
    BAD_SETTINGS = 2  # as for options that do not exist
    PEER_GONE = 68  # EX_NOHOST
    IN_USE = 69  # EX_UNAVAILABLE
    UNFORESEEN = 70  # EX_SOFTWARE
    OUT_OF_MEMORY = 71  # EX_OSERR
    IO_FAILED = 74  # EX_IOERR
    TIME_IS_UP = 75  # EX_TEMPFAIL
    DIVERGED = 76  # EX_PROTOCOL: the next free one
    # 128 + the signal's number, as a shell reports it.
    INTERRUPTED = 130
    OUTPUT_CLOSED = 141
    TERMINATED = 143


def again_if_dropped(hook: Callable[[Any], object], dropped: Any) -> None:
    """A `sys.unraisablehook` that sends a signal again if Python dropped it.

    Python drops exceptions in finalizers and in callbacks of the garbage collector, and
    JAX has both. Other exceptions go to ``hook``.
    """
    signum = getattr(dropped.exc_type, "signum", None)  # `stop.Terminated`
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        signum = signal.SIGINT
    if signum is None:
        hook(dropped)
        return
    again = threading.Timer(0.01, os.kill, (os.getpid(), signum))
    again.daemon = True
    again.start()


_to_do: list[Callable[[], object]] = []


def before_end(work: Callable[[], object]) -> None:
    """Registers work that `end_now` does first, without the main thread."""
    _to_do.append(work)


def forget(work: Callable[[], object]) -> None:
    """Removes work that is done or no longer needed."""
    with contextlib.suppress(ValueError):
        _to_do.remove(work)


def end_now(message: str, code: int) -> NoReturn:
    """Ends the process from any thread, with ``message`` on the terminal.

    The main thread may be in a computation with a process that is gone. No exception
    reaches it there, and all that JAX does at a regular end would wait in the same way.
    """
    for work in tuple(_to_do):
        with contextlib.suppress(Exception):
            work()
    # Past Python's files, which the main thread may have locked.
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h\n")  # A progress bar has hidden the cursor.
        os.write(2, f"error: {message}\n".encode(errors="replace"))
    os._exit(code)
