"""A whole run: new, or gone on with from its last checkpoint."""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, Sharding
from rich.console import Console

import lorapre_jax as lp
from examples.llama import flops, hosts, layout
from examples.llama.checkpoint import Checkpoints, DamagedCheckpoint
from examples.llama.config import Config
from examples.llama.data.batches import batches_on_devices, placed
from examples.llama.data.rows import held_out_batches
from examples.llama.data.text import Text, open_text
from examples.llama.data.tokenizers import unused_ids
from examples.llama.divergence import Diverged, NotFinite, make_finite_check
from examples.llama.gradients import make_loss_and_grads
from examples.llama.lock import Lock
from examples.llama.metrics import MetricsLog, perplexity, plot_losses
from examples.llama.optimizers import schedules
from examples.llama.page import write_page
from examples.llama.progress import ProgressDisplay, opening_lines, say
from examples.llama.report import Reporter
from examples.llama.run_record import (
    RunMismatch,
    check_same_run,
    record_run,
    require_own,
)
from examples.llama.steps import (
    TrainState,
    assemble,
    init_state,
    make_diagnosis,
    make_evaluation,
    make_train_step,
    state_from,
)
from examples.llama.stop import Stopped, StopRequest
from examples.llama.trace import Trace
from examples.llama.weights.folder import load_for, special_ids

_PLOT, _PAGE = "loss.png", "report.html"


@dataclass(frozen=True)
class Result:
    """What a finished run has to say."""

    held_out_loss: float  # nats per token
    held_out_perplexity: float
    state_bytes: int  # optimizer state of one replica
    state_ratio: float  # that, over AdamW's
    plot: Path
    page: Path
    checkpoint: Path
    already_finished: bool

    def lines(self) -> dict[str, str]:
        """For people, by name."""
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
    """Train until ``config.last_step``; what was done in ``workdir`` is not redone."""
    started = time.monotonic()
    console = (console or Console()) if hosts.is_first() else Console(quiet=True)
    # What the devices do not allow is refused before anything is done.
    mesh = layout.make_mesh(config.mesh, jax.devices())
    by_row = layout.by_row(mesh, config.data.batch_size, config.micro_batch_size)
    with Lock(config.workdir), Checkpoints(config.workdir) as checkpoints:
        run = prepare(config, mesh, by_row, checkpoints, console)
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
            report = make_reporter(config, run, log, display)
            try:
                run_steps(config, run, checkpoints, report, stop, trace)
            except NotFinite as error:
                diverged = Diverged(error, checkpoints.last_good())
                try:
                    leave_page(config, run, log, {"so far": str(diverged)})
                except OSError as failed:  # The same command would not help.
                    diverged.add_note(f"The report could not be written: {failed}")
                raise diverged from error
            except Stopped as stopped:
                leave_page(config, run, log, {"so far": str(stopped)})
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
            plot=config.workdir / _PLOT,
            page=config.workdir / _PAGE,
            checkpoint=checkpoints.path(done),
            already_finished=run.start >= config.last_step,
        )
        leave_page(config, run, log, result.lines())
        return result


def leave_page(
    config: Config, run: "Run", log: MetricsLog, results: Mapping[str, str]
) -> None:
    """Write the loss curve and a page about the run so far, for people to read."""
    if hosts.is_first():
        plot, page = config.workdir / _PLOT, config.workdir / _PAGE
        plot_losses(log.records, f"Llama by {config.optimizer.name}", plot)
        write_page(config, results, log.records, plot, str(run.memory), page)


def seconds_left(minutes: float | None, started: float) -> float | None:
    """Of the time limit, which also counts what comes before the first step."""
    if minutes is None:
        return None
    return 60 * minutes - (time.monotonic() - started)


def make_reporter(
    config: Config, run: "Run", log: MetricsLog, display: ProgressDisplay
) -> Reporter:
    tokens = config.data.batch_size * config.data.seq_len
    work = flops.per_token(config.model, run.state.params, config.data.seq_len)
    peak = flops.peak(jax.devices(), config.peak_tflops)
    work = work * tokens / peak if peak else None
    return Reporter(log, display, work, config.skip_nonfinite)


class Run(NamedTuple):
    """A run that is ready to go: where it stands, and its compiled functions."""

    start: int  # steps done
    state: TrainState
    memory: Any  # the state's, by `lp.describe`
    batches: Any  # of the steps that are left; an iterator to be closed
    steps_per_epoch: float
    train_step: Callable[..., Any]
    evaluate: Callable[[Any], float]
    diagnose: Callable[..., dict[str, jax.Array]]
    check_finite: Callable[[int, TrainState], None]


