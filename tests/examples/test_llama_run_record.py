"""The files that identify a run, and errors if they are damaged."""

import json
import sys

import pytest
import yaml
from rich.console import Console

from examples.llama import __main__
from examples.llama.config import Config, ModelConfig, as_groups
from examples.llama.prepare import text_of_run
from examples.llama.run_record import (
    DamagedRecord,
    RunMismatch,
    RunRecord,
    config_of,
    data_of,
    model_of,
    record_weights,
)

DATA = {"fingerprint": "f", "vocab_size": 257, "end_of_text": 256, "context": 32}
MEND = "give it another folder, and take it from there"


def record_of(config):
    return RunRecord(config.workdir, as_groups(config))


@pytest.fixture
def config(tmp_path):
    config = Config(workdir=tmp_path)
    record_of(config).write(DATA)
    record_of(config).check_same(DATA)
    return config


def without(groups, *names):
    """Returns nested values without the one at this path."""
    for name in names[:-1]:
        groups = groups[name]
    del groups[names[-1]]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not JSON"),
        (b"\xff", "not UTF-8"),
        (b"[]", "not a JSON object"),
        (b"{}", "without context, end_of_text, vocab_size"),
        (json.dumps(DATA | {"vocab_size": "257"}).encode(), "vocab_size is '257'"),
        (json.dumps(DATA | {"context": "32"}).encode(), "context is '32'"),
        (json.dumps(DATA | {"tokenizer": 3}).encode(), "tokenizer is 3"),
        (json.dumps(DATA | {"stops": 3}).encode(), "stops is 3"),
        (json.dumps(DATA | {"token_ids": [3]}).encode(), r"token_ids is [3]"),
        (json.dumps(DATA).replace("fingerprint", "x").encode(), "without fingerprint"),
    ],
)
def test_damaged_data_are_named_with_the_mend(config, content, why):
    file = config.workdir / "data.json"
    file.write_bytes(content)
    with pytest.raises(DamagedRecord) as error:
        record_of(config).check_same(DATA)
    assert str(error.value).startswith(f"{file} is damaged: {why}")
    assert MEND in str(error.value)
    if why != "without fingerprint":  # Of imported weights there is none.
        with pytest.raises(DamagedRecord):
            data_of(config.workdir)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        (("model",), "without model"),
        (("model", "width"), "without model.width"),
        (("data", "seq_len"), "without data.seq_len"),
        (("steps",), "without steps"),
    ],
)
def test_settings_with_a_part_missing_are_named(config, path, why):
    file = config.workdir / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    without(settings, *path)
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(DamagedRecord) as error:
        record_of(config).check_same()
    assert str(error.value).startswith(f"{file} is damaged: {why}\n")
    assert MEND in str(error.value)


def test_settings_that_change_nothing_may_be_missing(config):
    file = config.workdir / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    without(settings, "log_every")  # As in a run from before there was such a setting.
    file.write_text(yaml.safe_dump(settings))
    record_of(config).check_same()


@pytest.mark.parametrize("content", ["", "[", "- 1", "model: 3", "model: {width: 3}"])
def test_every_command_names_damaged_settings(config, content, monkeypatch, capsys):
    file = config.workdir / "config.yaml"
    file.write_text(content)
    for command in ("eval", "generate", "train --init-from"):
        arguments = ["examples.llama", *command.split(), str(config.workdir)]
        monkeypatch.setattr(sys, "argv", arguments)
        assert __main__.main() == (2 if command.startswith("train") else 1)
        told = capsys.readouterr().err
        assert told.startswith(f"error: {file} is damaged: ")
        assert MEND in told


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("num_heads", 3, "model.width (128) must be a multiple of model.num_heads (3)"),
        ("width", 128.0, "model.width must be a whole number, got 128.0"),
        ("num_layers", True, "model.num_layers must be a whole number, got True"),
        ("num_kv_heads", "2", "model.num_kv_heads must be a whole number or null, got"),
        ("tie_embeddings", "no", "model.tie_embeddings must be true or false, got"),
        ("norm_eps", "one", "model.norm_eps must be a number, got 'one'"),
        ("norm_eps", True, "model.norm_eps must be a number, got True"),
        ("compute_dtype", "float33", "model.compute_dtype must be float32 or bfloat16"),
        ("remat", ["all"], "model.remat must be nothing, all but products or all, got"),
        ("loss_chunk", {}, "model.loss_chunk must be a whole number or null, got {}"),
        ("loss_chunk", {"a": 1}, "model.loss_chunk.a is no setting"),
    ],
)
def test_a_model_that_cannot_be_is_named(config, name, value, why):
    file = config.workdir / "config.yaml"
    settings = as_groups(config)
    settings["model"] |= {"rope_base": 500_000, name: value}
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(DamagedRecord) as error:
        model_of(config.workdir)
    assert str(error.value).startswith(f"{file} is damaged: {why}")


def test_settings_that_no_run_can_have_are_named(config, monkeypatch, capsys):
    file = config.workdir / "config.yaml"
    file.write_text(file.read_text().replace("steps: 300", "steps: abc"))
    arguments = ["examples.llama", "eval", str(config.workdir)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert __main__.main() == 1
    told = capsys.readouterr().err
    assert told == f"error: {file}: steps must be a whole number, got 'abc'\n"
    file.write_text(file.read_text().replace("steps: abc", "steps: 0"))
    with pytest.raises(
        ValueError, match=r"yaml: not the settings of a run: steps must be"
    ):
        config_of(config.workdir)


def test_where_no_run_is(tmp_path):
    with pytest.raises(RunMismatch, match=r"no config\.yaml, so neither a run nor"):
        config_of(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RunMismatch, match="file is a file, not the folder of a run"):
        config_of(file)


def test_imported_weights_have_defaults(tmp_path):
    model = ModelConfig(width=64)
    record_weights(tmp_path, model, DATA)
    assert config_of(tmp_path).model == model


def test_a_new_run_leaves_the_files_of_others_alone(tiny_config):
    config = tiny_config()
    config.workdir.mkdir()
    file = config.workdir / "tokenizer.json"
    file.write_text("{}")
    begin = record_of(config), config.data, None, False, Console(quiet=True)
    with pytest.raises(RunMismatch, match=r"tokenizer\.json is of no run"):
        text_of_run(*begin)
    assert [path.name for path in config.workdir.iterdir()] == [file.name]
    record_of(config).write(DATA)  # As of a run that never got anywhere.
    text_of_run(*begin)
    assert not file.exists()


def test_settings_that_are_no_runs_are_not_overwritten(config):
    (config.workdir / "data.json").unlink()
    file = config.workdir / "config.yaml"
    record_of(config).write(DATA)  # As after a kill between the two files.
    (config.workdir / "data.json").unlink()
    file.write_text("steps: 9\n")
    with pytest.raises(RunMismatch, match=r"config\.yaml is there, but no data\.json"):
        record_of(config).write(DATA)
    assert file.read_text() == "steps: 9\n"
