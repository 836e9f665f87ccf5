"""The display of a run."""

import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from examples.llama.config import OptimizerConfig, parse_steps
from examples.llama.metrics import Record, perplexity
from examples.llama.optimizers import schedules
from examples.llama.terminal import say


def opening(
    what: str, vocab_size: int, workdir: Path, start: int, last_step: int
) -> list[str]:
    """Returns the line about a run that starts, or resumes after ``start`` steps."""
    if start >= last_step:
        return [f"All {start} steps of {workdir} are done already."]
    goes = f"going on after step {start} of" if start else "new run in"
    return [
        f"{what} ({vocab_size} in the vocabulary), {jax.device_count()} device(s); "
        f"{goes} {workdir}"
    ]


def extension(
    optimizer: OptimizerConfig, steps: int, extend_to: int | None
) -> list[str]:
    """Returns the line about a run that is extended, if it is."""
    if extend_to is None:
        return []
    rate, _ = schedules(optimizer, steps)
    return [
        f"extended from {steps} to {extend_to} steps: after step {steps} the learning "
        f"rate stays at its last value, {np.asarray(rate(steps)).item():.3g}"
    ]


def untraced(profile: str | None, start: int) -> list[str]:
    """Returns a line if steps to trace are done already."""
    if profile is None or parse_steps(profile)[0] > start:
        return []
    return [
        f"profile {profile}: no trace of the steps up to {start}, which are done "
        "already"
    ]


class ProgressDisplay:
    """A live bar on a terminal, a line every ``log_every`` steps elsewhere."""

    def __init__(self, start: int, steps: int, log_every: int, console: Console):
        self._start, self._steps, self._log_every = start, steps, log_every
        self._console = console
        self._began = time.perf_counter()
        self._held_out: list[str] = []
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=steps, completed=start)

    def __enter__(self) -> "ProgressDisplay":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, record: Record) -> None:
        step = int(record["step"])
        text = self._describe(record)
        self._bar.update(self._task, completed=step, description=text)
        due = step % self._log_every == 0 or step == self._steps
        if due and not self._console.is_terminal:
            line = f"step {step}/{self._steps}: {text}, {self._time_left(step)} left"
            say(self._console, line)

    def _describe(self, record: Record) -> str:
        parts = []
        if "train_loss" in record:
            loss = record["train_loss"]
            parts.append(f"loss {loss:.3f} (perplexity {perplexity(loss):,.1f})")
        if "held_out_loss" in record:
            self._held_out = [f"held-out {record['held_out_loss']:.3f}"]
        parts += self._held_out
        if "epoch" in record:
            parts.append(f"epoch {record['epoch']:.2f}")
        if "learning_rate" in record:
            parts.append(f"rate {record['learning_rate']:.2e}")
        if record.get("skipped_steps"):
            parts.append(f"{record['skipped_steps']:.0f} steps skipped")
        if "tokens_per_second" in record:
            parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
        if "model_flops_utilization" in record:
            parts.append(f"{record['model_flops_utilization']:.1%} of the peak")
        return ", ".join(parts)

    def _time_left(self, step: int) -> str:
        done = step - self._start
        if done == 0:
            return "unknown time"
        elapsed = time.perf_counter() - self._began
        seconds = round(elapsed / done * (self._steps - step))
        return f"{seconds // 60}:{seconds % 60:02d}"
