"""The lock: one job at a time works on a run."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from rich.console import Console

from examples.llama import __main__, ending, lock, main
from examples.llama.lock import Holder, Lock, WorkdirInUse, require_free
from examples.llama.train import train


@pytest.fixture(scope="module")
def gone():
    """Returns two dead processes of this machine, one of them not reaped."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    zombie = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert zombie.stdout is not None
    zombie.stdout.read()
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    yield [dead.pid, zombie.pid]
    zombie.communicate()


def holder(**changes) -> Holder:
    """Returns this process as a holder, with changes."""
    return lock._this_process()._replace(**changes)


def leave_lock(workdir, name="lock", age=0.0, **changes) -> Holder:
    """Leaves a lock as a killed process does."""
    left = holder(**changes)
    folder = workdir / name
    folder.mkdir(parents=True)
    file = folder / "holder.json"
    file.write_text(json.dumps(left._asdict()))
    now = file.stat().st_mtime
    os.utime(file, (now - age, now - age))
    return left


def test_the_second_is_refused_by_host_and_process_of_the_first(tmp_path):
    with Lock(tmp_path), pytest.raises(WorkdirInUse) as refused, Lock(tmp_path):
        pass
    me = holder()
    assert f"in use by process {me.pid} on {me.host}, since" in str(refused.value)
    assert not list(tmp_path.iterdir())
    with Lock(tmp_path):  # It is free again.
        pass


def test_a_train_that_is_refused_has_changed_nothing(tiny_config):
    config = tiny_config()
    half_done = config.workdir / "checkpoints" / "6"  # It would be set aside.
    half_done.mkdir(parents=True)
    with Lock(config.workdir), pytest.raises(WorkdirInUse):
        train(config, Console(file=io.StringIO()))
    assert [path.name for path in config.workdir.iterdir()] == ["checkpoints"]
    assert half_done.is_dir()


def test_it_is_free_after_an_error_and_when_the_process_is_ended(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="space"), Lock(tmp_path):
        raise OSError("no space left")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(os, "_exit", lambda code: None)
    with Lock(tmp_path):
        ending.end_now("another process is gone", 68)
        assert not list(tmp_path.iterdir())


