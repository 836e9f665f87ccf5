"""Numbers that are not finite are found, reported, and never saved."""

import dataclasses
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import finish
from outcome import checkpoint, losses
from rich.console import Console

from examples.llama import files, layout
from examples.llama import prepare as prepare_module
from examples.llama import train as train_module
from examples.llama.checkpoint import DamagedCheckpoint
from examples.llama.divergence import (
    Diverged,
    NotFinite,
    check_record,
    make_finite_check,
)
from examples.llama.page import Page
from examples.llama.train import train


def run(config):
    return train(config, Console(file=io.StringIO(), width=200))


@pytest.fixture
def poison(monkeypatch):
    """Returns `poison(steps)`, which makes the loss of these steps' batches NaN."""

    def at(*steps):
        make = prepare_module.make_loss_and_grads

        def make_poisoned(*arguments):
            loss_and_grads = make(*arguments)

            def poisoned(params, batch):
                loss, grads = loss_and_grads(params, batch)
                # A mask that is not there any more is what marks the batch.
                bad = jnp.where(batch.mask.sum() == 1, jnp.nan, 1.0)
                return loss * bad, jax.tree.map(lambda g: g * bad, grads)

            return poisoned

        def marked(batches, start):
            for step, batch in enumerate(batches, start=start + 1):
                mask = jnp.zeros_like(batch.mask).at[0, 0].set(1.0)
                yield batch._replace(mask=mask) if step in steps else batch

        prepare = train_module.prepare

        def prepare_poisoned(*arguments):
            found = prepare(*arguments)
            return found._replace(batches=marked(found.batches, found.start))

        monkeypatch.setattr(prepare_module, "make_loss_and_grads", make_poisoned)
        monkeypatch.setattr(train_module, "prepare", prepare_poisoned)

    return at


def test_the_rate_is_too_high(tiny_config):
    config = tiny_config(steps=40, checkpoint_every=5, eval_every=100)
    failed = finish(config, "--learning-rate", "1e20", devices=4)
    assert failed.returncode == 76
    assert "Diverged: " in failed.stderr
    assert "not finite at step " in failed.stderr
    assert "None was saved yet" in failed.stderr
    assert "--skip-nonfinite" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not [p for p in (config.workdir / "checkpoints").iterdir() if p.is_dir()]
    lines = (config.workdir / "metrics.jsonl").read_text().splitlines()
    for line in lines:
        json.loads(line, parse_constant=pytest.fail)
    assert (config.workdir / "report.html").exists()


def test_it_stops_at_the_step_itself(tiny_config, poison):
    config = tiny_config(checkpoint_every=3)
    poison(8)
    with pytest.raises(
        Diverged, match="train_loss and grad_norm are not finite at step 8"
    ) as error:
        run(config)
    good = config.workdir.resolve() / "checkpoints" / "6"
    assert f"The last good checkpoint is {good}." in str(error.value)
    assert losses(config.workdir)[-1]["step"] == 8
    assert losses(config.workdir)[-1]["train_loss"] is None
    assert sorted(p.name for p in good.parent.iterdir()) == ["3", "6"]


def test_what_fails_besides_is_told_after_it(tiny_config, poison, monkeypatch):
    """A checkpoint whose digests could not be written is not a good one."""

    def full(folder):
        if folder.name == "6":
            raise OSError("No space left")
        return digests(folder)

    def unwritable(*_):
        raise OSError("loss.png: No space left")

    digests = files.digests
    monkeypatch.setattr(files, "digests", full)
    monkeypatch.setattr(Page, "write", unwritable)
    config = tiny_config(checkpoint_every=3)
    poison(8)
    with pytest.raises(Diverged, match="not finite at step 8") as error:
        run(config)
    good = config.workdir.resolve() / "checkpoints" / "3"
    assert f"The last good checkpoint is {good}." in str(error.value)
    page, save = error.value.__notes__
    assert page == "The report could not be written: loss.png: No space left"
    assert "checkpoints/6 could not be written: No space left" in save


