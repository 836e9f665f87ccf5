"""Whole runs: resuming, errors, evaluation, eight devices."""

import dataclasses
import importlib.metadata
import io
import json
import math
import os
import signal

import jax
import numpy as np
import pytest
from command_line import finish
from outcome import assert_same_trees, checkpoint, losses
from rich.console import Console

from examples.llama import __main__, layout, main
from examples.llama.config import ModelConfig, OptimizerConfig
from examples.llama.data.batches import placed
from examples.llama.data.rows import DocumentRows, PackedRows, held_out_batches
from examples.llama.gradients import make_loss_and_grads
from examples.llama.metrics import MetricsLog
from examples.llama.optimizers import schedules
from examples.llama.pure import PureLlama
from examples.llama.run_record import RunMismatch
from examples.llama.steps import make_evaluation
from examples.llama.stop import Stopped
from examples.llama.train import train


def run(config):
    """Returns the result of a run, and what was printed."""
    output = io.StringIO()
    result = train(config, Console(file=output, width=200))
    return result, output.getvalue()


def diagnostics_of(record):
    return {name: x for name, x in record.items() if name.startswith("diagnostics/")}


def interrupt_at(step, monkeypatch):
    """Raises Ctrl-C in the middle of logging ``step``, after half a line."""
    write = MetricsLog.write

    def interrupted(self, record):
        if record["step"] == step:
            self._file.write('{"step": ')
            self._file.flush()
            raise KeyboardInterrupt
        write(self, record)

    monkeypatch.setattr(MetricsLog, "write", interrupted)


@pytest.mark.parametrize("name", ["adamw", "lorapre_adamw"])
def test_an_interrupted_run_goes_on_bit_for_bit(name, tiny_config, monkeypatch):
    config = tiny_config(name, diagnostics_every=4)
    if name == "adamw":  # The other way of everything that a step may do.
        model = dataclasses.replace(
            config.model, param_dtype="bfloat16", compute_dtype="bfloat16"
        )
        config = dataclasses.replace(
            config, model=model, mesh="fsdp=2,tensor=4", micro_batch_size=4, z_loss=1e-3
        )
    straight, _ = run(config)
    parts = dataclasses.replace(config, workdir=config.workdir / "parts")
    with monkeypatch.context() as context:
        interrupt_at(9, context)
        with pytest.raises(KeyboardInterrupt):
            run(parts)
    assert [record["step"] for record in losses(parts.workdir)] == list(range(9))
    resumed, printed = run(parts)
    assert "going on after step 6" in printed
    assert [record["step"] for record in losses(parts.workdir)] == list(range(13))
    assert losses(parts.workdir) == losses(config.workdir)
    looked = [
        record["step"] for record in losses(config.workdir) if diagnostics_of(record)
    ]
    assert looked == ([4, 8, 12] if name == "lorapre_adamw" else [])
    assert resumed.held_out_loss == straight.held_out_loss
    assert_same_trees(checkpoint(resumed.checkpoint), checkpoint(straight.checkpoint))
    assert resumed.plot.read_bytes().startswith(b"\x89PNG")
    assert list((parts.workdir / "tensorboard").iterdir())


def test_diagnostics_are_logged_and_change_nothing(tiny_config):
    without = tiny_config("lorapre_adamw")
    config = dataclasses.replace(
        without, diagnostics_every=1, workdir=without.workdir / "looking"
    )
    plain, looking = run(without)[0], run(config)[0]
    logged = [diagnostics_of(record) for record in losses(config.workdir)]
    rest = [
        {name: record[name] for name in record.keys() - found.keys()}
        for record, found in zip(losses(config.workdir), logged, strict=True)
    ]
    assert rest == losses(without.workdir)
    assert_same_trees(checkpoint(looking.checkpoint), checkpoint(plain.checkpoint))

    path = "layers/attention/q/kernel/mu"
    names = [f"diagnostics/{x}/{path}" for x in ("captured", "effective_rank")]
    assert [len(found) for found in logged] == [0] + [3 * 7] * 12
    # Seen from before each step: the first one starts from zero.
    assert [logged[1][name] for name in names] == [0, 0]
    assert logged[1][f"diagnostics/condition/{path}"] is None  # Infinite.
    for captured, effective_rank in ([found[n] for n in names] for found in logged[2:]):
        assert 0 < captured < 1
        assert 1 < effective_rank < 4
    (events,) = (config.workdir / "tensorboard").iterdir()
    assert f"diagnostics/captured/{path}".encode() in events.read_bytes()


