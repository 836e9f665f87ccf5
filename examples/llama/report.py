"""Writes metrics to log and display without making the device wait."""

import time
from collections import deque
from typing import Any, NamedTuple

import jax

from examples.llama.divergence import check_record
from examples.llama.metrics import MetricsLog, Record, perplexity
from examples.llama.progress import ProgressDisplay


class Reporter:
    """Writes each step's metrics once the next step has been handed to the device.

    Reading a number waits for the device. A step later the device already has new
    work, so it never stands idle while the numbers are fetched and written.
    """

    def __init__(
        self,
        log: MetricsLog,
        display: ProgressDisplay,
        work: float | None = None,
        skipped_at_most: int = 0,
    ):
        """
        Args:
          work: Of one step, in seconds of all devices at their peak; if known.
          skipped_at_most: Steps in a row whose numbers may be not finite.
        """
        self._log, self._display = log, display
        self._work, self._skipped_at_most = work, skipped_at_most
        self._stopwatch = Stopwatch()
        self._held_back: dict[str, Any] = {}

    def trained(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of ``step``, and writes those of the step before.

        Raises ``NotFinite`` if the run must not go on after those; so does ``flush``.
        """
        before, self._held_back = self._held_back, {"step": step} | metrics
        self._write(before)

    def evaluated(self, step: int, held_out_loss: float) -> None:
        """Adds the held-out loss (nats per token) to the record of ``step``."""
        self._held_back |= {
            "step": step,
            "held_out_loss": held_out_loss,
            "held_out_perplexity": perplexity(held_out_loss),
        }
        self._stopwatch.pause()

    def flush(self) -> None:
        """Writes the last step's metrics, before a checkpoint or at the end."""
        before, self._held_back = self._held_back, {}
        self._write(before)
        self._log.sync()
        self._stopwatch.pause()

    def _write(self, held_back: dict[str, Any]) -> None:
        if not held_back:
            return
        record: Record = {
            name: x.item() if isinstance(x, jax.Array) else x
            for name, x in held_back.items()
        }
        tokens = record.pop("tokens", 0)
        if speed := self._stopwatch.step_done(tokens):
            record["tokens_per_second"] = round(speed.tokens, 1)
            if self._work is not None:
                record["model_flops_utilization"] = round(speed.steps * self._work, 4)
        self._log.write(record)
        self._display.update(record)
        check_record(record, self._skipped_at_most)


class Speed(NamedTuple):
    """The speed of training, per second."""

    steps: float
    tokens: float


class Stopwatch:
    """Measures speed over the last steps, without the pauses between them."""

    def __init__(self, window: int = 20) -> None:
        self._laps: deque[tuple[float, float]] = deque(maxlen=window)
        self._last: float | None = None

    def step_done(self, tokens: float) -> Speed | None:
        """Returns the speed; None before a whole step was timed."""
        now = time.perf_counter()
        if self._last is not None:
            self._laps.append((now - self._last, tokens))
        self._last = now
        if not self._laps:
            return None
        seconds, tokens = map(sum, zip(*self._laps, strict=True))
        return Speed(len(self._laps) / seconds, tokens / seconds)

    def pause(self) -> None:
        """Excludes the time until the next step: evaluating, saving, compiling."""
        self._last = None