def test_steps_are_skipped_counted_and_change_nothing(tiny_config, poison):
    config = tiny_config("lorapre_adamw", skip_nonfinite=2, checkpoint_every=4)
    poison(3, 4, 7)
    result = run(config)
    records = losses(config.workdir)[1:]
    assert [r["skipped_in_a_row"] for r in records] == [0, 0, 1, 2, 0, 0, 1, *[0] * 5]
    assert [r["skipped_steps"] for r in records] == [0, 0, 1, 2, 2, 2, *[3] * 6]
    # The schedule goes on with the optimizer's own count.
    rates = [r["learning_rate"] for r in records]
    assert rates[2] == rates[3] == rates[4] != rates[5]
    state = checkpoint(result.checkpoint)
    assert int(state["step"]) == 12
    counts = {int(x) for x in jax.tree.leaves(state["opt_state"]) if jnp.shape(x) == ()}
    assert counts == {9}


def test_a_resumed_run_keeps_the_count(tiny_config, poison):
    config = tiny_config(skip_nonfinite=2, checkpoint_every=4)
    poison(3, 4, 5)
    with pytest.raises(Diverged, match="3 steps in a row were not finite at step 5"):
        run(config)
    with pytest.raises(Diverged, match="3 steps in a row were not finite at step 5"):
        run(config)  # From step 4, after two of them.
    assert losses(config.workdir)[-1]["skipped_in_a_row"] == 3
    run(dataclasses.replace(config, skip_nonfinite=3))
    assert losses(config.workdir)[-1]["skipped_steps"] == 3


def test_parameters_are_looked_at_before_they_are_saved(tiny_config, monkeypatch):
    """Here the loss is known too late."""
    make = prepare_module.make_train_step

    def make_broken(*arguments, **more):
        step = make(*arguments, **more)

        def broken(state, batch):
            state, metrics = step(state, batch)
            if state.step == 6:
                scale = state.params["norm"]["scale"].at[0].set(jnp.inf)
                state.params["norm"]["scale"] = scale
            return state, metrics

        return broken

    monkeypatch.setattr(prepare_module, "make_train_step", make_broken)
    monkeypatch.setattr(prepare_module, "make_evaluation", lambda *_: lambda _: 1.0)
    config = tiny_config()
    with pytest.raises(Diverged, match="params/norm/scale is not finite at step 6"):
        run(config)


def test_a_checkpoint_that_is_not_finite_is_not_gone_on_with(tiny_config, monkeypatch):
    """For example one of an earlier version."""
    config = tiny_config(steps=6)
    with monkeypatch.context() as blind:
        blind.setattr(prepare_module, "make_finite_check", lambda _: lambda *_: None)
        blind.setattr("examples.llama.report.check_record", lambda *_: None)
        high = dataclasses.replace(config.optimizer, learning_rate=1e20)
        config = dataclasses.replace(config, optimizer=high)
        run(config)
    with pytest.raises(DamagedCheckpoint, match=r"checkpoints/6: params/.* not finite"):
        run(config)


@pytest.mark.parametrize(
    ("record", "at_most", "what"),
    [
        ({"train_loss": math.inf}, 0, "train_loss is"),
        ({"grad_norm": math.nan}, 0, "grad_norm is"),
        ({"held_out_loss": math.nan}, 5, "held_out_loss is"),
        ({"train_loss": math.nan, "skipped_in_a_row": 3}, 2, "3 steps in a row were"),
        ({"train_loss": math.nan, "skipped_in_a_row": 2}, 2, None),
        ({"train_loss": 2.0, "grad_norm": 1e30}, 0, None),
        ({"diagnostics/condition/w/mu": math.inf}, 0, None),
    ],
)
def test_what_of_a_record_ends_a_run(record, at_most, what):
    if what is None:
        check_record({"step": 4} | record, at_most)
        return
    with pytest.raises(NotFinite, match=f"{what} not finite at step 4"):
        check_record({"step": 4} | record, at_most)


def test_leaves_are_named_on_a_mesh():
    mesh = layout.make_mesh("fsdp=4,tensor=2", jax.devices())
    w = jax.device_put(np.ones((8, 8), np.float32), layout.by_row(mesh, 8))
    check = make_finite_check(layout.replicated(mesh))
    check(3, {"a": {"w": w}, "count": jnp.asarray(1)})
    with pytest.raises(NotFinite, match="a/w is not finite at step 3"):
        check(3, {"a": {"w": w.at[7, 7].set(jnp.nan)}, "count": jnp.asarray(1)})