def test_numbers_that_are_not_finite_are_null_in_the_log(tmp_path, caplog):
    """JSON has no such numbers."""
    with MetricsLog(tmp_path, 0) as log:
        log.write({"step": 1, "condition": math.inf, "train_loss": math.nan})
    assert log.value("condition", 1) == math.inf
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "condition": null, "train_loss": null}\n'
    with MetricsLog(tmp_path, 1) as log:
        assert math.isnan(log.value("condition", 1) or 0)
    assert not caplog.records


def test_a_damaged_log_is_no_reason_to_stop(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        for step in range(6):
            log.write({"step": step, "train_loss": 1.5})
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[1] = "\0" * 20 + "\n"
    lines[2] = '["step"]\n'
    lines[3] = '{"step": 3, "train_loss": ' + "9" * 400 + "}\n"
    lines[4] = '{"step": 4, "train_loss": "' + "[" * 100_000 + "\n"
    path.write_text("".join(lines))
    with MetricsLog(tmp_path, 5) as log:
        assert [record["step"] for record in log.records] == [0, 5]
        assert f"{path}: damaged in lines 2, 3, 4, 5" in log.note
    assert (tmp_path / "damaged" / "metrics.jsonl").read_text() == "".join(lines)
    with MetricsLog(tmp_path, 5) as log:
        assert log.note.startswith(f"{path}: without 4 of the 5 steps done")


def test_a_log_with_nothing_missing_is_not_remarked_on(tmp_path):
    for start in (0, 3, 2):
        with MetricsLog(tmp_path, start) as log:
            assert not log.note
            for step in range(start, 4):
                log.write({"step": step})


def test_a_finished_run_says_so_and_other_settings_are_refused(tiny_config):
    config = tiny_config()
    first, _ = run(config)
    before = losses(config.workdir)
    again, printed = run(config)
    assert "done already" in printed
    assert again == dataclasses.replace(first, already_finished=True)
    assert losses(config.workdir) == before

    run(dataclasses.replace(config, log_every=1, eval_every=1))  # these may change
    other = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, ffn_width=48),
        optimizer=OptimizerConfig("adamw", rank=4, b2=0.99),
    )
    with pytest.raises(
        RunMismatch, match=r"(?s)ffn_width: 64.*48.*optimizer\.b2: 0.95"
    ):
        run(other)
    data = dataclasses.replace(config.data, path=None)
    with pytest.raises(RunMismatch, match=r"data\.fingerprint"):
        run(dataclasses.replace(config, data=data))


def test_a_finished_run_without_its_log(tiny_config):
    """The log is lost, but the result is not."""
    config = tiny_config()
    first, _ = run(config)
    (config.workdir / "metrics.jsonl").unlink()
    again, _ = run(config)
    assert again == dataclasses.replace(first, already_finished=True)


def test_a_run_is_extended_at_its_last_rate(tiny_config):
    """Earlier steps stay as they are, and so do those of a longer extension."""
    short = tiny_config("lorapre_adamw")
    run(short)
    config = dataclasses.replace(short, extend_to=16)
    before = losses(config.workdir)
    result, printed = run(config)
    assert "stays at its last value, 0.0002" in printed
    assert result.checkpoint.name == "16"
    records = losses(config.workdir)
    assert records[:13] == before
    assert [record["step"] for record in records[13:]] == [13, 14, 15, 16]
    assert {record["learning_rate"] for record in records[14:]} == {
        records[13]["learning_rate"]
    }
    # At once it is the same.
    once = dataclasses.replace(config, workdir=config.workdir / "once")
    run(once)
    assert losses(once.workdir) == records
    assert_same_trees(
        checkpoint(once.workdir / "checkpoints" / "16"), checkpoint(result.checkpoint)
    )
    _, printed = run(short)  # The first command again takes nothing back.
    assert "All 16 steps" in printed
    with pytest.raises(
        ValueError, match=r"`extend_to` \(12\) must be more than `steps`"
    ):
        dataclasses.replace(short, extend_to=12)


