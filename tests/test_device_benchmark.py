"""The benchmark for accelerators, tried on a CPU."""

import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from benchmarks import _record, device, fingerprint, step_time

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def main(monkeypatch, tmp_path):
    """Runs the command, with a folder for its file; returns the rows in it."""
    monkeypatch.setattr(fingerprint, "of", lambda method: [1.0])
    monkeypatch.setattr(device, "SECONDS", 0)
    monkeypatch.setattr(device, "LEAST_ROUNDS", 1)

    def run(*arguments):
        device.main(["--tiny", "--folder", str(tmp_path), *arguments])
        (file,) = tmp_path.glob("device_cpu_tiny.json")
        return json.loads(file.read_text())["rows"]

    return run


def test_a_part_is_done_once_for_the_same_code(main, monkeypatch, capsys):
    row = {"transform": "a", "of copy rate": 0.5}
    runs = []

    def part():
        runs.append(1)
        return [row]

    monkeypatch.setattr(device, "parts", lambda tiny: {"one": part, "two": part})
    for _ in range(2):
        rows = main("--only", "one")
        assert rows == [{"part": "one", **row}]
    assert "done before" in capsys.readouterr().out
    assert [row["part"] for row in main("--only", "two")] == ["one", "two"]
    assert len(runs) == 2
    monkeypatch.setattr(_record, "commit", lambda: "another")
    assert [row["part"] for row in main("--only", "two")] == ["two"]


def test_an_update(main):
    rows = main("--only", "update-tiny")
    assert {row["part"] for row in rows} == {"update-tiny"}
    assert all(row["median ms"] > 0 for row in rows)


def test_a_step_and_its_goal(main, capsys):
    rows = main("--only", "step-tiny-lorapre_adamw")
    assert [row["optimizer"] for row in rows] == ["adamw", "lorapre_adamw"]
    assert {row["rows at once"] for row in rows} == {4}
    assert f"goal: {device.GOAL}" in capsys.readouterr().out


def test_fewer_rows_at_once_where_they_do_not_fit(main, monkeypatch):
    tried = []

    def subject(preset, optimizer, batch, micro):
        tried.append(micro)
        if micro > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return SimpleNamespace(measure=lambda: None)

    ratios = {"step, ratio": 1, "step, ratio, range": "1 to 1", "peak MB, ratio": 1}
    monkeypatch.setattr(step_time, "Subject", subject)
    monkeypatch.setattr(step_time, "take_turns", lambda subjects, repeats: None)
    monkeypatch.setattr(step_time, "rows_of", lambda subjects: [ratios])
    (row,) = main("--only", "step-tiny-muon")
    assert tried == [4, 2, 1, 1]  # The last for the other optimizer.
    assert row["rows at once"] == 1


def test_other_errors_of_a_step_are_errors(main, monkeypatch):
    def subject(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(step_time, "Subject", subject)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        main("--only", "step-tiny-muon")


def test_a_check_runs_some_tests(monkeypatch):
    (row,) = device.check("trajectories", tiny=True)
    assert row == {"check": "tests/test_trajectories.py", "tests": 2}
    monkeypatch.setitem(device.CHECKS, "trajectories", "no such test")
    with pytest.raises(RuntimeError, match=r"test_trajectories\.py does not pass"):
        device.check("trajectories", tiny=True)


def test_all_parts_run_in_processes_of_their_own(monkeypatch, capsys, tmp_path):
    commands = []

    def run(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=int("update-tiny" in command))

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit, match=r"failed: update-tiny\."):
        device.main(["--tiny", "--folder", str(tmp_path)])
    assert [command[4] for command in commands] == list(device.parts(tiny=True))
    assert {command[0] for command in commands} == {sys.executable}


def test_an_unknown_part(capsys):
    with pytest.raises(SystemExit):
        device.main(["--tiny", "--only", "update"])
    assert "'update' is not one of check-" in capsys.readouterr().err


def test_without_an_accelerator():
    with pytest.raises(SystemExit, match=r"no accelerator\. With --tiny"):
        device.main(["--only", "update-60m"])