def test_it_is_free_after_sigterm_before_the_first_step(tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)

    def prepare(*_):
        with Lock(tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    monkeypatch.setattr(main, "train", prepare)
    monkeypatch.setattr(sys, "argv", ["examples.llama", "train"])
    assert __main__.main() == 143
    assert "Stopped by SIGTERM. Run the same command" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_locks_of_the_dead_are_no_obstacle(tmp_path, gone):
    dead, zombie = gone
    later: dict[str, Any] = {"started": "1"}  # Another process has its number now.
    unwaited: dict[str, Any] = {"pid": zombie, "started": lock._look_up(zombie).started}
    for number, process in enumerate([{"pid": dead}, unwaited, later]):
        workdir = tmp_path / str(number)
        first = leave_lock(workdir, pid=dead)  # Which the process has taken over.
        leave_lock(workdir, f"lock.{first.id}", **process)
        with Lock(workdir):
            assert len(list(workdir.iterdir())) == 3
            with pytest.raises(WorkdirInUse), Lock(workdir):
                pass
        assert not list(workdir.iterdir())


@pytest.mark.parametrize("elsewhere", [{"host": "other"}, {"machine": "other"}])
def test_another_machine_counts_until_it_gives_no_sign(tmp_path, gone, elsewhere):
    # Its process ids mean nothing here.
    old, new = tmp_path / "old", tmp_path / "new"
    leave_lock(new, age=90, pid=gone[0], **elsewhere)
    with pytest.raises(WorkdirInUse, match=r"Its last sign of life is 9\d s old"):
        Lock(new).__enter__()
    leave_lock(old, age=150, **elsewhere)
    with Lock(old):
        pass


def test_a_holder_gives_signs(tmp_path):
    with Lock(tmp_path) as held:
        file = tmp_path / "lock" / "holder.json"
        os.utime(file, (1, 1))
        held._give_sign()
        assert file.stat().st_mtime > 1


def test_a_process_ends_when_another_has_taken_its_place(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(lock, "end_now", lambda *how: ended.append(how))
    with Lock(tmp_path) as slept:
        os.utime(tmp_path / "lock" / "holder.json", (1, 1))
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(lock, "_machine", lambda: "elsewhere")
            other = Lock(tmp_path)
        with other:
            slept._give_sign()
            slept._release()
            with pytest.raises(WorkdirInUse):  # Not the other's.
                Lock(tmp_path).__enter__()
    slept._give_sign()  # It is over, whoever holds the lock now.
    with Lock(tmp_path):
        slept._give_sign()
    (how,) = ended
    assert f"process {os.getpid()} on" in how[0]
    assert how[1] == 69


def test_one_of_many_takes_over(tmp_path, gone):
    def attempt(_):
        taken = Lock(tmp_path)
        try:
            taken.__enter__()
        except WorkdirInUse:
            return None
        return taken

    for _ in range(5):
        leave_lock(tmp_path, pid=gone[0])
        with ThreadPoolExecutor(8) as pool:
            (held,) = filter(None, pool.map(attempt, range(8)))
        held.__exit__()
        assert not list(tmp_path.iterdir())


def test_a_chain_that_is_removed_meanwhile_is_not_continued(
    tmp_path, gone, monkeypatch
):
    """The slowest of three finds a lock that was taken over, released and retaken."""
    leave_lock(tmp_path, pid=gone[0])
    rename, third = lock._renamed, []

    def late(part, place):
        monkeypatch.setattr(lock, "_renamed", rename)
        with Lock(tmp_path):
            pass
        third.append(Lock(tmp_path).__enter__())
        return rename(part, place)

    monkeypatch.setattr(lock, "_renamed", late)
    with pytest.raises(WorkdirInUse):
        Lock(tmp_path).__enter__()
    third[0].__exit__()
    assert not list(tmp_path.iterdir())


def test_processes_of_a_second_job_are_refused_before_they_meet(
    tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    require_free(workdir)
    leave_lock(workdir, host="other")
    job = ("--distributed", "localhost:1,2,1", "--workdir", str(workdir))
    monkeypatch.setattr(sys, "argv", ["examples.llama", "train", *job])
    assert __main__.main() == 69
    assert "is in use by process" in capsys.readouterr().err
    leave_lock(tmp_path / "old", host="other", age=150)
    require_free(tmp_path / "old")


def test_a_file_is_no_workdir(tmp_path, capsys, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    for workdir in (file, file / "below"):
        command = ["examples.llama", "train", "--workdir", str(workdir)]
        monkeypatch.setattr(sys, "argv", command)
        assert __main__.main() == 1
        told = f"error: {workdir}: {file} is a file, not a folder\n"
        assert capsys.readouterr().err == told
        require_free(workdir)  # Nobody is at work there.


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        *(
            json.dumps(holder(pid=pid)._asdict())
            for pid in ("1", 1.0, True, 0, -1, 2**70)
        ),
        json.dumps(holder()._asdict() | {"host": 1}),
    ],
    ids=range(11),
)
def test_a_damaged_lock_is_named(tmp_path, content):
    leave_lock(tmp_path)
    (tmp_path / "lock" / "holder.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"holder\.json is damaged: .* remove .*lock if"
    ):
        Lock(tmp_path).__enter__()


def test_a_lock_that_follows_itself_is_named(tmp_path):
    left = leave_lock(tmp_path)
    shutil.copytree(tmp_path / "lock", tmp_path / f"lock.{left.id}")
    with pytest.raises(ValueError, match="damaged: the chain of locks has no end"):
        Lock(tmp_path).__enter__()


@pytest.mark.parametrize("name", ["lock", "lock/holder.json"])
def test_a_file_or_a_folder_in_its_place_is_named(tmp_path, name):
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / "holder.json").mkdir()
    if name == "lock":
        shutil.rmtree(tmp_path / "lock")
        (tmp_path / "lock").write_text("")
    with pytest.raises(ValueError, match=r"damaged: .*; remove .*/lock if no run"):
        Lock(tmp_path).__enter__()


def test_what_is_no_lock_is_named(tmp_path):
    (tmp_path / "lock" / "mine").mkdir(parents=True)
    with pytest.raises(ValueError, match="lock is not a lock as it should be: remove"):
        Lock(tmp_path).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