def test_evaluation_is_the_exact_mean_over_tokens(numpy_logits):
    """Tokens of a partly filled last batch have the same weight as others."""
    config = ModelConfig(
        width=32, ffn_width=48, num_layers=2, num_heads=2, scan_layers=False
    )
    model = PureLlama(config, 40)
    params = jax.jit(model.init)(jax.random.key(0))
    params = jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, params)
    tokens = np.random.default_rng(0).integers(0, 40, 1 + 2 * 24 + 11)
    rows = PackedRows(tokens, seq_len=8, pad=0)
    batches = list(held_out_batches(rows, batch_size=3))
    assert len(batches) == 3

    plain, expected = jax.tree.map(np.asarray, params), []
    for i in range(0, len(tokens) - 1, 8):
        row = tokens[i : i + 9]
        logits = numpy_logits(plain, row[:-1], config)
        log_z = np.log(np.exp(logits).sum(-1))
        expected += list(log_z - logits[np.arange(len(row) - 1), row[1:]])
    assert len(expected) == 59
    actual = make_evaluation(model, batches)(params)
    np.testing.assert_allclose(actual, np.mean(expected), rtol=1e-5)


def test_a_document_counts_by_its_tokens(numpy_logits):
    """With one per row on eight devices, padding counts nowhere."""
    config = ModelConfig(
        width=32, ffn_width=48, num_layers=2, num_heads=2, scan_layers=False
    )
    mesh = layout.make_mesh("fsdp=4,tensor=2", jax.devices())
    model = PureLlama(config, 40, mesh)
    params = jax.jit(model.init)(jax.random.key(0))
    params = jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, params)
    tokens = np.random.default_rng(0).integers(0, 40, 40)
    ends = np.asarray([3, 5, 20, 28, 40])
    rows = DocumentRows(tokens, ends, seq_len=8, pad=0)

    plain, expected = jax.tree.map(np.asarray, params), []
    for document in np.split(tokens, ends[:-1]):
        if len(document) > 9:
            document = np.append(document[:8], document[-1])
        logits = numpy_logits(plain, document[:-1], config)
        log_z = np.log(np.exp(logits).sum(-1))
        expected += list(log_z - logits[np.arange(len(document) - 1), document[1:]])
    assert len(expected) == 2 + 1 + 8 + 7 + 8
    batches = [placed(x, layout.by_row(mesh, 8)) for x in held_out_batches(rows, 8)]
    loss, _ = jax.jit(make_loss_and_grads(model))(params, *batches)
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)
    evaluate = make_evaluation(model, batches, layout.replicated(mesh))
    np.testing.assert_allclose(evaluate(params), np.mean(expected), rtol=1e-5)


def test_a_log_is_not_lost_while_it_is_cut_back(tmp_path, monkeypatch):
    with MetricsLog(tmp_path, 0) as log:
        for step in range(4):
            log.write({"step": step})
    before = losses(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(tmp_path, 2)
    assert losses(tmp_path) == before
    monkeypatch.undo()
    with MetricsLog(tmp_path, 2):
        assert losses(tmp_path) == before[:3]


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory, make_config):
    """Returns the configuration of a finished run on one device."""
    config = make_config(tmp_path_factory.mktemp("one"), "lorapre_adamw")
    done = finish(config, devices=1)
    assert done.returncode == 0, done.stderr
    assert "1 device(s)" in done.stdout
    assert "perplexity" in done.stdout
    assert done.stderr == ""
    return config


@pytest.mark.parametrize("mesh", [None, "fsdp=4,tensor=2"])
def test_eight_devices(on_one_device, tmp_path, mesh):
    one = on_one_device
    config = dataclasses.replace(one, workdir=tmp_path / "eight", mesh=mesh)
    _, printed = run(config)
    assert "8 device(s)" in printed
    for single, eight in zip(losses(one.workdir), losses(config.workdir), strict=True):
        assert single.keys() == eight.keys()
        numbers = [name for name in single if not name.startswith("diagnostics/")]
        np.testing.assert_allclose(
            [eight[name] for name in numbers],
            [single[name] for name in numbers],
            rtol=1e-3,
        )


