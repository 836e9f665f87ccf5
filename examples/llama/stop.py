"""SIGTERM, as schedulers send it before they take the machine away."""

import signal
from typing import Any

import jax
from jax.experimental import multihost_utils


class Stopped(Exception):
    """The run saved and stopped, as it was asked to."""

    def __init__(self, step: int):
        super().__init__(f"Stopped by SIGTERM; saved after step {step}.")


class StopRequest:
    """Within it, SIGTERM only makes ``received`` true."""

    def __init__(self):
        self._received = False

    def received(self, step: int) -> bool:
        """Of several processes, all hear of it at the same step."""
        if jax.process_count() > 1:
            # JAX's own runtime has caught the signal, on whatever host it came.
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def _receive(self, *_: Any) -> None:
        self._received = True

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)
