"""SIGTERM, as schedulers send it before they take the machine away."""

import signal
from typing import Any


class Stopped(Exception):
    """The run saved and stopped, as it was asked to."""

    def __init__(self, step: int):
        super().__init__(f"Stopped by SIGTERM; saved after step {step}.")


class StopRequest:
    """Within it, SIGTERM only sets ``received``."""

    def __init__(self):
        self.received = False

    def _receive(self, *_: Any) -> None:
        self.received = True

    def __enter__(self) -> "StopRequest":
        self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