def prepare(
    config: Config,
    mesh: Mesh,
    by_row: Sharding,
    checkpoints: Checkpoints,
    console: Console,
) -> Run:
    """From its last checkpoint, or new."""

    say(console, *checkpoints.set_aside)
    if checkpoints.latest_step == 0:
        raise RunMismatch(
            f"{config.workdir} holds imported weights: give another --workdir, and "
            f"--init-from {config.workdir} to begin with them"
        )
    start = checkpoints.latest_step or 0
    text = text_of_run(config, start > 0, console)
    data = text.load()
    say(console, *data.notes, *unused_ids(text.tokenizer, text.vocab_size))
    model, tx, abstract = assemble(config, text.vocab_size, mesh)
    memory = lp.describe(tx, abstract.params)
    say(console, *layout.exceptions(mesh, abstract.params), str(memory))
    check_finite = make_finite_check(layout.replicated(mesh))
    if start:
        state = checkpoints.restore(abstract)
        try:
            check_finite(start, state)
        except NotFinite as error:
            raise DamagedCheckpoint(
                f"{checkpoints.latest}: {error}; remove that folder, and the run goes "
                "on from the one before it. If there is none, give another --workdir."
            ) from error
    elif config.init_from is not None:
        state = state_from(load_for(config, text.vocab_size, mesh), tx, abstract)
    else:
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        init = jax.jit(partial(init_state, model, tx), out_shardings=shardings)
        state = init(jax.random.key(config.seed))
    size = config.data.batch_size
    # No more rows at once than a step has.
    at_once = config.micro_batch_size or size
    held_out = [
        placed(batch, by_row) for batch in held_out_batches(data.held_out, at_once)
    ]
    batches = batches_on_devices(
        data.train,
        size,
        config.seed,
        range(start, config.last_step),
        by_row,
        config.data.workers,
    )
    say(console, *opening_lines(config, text, data, start))
    loss_and_grads = make_loss_and_grads(model, config.micro_batch_size, config.z_loss)
    rate, _ = schedules(config.optimizer, config.steps)
    return Run(
        start,
        state,
        memory,
        batches,
        len(data.train) / size,
        make_train_step(
            loss_and_grads,
            tx,
            abstract,
            {"learning_rate": rate},
            skip_nonfinite=config.skip_nonfinite > 0,
        ),
        make_evaluation(model, held_out, layout.replicated(mesh)),
        make_diagnosis(loss_and_grads, layout.replicated(mesh)),
        check_finite,
    )


def run_steps(
    config: Config,
    run: Run,
    checkpoints: Checkpoints,
    report: Reporter,
    stop: StopRequest,
    trace: Trace,
) -> None:
    """To the end, or until ``stop``; then raise ``Stopped``.

    Raises ``NotFinite`` where the run has diverged.
    """
    state, ends = run.state, (config.steps, config.last_step)
    factored = any(leaf.is_factored for leaf in run.memory.leaves)
    if run.start == 0:
        report.evaluated(0, run.evaluate(state.params))
    for step in range(run.start + 1, config.last_step + 1):
        trace.before(step, state)
        batch, diagnosis = next(run.batches), {}
        if factored and step % config.diagnostics_every == 0:
            report.flush()  # the rate of steps leaves this out
            diagnosis = run.diagnose(state, batch)
        state, metrics = run.train_step(state, batch)
        epoch = {"epoch": round(step / run.steps_per_epoch, 4)}
        report.trained(step, metrics | diagnosis | epoch)
        if step % config.eval_every == 0 or step in ends:
            report.evaluated(step, run.evaluate(state.params))
        stopped = stop.received(step)
        if stopped or step in ends or step % config.checkpoint_every == 0:
            report.flush()  # the log must never lag behind a checkpoint
            run.check_finite(step, state)
            checkpoints.save(step, state)
        if stopped and step < config.last_step:
            hosts.on_first(checkpoints.wait)
            raise Stopped(step, hosts.from_first(stop.in_time))
    # While SIGTERM still waits, and so do the other hosts: only the first one seals.
    hosts.on_first(checkpoints.wait)


def text_of_run(config: Config, resumed: bool, console: Console) -> Text:
    """Known to be that of the run, before any of it is tokenised."""
    if resumed:
        check_same_run(config)  # already before the data is read, which may take long
    text = open_text(config.data, console)
    found = {
        "fingerprint": text.fingerprint,
        "vocab_size": text.vocab_size,
        "tokenizer": text.tokenizer.fingerprint,
        "end_of_text": text.tokenizer.end_of_text,
        "context": config.data.seq_len,
    }
    hosts.check_same(str(found), "the text")
    if resumed:
        check_same_run(config, found)
    else:
        hosts.on_first(partial(_record, config, text, found))
    return text


def _record(config: Config, text: Text, found: dict[str, Any]) -> None:
    require_own(config.workdir)
    origin = config.init_from
    special = special_ids(origin, text.tokenizer) if origin else {}
    record_run(config, found | special)
    text.tokenizer.save(config.workdir)
