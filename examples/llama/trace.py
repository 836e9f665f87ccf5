"""Profiles chosen steps."""

from pathlib import Path
from typing import Any

import jax

from examples.llama.config import parse_steps


class Trace:
    """A context that writes a trace of `steps` ("10:13") below `folder`.

    XProf, TensorBoard's profile plugin and Perfetto read it. No `steps`, no trace.
    """

    def __init__(self, steps: str | None, folder: Path):
        self._steps = parse_steps(steps) if steps else range(0)
        self._folder = folder
        self._running = False

    def before(self, step: int, state: Any) -> None:
        """Call this before each step; waits for `state` if the trace begins or ends."""
        if self._running != (step in self._steps):
            jax.block_until_ready(state)
            self._switch()

    def _switch(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
        else:
            jax.profiler.start_trace(str(self._folder))
        self._running = not self._running

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._switch()
