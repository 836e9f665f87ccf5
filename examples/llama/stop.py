"""Reasons to save and stop early: SIGTERM, or the time limit.

Several processes learn of it by JAX's preemption service. A single one has none: it
needs `jax.distributed`.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from examples.llama import hosts


class Stopped(Exception):
    """The run saved and stopped because it was told to.

    Attributes:
      in_time: Whether it was for the time limit, not a signal from outside.
    """

    def __init__(self, step: int, in_time: bool):
        why = "at its time limit" if in_time else "by SIGTERM"
        super().__init__(f"Stopped {why}; saved after step {step}.")
        self.in_time = in_time


class Terminated(BaseException):
    """SIGTERM came when there was nothing to save; like Ctrl-C, not an `Exception`."""

    signum = signal.SIGTERM

    def __init__(self) -> None:
        super().__init__("Stopped by SIGTERM.")


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """A context in which SIGTERM raises ``Terminated``, except in a `StopRequest`.

    By default it would end the process silently, and leave the run's lock.
    """

    def receive(*_: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopRequest:
    """A context in which SIGTERM or the time limit only make ``received`` true.

    A scheduler sends SIGTERM before it takes the machine away. At the time limit, the
    first of several processes sends it to itself: so there is one way for all hosts to
    hear of it.

    Args:
      start: Steps that the run has done already.
      seconds: The time limit, from now; None: there is none.

    Attributes:
      in_time: Whether the limit is what has been reached; the first process knows.
    """

    def __init__(self, start: int, seconds: float | None):
        self._start = start
        self._received = False
        self.in_time = False
        self._timer = None
        if seconds is not None and hosts.is_first():
            seconds = min(max(seconds, 0), threading.TIMEOUT_MAX)
            self._timer = threading.Timer(seconds, self._time_is_up)
            self._timer.daemon = True

    def received(self, step: int) -> bool:
        """Whether to stop; several processes learn of it at the same step."""
        if jax.process_count() > 1 and not self._received:
            # JAX's own runtime has caught the signal, on whatever host it came.
            self._received = multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def _time_is_up(self) -> None:
        self.in_time = True
        if jax.process_count() == 1:
            self._received = True
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def _receive(self, *_: Any) -> None:
        self._received = True

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._receive)
        else:
            # The runtime names the step after the last one that any host asked about,
            # though the run may be far beyond it: so ask about all that are done.
            any(self.received(step) for step in range(1, self._start + 1))
        if self._timer:
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer:
            self._timer.cancel()
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)
