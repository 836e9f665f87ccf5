"""Prepares a run: its state and its compiled functions."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, Sharding
from rich.console import Console

import lorapre_jax as lp
from examples.llama import hosts, layout
from examples.llama.checkpoint import Checkpoints, DamagedCheckpoint
from examples.llama.config import Config, DataConfig, as_groups
from examples.llama.data.batches import batches_on_devices, placed
from examples.llama.data.rows import held_out_batches
from examples.llama.data.text import Text, open_text
from examples.llama.data.tokenizers import unused_ids
from examples.llama.divergence import NotFinite, make_finite_check
from examples.llama.gradients import make_loss_and_grads
from examples.llama.optimizers import schedules
from examples.llama.progress import extension, opening, untraced
from examples.llama.pure import PureLlama
from examples.llama.run_record import RunMismatch, RunRecord
from examples.llama.steps import (
    TrainState,
    assemble,
    init_state,
    make_diagnosis,
    make_evaluation,
    make_train_step,
    state_from,
)
from examples.llama.terminal import say
from examples.llama.weights.load import load_for, special_ids


class Run(NamedTuple):
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
    """Prepares a run from its last checkpoint, or a new one."""
    say(console, *checkpoints.set_aside)
    if checkpoints.latest_step == 0:
        raise RunMismatch(
            f"{config.workdir} holds imported weights: give another `workdir`, and "
            f"`init_from: {config.workdir}` to begin with them"
        )
    start = checkpoints.latest_step or 0
    record = RunRecord(config.workdir, as_groups(config))
    text = text_of_run(record, config.data, config.init_from, start > 0, console)
    data = text.load()
    say(console, *data.notes, *unused_ids(text.tokenizer, text.vocab_size))
    model = PureLlama(config.model, text.vocab_size, mesh)
    tx, abstract = assemble(model, config.optimizer, config.steps, mesh)
    memory = lp.describe(tx, abstract.params)
    say(console, *layout.exceptions(mesh, abstract.params), str(memory))
    check_finite = make_finite_check(layout.replicated(mesh))
    if start:
        state = restored(checkpoints, abstract, check_finite)
    elif config.init_from is not None:
        tokenizer = config.data.tokenizer
        params = load_for(
            config.init_from, config.model, text.vocab_size, tokenizer, mesh
        )
        state = state_from(params, tx, abstract)
    else:
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        init = jax.jit(partial(init_state, model, tx), out_shardings=shardings)
        state = init(jax.random.key(config.seed))
    size = config.data.batch_size
    # At most as many rows at once as in a step.
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
    what = f"{config.optimizer.name} on {data.tokens:,} tokens"
    say(
        console,
        *opening(what, text.vocab_size, config.workdir, start, config.last_step),
    )
    if start < config.last_step:
        say(console, *extension(config.optimizer, config.steps, config.extend_to))
        say(console, *untraced(config.profile, start))
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


def restored(
    checkpoints: Checkpoints,
    abstract: TrainState,
    check_finite: Callable[[int, TrainState], None],
) -> TrainState:
    """Restores the last checkpoint; ``DamagedCheckpoint`` if it is not finite."""
    state, step = checkpoints.restore(abstract), checkpoints.latest_step or 0
    try:
        check_finite(step, state)
    except NotFinite as error:
        raise DamagedCheckpoint(
            f"{checkpoints.latest}: {error}; remove that folder, and the run goes on "
            "from the one before it. If there is none, give another `workdir`."
        ) from error
    return state


def text_of_run(
    record: RunRecord,
    data: DataConfig,
    init_from: Path | None,
    resumed: bool,
    console: Console,
) -> Text:
    """Opens the text, and checks that it is the run's before tokenising it."""
    if resumed:
        record.check_same()  # already before the data is read, which may take long
    text = open_text(data, console)
    found = {
        "fingerprint": text.fingerprint,
        "vocab_size": text.vocab_size,
        "tokenizer": text.tokenizer.fingerprint,
        "end_of_text": text.tokenizer.end_of_text,
        "context": data.seq_len,
    }
    hosts.check_same(str(found), "the text")
    if resumed:
        record.check_same(found)
    else:
        hosts.on_first(partial(_write_record, record, text, found, init_from))
    return text


def _write_record(
    record: RunRecord, text: Text, found: dict[str, Any], init_from: Path | None
) -> None:
    record.require_own()
    special = special_ids(init_from, text.tokenizer) if init_from else {}
    record.write(found | special)
    text.tokenizer.save(record.workdir)
