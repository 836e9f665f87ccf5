"""The README's commands, from a first run to an exported model."""

import re
import signal
import sys

import pytest
from command_line import start
from outcome import losses

from examples.llama import __main__
from examples.llama.config import DataConfig
from examples.llama.lock import Lock
from examples.llama.train import train
from examples.llama.weights.load import load_params
from examples.llama.weights.names import BadWeights


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command such as `run("eval", "runs/x")`; returns what it prints."""

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["examples.llama", *map(str, arguments)])
        assert __main__.main() == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return run


def held_out_loss(printed):
    (found,) = re.findall(r"held-out loss +(\S+) nats", printed)
    return float(found)


def test_pretrain_kill_resume_evaluate_export_import_generate(
    make_config, text_folder, tmp_path, run
):
    data = DataConfig(
        text_folder,
        seq_len=32,
        batch_size=8,
        eval_tokens=600,
        cache=tmp_path / "tokens",
    )
    config = make_config(tmp_path / "run", "lorapre_adamw", data=data)
    pieces = ("--tokenizer", "bpe", "--vocab-size", "300")
    killed = start(config, *pieces, devices=1, fault="killed_between_saves")
    killed.communicate(timeout=240)
    assert killed.returncode == -signal.SIGKILL

    settings = ("--config", config.workdir / "config.yaml")
    printed = run("train", *settings)
    assert "going on after step 6" in printed
    assert [record["step"] for record in losses(config.workdir)] == list(range(13))
    loss = held_out_loss(printed)

    with Lock(config.workdir):  # As beside a run at work.
        assert held_out_loss(run("eval", config.workdir)) == loss
        run("export", config.workdir, tmp_path / "hf")
    other = held_out_loss(run("eval", config.workdir, "--eval-tokens", "99"))
    assert other != loss

    asked = ("--prompt", "the cat", "--prompt", "a", "--max-new-tokens", "8")
    text = run("generate", config.workdir, *asked)
    assert text.startswith("the cat")
    assert text == run("generate", config.workdir, *asked)
    drawn = run("generate", config.workdir, *asked, "--temperature", "2")
    assert drawn != text

    run("import", tmp_path / "hf", tmp_path / "back")
    same = ("--seq-len", "32", "--eval-tokens", "600", "--data", text_folder)
    assert held_out_loss(run("eval", tmp_path / "back", *same)) == loss
    assert text == run("generate", tmp_path / "back", *asked)

    # Training goes on with them: it starts where the other has ended.
    more = ("--workdir", tmp_path / "more", "--steps", "2", "--eval-every", "1")
    more += ("--seq-len", "32", "--eval-tokens", "600", "--data", text_folder)
    run("train", "--init-from", tmp_path / "back", *more)
    first = losses(tmp_path / "more")[0]["held_out_loss"]
    assert first == pytest.approx(loss, abs=1e-4)
    text = run(
        "train", "--init-from", tmp_path / "back", *more, "--width", "64", code=1
    )
    assert "more holds a run with other settings" in text


def test_weights_of_another_model_or_without_a_tokenizer_are_refused(
    make_config, tmp_path, run
):
    config = make_config(tmp_path / "run", steps=1)
    train(config)
    run("export", config.workdir, tmp_path / "hf")  # Bytes have no file.
    assert "without a tokenizer" in run("import", tmp_path / "hf", tmp_path / "back")
    assert "back has no tokenizer" in run("eval", tmp_path / "back", code=1)
    assert "back has no tokenizer" in run("generate", tmp_path / "back", code=1)
    with pytest.raises(BadWeights):
        load_params(tmp_path / "back").tokenizer()
    begin = ("train", "--init-from", tmp_path / "back", "--workdir", tmp_path / "new")
    other = ("--rope-base", "99", "--data", config.data.path)
    printed = run(*begin, *other, code=1)
    assert "back is another model:\n  rope_base: 10000.0 there, 99.0 now" in printed
    printed = run("train", "--workdir", tmp_path / "back", code=1)
    assert "imported weights: give another --workdir" in printed
