"""A whole run, new or resumed from its last checkpoint."""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
from rich.console import Console

from examples.llama import flops, hosts, layout
from examples.llama.checkpoint import Checkpoints
from examples.llama.config import Config, as_groups, file
from examples.llama.divergence import Diverged, NotFinite
from examples.llama.lock import Lock
from examples.llama.metrics import MetricsLog, perplexity
from examples.llama.page import Page
from examples.llama.prepare import Run, prepare
from examples.llama.progress import ProgressDisplay
from examples.llama.report import Reporter
from examples.llama.stop import Stopped, StopRequest
from examples.llama.terminal import say
from examples.llama.trace import Trace


@dataclass(frozen=True)
class Result:
    """The results of a finished run."""

    held_out_loss: float  # nats per token
    held_out_perplexity: float
    state_bytes: int  # optimizer state of one replica
    state_ratio: float  # that, over AdamW's
    plot: Path
    page: Path
    checkpoint: Path
    already_finished: bool

    def lines(self) -> dict[str, str]:
        """Returns the results as text, by name."""
        return {
            "held-out loss": f"{self.held_out_loss:.4f} nats per token",
            "perplexity": f"{self.held_out_perplexity:.3f}",
            "optimizer state": f"{self.state_bytes:,} bytes, "
            f"{self.state_ratio:.2f} of AdamW's",
            "loss curve": str(self.plot),
            "report": str(self.page),
            "checkpoint": str(self.checkpoint),
        }


def train(config: Config, console: Console | None = None) -> Result:
    """Trains until ``config.last_step``, or resumes the run in ``workdir``."""
    started = time.monotonic()
    console = (console or Console()) if hosts.is_first() else Console(quiet=True)
    # Settings that do not fit the devices are refused before anything is done.
    mesh = layout.make_mesh(config.mesh, jax.devices())
    by_row = layout.by_row(mesh, config.data.batch_size, config.micro_batch_size)
    with Lock(config.workdir), Checkpoints(config.workdir) as checkpoints:
        run = prepare(config, mesh, by_row, checkpoints, console)
        page = Page(
            config.workdir,
            f"Llama by {config.optimizer.name}",
            {
                "Settings": file.dump(as_groups(config)),
                "Optimizer state": str(run.memory),
            },
        )
        work = flops.seconds_at_peak(
            config.model, run.state.params, config.data, config.peak_tflops
        )
        due = Due(
            (config.steps, config.last_step),
            config.eval_every,
            config.checkpoint_every,
            config.diagnostics_every,
        )
        with (
            contextlib.closing(run.batches),
            StopRequest(run.start, seconds_left(config.time_limit, started)) as stop,
            MetricsLog(config.workdir, run.start, hosts.is_first()) as log,
            ProgressDisplay(
                run.start, config.last_step, config.log_every, console
            ) as display,
            Trace(config.profile, config.workdir / "profile") as trace,
        ):
            say(console, *filter(None, [log.note]))
            report = Reporter(log, display, work, config.skip_nonfinite)
            try:
                run_steps(run, due, checkpoints, report, stop, trace)
            except NotFinite as error:
                diverged = Diverged(error, checkpoints.last_good())
                try:
                    page.write(log.records, {"so far": str(diverged)})
                except OSError as failed:  # The same command would not help.
                    diverged.add_note(f"The report could not be written: {failed}")
                raise diverged from error
            except Stopped as stopped:
                page.write(log.records, {"so far": str(stopped)})
                raise
        done = checkpoints.latest_step
        assert done is not None  # The last step is always saved.
        held_out_loss = log.value("held_out_loss", done)
        if held_out_loss is None:  # The log was lost, not the run.
            held_out_loss = run.evaluate(run.state.params)
        result = Result(
            held_out_loss=held_out_loss,
            held_out_perplexity=perplexity(held_out_loss),
            state_bytes=run.memory.total_bytes,
            state_ratio=run.memory.ratio,
            plot=page.plot,
            page=page.path,
            checkpoint=checkpoints.path(done),
            already_finished=run.start >= config.last_step,
        )
        page.write(log.records, result.lines())
        return result


def seconds_left(minutes: float | None, started: float) -> float | None:
    """Returns what remains of the time limit, which includes preparation."""
    if minutes is None:
        return None
    return 60 * minutes - (time.monotonic() - started)


class Due(NamedTuple):
    """The steps at which something is done besides training.

    (clu.periodic_actions imports TensorFlow, by way of its metric writers.)
    """

    ends: tuple[int, int]  # Of the schedule, and of the run.
    eval_every: int
    checkpoint_every: int
    diagnostics_every: int

    @property
    def last(self) -> int:
        return self.ends[1]

    def evaluation(self, step: int) -> bool:
        return step in self.ends or step % self.eval_every == 0

    def checkpoint(self, step: int) -> bool:
        return step in self.ends or step % self.checkpoint_every == 0

    def diagnosis(self, step: int) -> bool:
        return step % self.diagnostics_every == 0


def run_steps(
    run: Run,
    due: Due,
    checkpoints: Checkpoints,
    report: Reporter,
    stop: StopRequest,
    trace: Trace,
) -> None:
    """Runs to the end, or until ``stop``; then raises ``Stopped``.

    Raises ``NotFinite`` if the run has diverged.
    """
    state = run.state
    factored = any(leaf.is_factored for leaf in run.memory.leaves)
    if run.start == 0:
        report.evaluated(0, run.evaluate(state.params))
    for step in range(run.start + 1, due.last + 1):
        trace.before(step, state)
        batch, diagnosis = next(run.batches), {}
        if factored and due.diagnosis(step):
            report.flush()  # the rate of steps leaves this out
            diagnosis = run.diagnose(state, batch)
        state, metrics = run.train_step(state, batch)
        epoch = {"epoch": round(step / run.steps_per_epoch, 4)}
        report.trained(step, metrics | diagnosis | epoch)
        if due.evaluation(step):
            report.evaluated(step, run.evaluate(state.params))
        stopped = stop.received(step)
        if stopped or due.checkpoint(step):
            report.flush()  # the log must never lag behind a checkpoint
            run.check_finite(step, state)
            checkpoints.save(step, state)
        if stopped and step < due.last:
            hosts.on_first(checkpoints.wait)
            raise Stopped(step, hosts.from_first(stop.in_time))
    # While SIGTERM still waits, and so do the other hosts: only the first one seals.
    hosts.on_first(checkpoints.wait)
