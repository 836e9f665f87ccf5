"""Rows and batches: which tokens count, their order, and the order after a kill."""

import contextlib
import dataclasses
import json
import signal
from typing import Any

import jax
import numpy as np
import pytest
from command_line import finish
from faulty_run import digest
from outcome import losses
from rich.console import Console

from examples.llama import layout
from examples.llama.data.batches import SomeRows, batches_on_devices, train_batches
from examples.llama.data.rows import DocumentRows, PackedRows, held_out_batches
from examples.llama.data.text import open_text

TOKENS = np.arange(1000, dtype=np.uint16)
# Three documents, each with its end of text: 0 to 3, 4 to 13, 14 and 15.
ENDS = np.asarray([4, 14, 16])


def test_every_token_is_predicted_once_per_epoch():
    rows = PackedRows(TOKENS, seq_len=9)
    assert len(rows) == 111
    targets = np.concatenate([rows[i].targets for i in range(len(rows))])
    np.testing.assert_array_equal(targets, TOKENS[1:])
    assert all(rows[i].mask.all() for i in range(len(rows)))
    np.testing.assert_array_equal(rows[7].inputs[1:], rows[7].targets[:-1])


def test_a_document_fills_a_row():
    rows = DocumentRows(TOKENS, ENDS, seq_len=5, pad=99)
    assert len(rows) == 3
    parts = [[part.tolist() for part in rows[i]] for i in range(3)]
    assert parts[0] == [[0, 1, 2, 3, 99], [1, 2, 3, 99, 99], [1, 1, 1, 0, 0]]
    # It is cut, except for its end of text.
    assert parts[1] == [[4, 5, 6, 7, 8], [5, 6, 7, 8, 13], [1, 1, 1, 1, 1]]
    assert parts[2] == [[14, 15, 99, 99, 99], [15, 99, 99, 99, 99], [1, 0, 0, 0, 0]]


def test_a_batch_depends_on_seed_and_step_alone():
    def batches(seed, steps):
        rows = PackedRows(TOKENS, seq_len=9)
        batches = train_batches(rows, batch_size=4, seed=seed)
        return [batches[step].inputs for step in steps]

    in_order = batches(3, range(60))
    assert in_order[0].shape == (4, 9)
    assert in_order[0].dtype == np.int32
    some = (59, 0, 31)  # in any order, from a fresh data set
    np.testing.assert_array_equal(batches(3, some), [in_order[step] for step in some])
    assert not np.array_equal(batches(4, [0])[0], in_order[0])
    starts = np.concatenate(in_order)[:, 0]
    assert len(set(starts[:111])) == 111  # an epoch without repetition
    assert not np.array_equal(starts[:111], starts[111:222])  # the next in new order


@pytest.mark.parametrize("count", [2, 36, 37, 38, 100])
def test_held_out_tokens_are_each_a_target_once(count):
    rows = PackedRows(TOKENS, seq_len=9, pad=0, length=count)
    batches = list(held_out_batches(rows, batch_size=4))
    assert {part.shape for batch in batches for part in batch} == {(4, 9)}
    real = [batch.targets[batch.mask == 1] for batch in batches]
    np.testing.assert_array_equal(np.concatenate(real), TOKENS[1:count])
    inputs = [batch.inputs[batch.mask == 1] for batch in batches]
    np.testing.assert_array_equal(np.concatenate(inputs), TOKENS[: count - 1])


def test_held_out_documents_count_their_own_tokens_alone():
    rows = DocumentRows(TOKENS, ENDS, seq_len=20, pad=0)
    batches = list(held_out_batches(rows, batch_size=2))
    assert {part.shape for batch in batches for part in batch} == {(2, 20)}
    targets = np.concatenate([batch.targets[batch.mask == 1] for batch in batches])
    assert targets.tolist() == [1, 2, 3, *range(5, 14), 15]


def test_hosts_divide_a_batch():
    rows = PackedRows(TOKENS, seq_len=9)
    whole: Any = train_batches(rows, batch_size=8, seed=1)[5]
    for places in ([0, 1, 2, 3], [4, 5, 6, 7], [1, 6]):
        part = SomeRows(rows, 8, 1, places)(5)
        for mine, all_of_them in zip(part, whole, strict=True):
            np.testing.assert_array_equal(mine, all_of_them[places])


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=2,tensor=4"])
def test_batches_on_devices_are_those_of_their_steps(mesh):
    devices = layout.make_mesh(mesh, jax.devices())
    by_row = layout.by_row(devices, 8)
    rows = DocumentRows(TOKENS, ENDS, seq_len=5, pad=99)
    expected: Any = train_batches(rows, batch_size=8, seed=2)
    found = batches_on_devices(rows, 8, 2, range(3, 9), by_row)
    with contextlib.closing(found):
        for step in range(3, 9):
            batch = next(found)
            assert batch.mask.sharding == by_row
            for here, there in zip(batch, expected[step], strict=True):
                np.testing.assert_array_equal(here, there)
        with pytest.raises(StopIteration):
            next(found)


@pytest.mark.parametrize(
    ("batching", "workers"), [("packed", "0"), ("one-per-row", "2")]
)
def test_a_killed_run_goes_on_with_the_tokens_it_would_have_seen(
    make_config, tmp_path, batching, workers
):
    """Also on another mesh, and with another number of reading processes."""
    config = make_config(tmp_path / "run")
    options = [f"--batching={batching}", f"--data-workers={workers}"]
    killed = finish(config, *options, devices=1, fault="recorded_and_killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    lines = (config.workdir / "batches.jsonl").read_text().splitlines()
    assert [json.loads(line)[0] for line in lines] == [1, 2, 3, 4, 5, 6]
    options[1] = "--data-workers=0"
    options.append("--mesh=fsdp=2,tensor=2")
    done = finish(config, *options, devices=4, fault="recorded")
    assert done.returncode == 0, done.stderr
    assert "going on after step 6" in done.stdout

    data = dataclasses.replace(config.data, batching=batching)
    rows = open_text(data, Console(quiet=True)).load().train
    expected = train_batches(rows, config.data.batch_size, config.seed)
    lines = (config.workdir / "batches.jsonl").read_text().splitlines()
    seen = [json.loads(line) for line in lines]
    assert [step for step, _ in seen] == list(range(1, 13))
    assert dict(seen) == {step: digest(expected[step - 1]) for step in range(1, 13)}

    # Epochs are counted from the start of the run.
    epochs = [record["epoch"] for record in losses(config.workdir)[1:]]
    assert epochs == [round(step * 8 / len(rows), 4) for step in range(1, 13)]
    assert f"epoch {epochs[-1]:.2f}" in done.stdout