def test_a_run_goes_on_on_another_mesh(on_one_device, tmp_path, monkeypatch):
    config = dataclasses.replace(on_one_device, workdir=tmp_path / "run", mesh="fsdp=8")
    with monkeypatch.context() as context:
        interrupt_at(9, context)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    _, printed = run(dataclasses.replace(config, mesh="fsdp=2,tensor=4"))
    assert "going on after step 6" in printed
    ends = (losses(on_one_device.workdir)[-1], losses(config.workdir)[-1])
    held_out = [record["held_out_loss"] for record in ends]
    np.testing.assert_allclose(held_out[1], held_out[0], rtol=1e-3)
    # One device can take up what eight left.
    assert "done already" in finish(config, devices=1).stdout


def test_sigterm_saves_and_says_so(on_one_device, tmp_path, monkeypatch):
    config = dataclasses.replace(on_one_device, workdir=tmp_path / "run")
    write = MetricsLog.write

    def terminated(self, record):
        write(self, record)
        if record["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "write", terminated)
    with pytest.raises(Stopped, match="saved after step") as stopped:
        run(config)
    step = int(str(stopped.value).split()[-1].rstrip("."))
    assert 4 <= step < 12
    assert (config.workdir / "checkpoints" / str(step)).is_dir()
    monkeypatch.undo()
    assert f"going on after step {step}" in run(config)[1]
    assert [record["step"] for record in losses(config.workdir)] == list(range(13))


@pytest.mark.parametrize(("in_time", "code"), [(False, 143), (True, 75)])
def test_the_command_line_reports_a_stop_by_its_code(
    in_time, code, monkeypatch, capsys
):
    def stop(*_):
        raise Stopped(7, in_time)

    monkeypatch.setattr(main, "train", stop)
    monkeypatch.setattr("sys.argv", ["examples.llama", "train"])
    assert __main__.main() == code
    assert "saved after step 7. Run the same command" in capsys.readouterr().out


def test_the_time_limit_saves_and_the_same_command_goes_on(on_one_device, tmp_path):
    config = dataclasses.replace(
        on_one_device, workdir=tmp_path / "run", time_limit=1e-6
    )
    with pytest.raises(Stopped, match="at its time limit; saved after step 1") as stop:
        run(config)
    assert stop.value.in_time
    assert (config.workdir / "checkpoints" / "1").is_dir()
    page = (config.workdir / "report.html").read_text()
    assert "at its time limit; saved after step 1" in page
    config = dataclasses.replace(config, time_limit=60)
    assert "going on after step 1" in run(config)[1]
    ends = (losses(on_one_device.workdir)[-1], losses(config.workdir)[-1])
    held_out = [record["held_out_loss"] for record in ends]
    np.testing.assert_allclose(held_out[1], held_out[0], rtol=1e-3)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_a_run_leaves_for_people(tiny_config):
    """A run leaves the page, the rate and use of the peak in the log, and a trace."""
    config = tiny_config("lorapre_adamw", steps=6, profile="3:4", peak_tflops=1e-6)
    result, printed = run(config)
    log = (config.workdir / "metrics.jsonl").read_text().splitlines()
    last = json.loads(log[-1])
    rate, _ = schedules(config.optimizer, config.steps)
    np.testing.assert_allclose(last["learning_rate"], rate(5), rtol=1e-6)
    # The weights (2 blocks of 4 x 32 x 32 and 3 x 32 x 64, a head of 32 x 257,
    # five norms), and attention over 32 tokens.
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 32 * 257 + 5 * 32
    work = 6 * weights + 12 * 2 * 32 * 32
    used = last["tokens_per_second"] * work / (1e6 * jax.device_count())
    np.testing.assert_allclose(last["model_flops_utilization"], used, rtol=1e-3)
    assert "% of the peak" in printed
    assert "perplexity" in printed
    assert list((config.workdir / "profile").rglob("*.xplane.pb"))

    page = result.page.read_text()
    assert f"{result.held_out_loss:.4f} nats per token" in page
    assert "data:image/png;base64,iVBOR" in page
    assert "ffn_width: 64" in page
    assert "layers/attention/q/kernel" in page
    assert importlib.metadata.version("optax") in page


def test_an_indivisible_batch_is_refused_before_anything_is_done(tiny_config):
    done = finish(tiny_config(), "--batch-size=4", devices=8)
    assert done.returncode == 1
    assert "--batch-size (4) must be a multiple of the 8 devices" in done.stderr
    assert "Traceback" not in done.stderr
    assert not tiny_config().workdir.exists()
