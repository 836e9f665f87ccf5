"""A whole run: new, or gone on with from its last checkpoint."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
from rich.console import Console

import lorapre_jax as lp
from examples.llama import hosts, layout
from examples.llama.checkpoint import Checkpoints, check_same_run, record_run
from examples.llama.config import Config
from examples.llama.data import (
    HeldOutBatch,
    TextData,
    held_out_batches,
    load_text,
    train_rows,
)
from examples.llama.metrics import MetricsLog, perplexity, plot_losses
from examples.llama.model import PureLlama
from examples.llama.optimizers import make_optimizer
from examples.llama.progress import ProgressDisplay
from examples.llama.report import Reporter
from examples.llama.steps import (
    abstract_state,
    init_state,
    make_diagnosis,
    make_evaluation,
    make_train_step,
)
from examples.llama.stop import Stopped, StopRequest


@dataclass(frozen=True)
class Result:
    """What a finished run has to say."""

    held_out_loss: float  # nats per token
    held_out_perplexity: float
    state_bytes: int  # optimizer state of one replica
    state_ratio: float  # that, over AdamW's
    plot: Path
    checkpoint: Path
    already_finished: bool


def train(config: Config, console: Console | None = None) -> Result:
    """Train until ``config.steps``; what ``config.workdir`` has done is not redone."""
    console = (console or Console()) if hosts.is_first() else Console(quiet=True)
    mesh = layout.make_mesh(config.mesh, jax.devices())
    by_row = layout.by_row(mesh, config.data.batch_size)

    with Checkpoints(config.workdir) as checkpoints:
        for line in checkpoints.set_aside:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        start = checkpoints.latest_step or 0
        data = load_data_of_run(config, resumed=start > 0)
        model = PureLlama(config.model, data.vocab_size)
        tx = make_optimizer(config.optimizer, config.steps)

        abstract = abstract_state(model, tx, mesh)
        for line in layout.exceptions(mesh, abstract.params):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        memory = lp.describe(tx, abstract.params)
        console.print(str(memory), markup=False, highlight=False, soft_wrap=True)
        if start:
            state = checkpoints.restore(abstract)
        else:
            shardings = jax.tree.map(lambda x: x.sharding, abstract)
            init = jax.jit(partial(init_state, model, tx), out_shardings=shardings)
            state = init(jax.random.key(config.seed))

        size = config.data.seq_len, config.data.batch_size
        all_rows = train_rows(data.train, config.data.seq_len, config.seed)
        held_out = [
            HeldOutBatch(
                *(hosts.batch_from_rows(x.__getitem__, len(x), by_row) for x in batch)
            )
            for batch in held_out_batches(data.held_out, *size)
        ]
        evaluate = make_evaluation(model, held_out, layout.replicated(mesh))
        train_step = make_train_step(model, tx, abstract)
        diagnose = make_diagnosis(model, layout.replicated(mesh))
        factored = any(leaf.is_factored for leaf in memory.leaves)
        console.print(opening_line(config, data, start), soft_wrap=True)

        with (
            StopRequest() as stop,
            MetricsLog(config.workdir, start, hosts.is_first()) as log,
            ProgressDisplay(start, config.steps, config.log_every, console) as display,
        ):
            report = Reporter(log, display, tokens_per_step=math.prod(size))
            if start == 0:
                report.evaluated(0, evaluate(state.params))
            for step in range(start + 1, config.steps + 1):
                first = (step - 1) * config.data.batch_size
                rows = hosts.batch_from_rows(
                    lambda i, first=first: all_rows[first + i],
                    config.data.batch_size,
                    by_row,
                )
                diagnosis = {}
                if factored and step % config.diagnostics_every == 0:
                    report.flush()  # the rate of steps leaves this out
                    diagnosis = diagnose(state, rows)
                state, metrics = train_step(state, rows)
                report.trained(step, metrics | diagnosis)
                if step % config.eval_every == 0 or step == config.steps:
                    report.evaluated(step, evaluate(state.params))
                stopped = stop.received(step)
                last = stopped or step == config.steps
                if last or step % config.checkpoint_every == 0:
                    report.flush()  # the log must never lag behind a checkpoint
                    checkpoints.save(step, state)
                if stopped and step < config.steps:
                    raise Stopped(step)

        plot = config.workdir / "loss.png"
        if hosts.is_first():
            plot_losses(log.records, f"Llama by {config.optimizer.name}", plot)
        held_out_loss = log.last("held_out_loss")
        return Result(
            held_out_loss=held_out_loss,
            held_out_perplexity=perplexity(held_out_loss),
            state_bytes=memory.total_bytes,
            state_ratio=memory.ratio,
            plot=plot,
            checkpoint=checkpoints.path(config.steps),
            already_finished=start == config.steps,
        )


def load_data_of_run(config: Config, resumed: bool) -> TextData:
    """The run's tokens, once settings and data are known to be those of the run."""
    if resumed:
        check_same_run(config)  # already before the data is read, which may take long
    data = load_text(config.data, cache_folder=config.workdir)
    hosts.check_same(data.fingerprint(), "the text")
    if resumed:
        check_same_run(config, data.fingerprint())
    elif hosts.is_first():
        record_run(config, data.fingerprint())
    return data


def opening_line(config: Config, data: TextData, start: int) -> str:
    if start == config.steps:
        return f"All {start} steps of {config.workdir} are done already."
    text = (
        f"{config.optimizer.name} on {len(data.train):,} tokens "
        f"({data.vocab_size} in the vocabulary), {jax.device_count()} device(s)"
    )
    if start:
        return f"{text}; going on after step {start} of {config.workdir}"
    return f"{text}; new run in {config.workdir}"
