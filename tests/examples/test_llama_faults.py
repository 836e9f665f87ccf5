"""Runs in other processes that are killed, damaged, or out of disk."""

import dataclasses
import shutil
import signal

import pytest
from command_line import finish
from outcome import assert_same_trees, checkpoint, losses


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, make_config):
    """Returns the configuration of an undisturbed run."""
    config = make_config(tmp_path_factory.mktemp("undisturbed"), "lorapre_adamw")
    done = finish(config, devices=1)
    assert (done.returncode, done.stderr) == (0, "")
    return config


@pytest.fixture
def config(undisturbed, tmp_path):
    """Returns the configuration of the same run in another folder."""
    return dataclasses.replace(undisturbed, workdir=tmp_path / "run")


@pytest.fixture
def resume(config, undisturbed):
    """Resumes to the undisturbed run's end; returns what was printed."""

    def to_the_end() -> str:
        done = finish(config, devices=1)
        assert (done.returncode, done.stderr) == (0, "")
        assert losses(config.workdir) == losses(undisturbed.workdir)
        for step in ("6", "12"):
            here, there = (
                checkpoint(run.workdir / "checkpoints" / step)
                for run in (config, undisturbed)
            )
            assert_same_trees(here, there)
        return done.stdout

    return to_the_end


def test_killed_between_saves(config, resume):
    killed = finish(config, devices=1, fault="killed_between_saves")
    assert killed.returncode == -signal.SIGKILL
    assert len(losses(config.workdir)) == 7  # No less than the checkpoint has.
    printed = resume()
    assert "going on after step 6" in printed
    assert "refused" not in printed


def test_killed_while_a_checkpoint_is_written(config, resume):
    killed = finish(config, devices=1, fault="killed_before_the_commit")
    assert killed.returncode == -signal.SIGKILL
    folders = sorted(path.name for path in (config.workdir / "checkpoints").iterdir())
    assert len(folders) == 2
    assert folders[0].startswith("12.")  # Orbax's name for what is unfinished.
    assert folders[1] == "6"
    printed = resume()
    assert "going on after step 6" in printed
    assert "refused" not in printed
    folders = {path.name for path in (config.workdir / "checkpoints").iterdir()}
    assert folders == {"6", "12"}


def test_killed_between_commit_and_digests(config, resume):
    killed = finish(config, devices=1, fault="killed_before_the_digests")
    assert killed.returncode == -signal.SIGKILL
    committed = config.workdir / "checkpoints" / "12"
    assert committed.is_dir()
    assert not (config.workdir / "digests" / "12.json").exists()
    printed = resume()
    assert f"checkpoint {committed} refused: its saving was interrupted" in printed
    assert "going on after step 6" in printed


def test_told_to_stop_in_the_last_save(config):
    stopped = finish(config, devices=1, fault="told_to_stop_in_the_last_save")
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert (config.workdir / "digests" / "12.json").exists()


def truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_a_damaged_checkpoint(config, undisturbed, resume, damage):
    shutil.copytree(undisturbed.workdir, config.workdir)
    folder = config.workdir / "checkpoints" / "12"
    files = [path for path in folder.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    damage(largest)
    printed = resume()
    assert f"checkpoint {folder} refused: {largest.relative_to(folder)} changed" in (
        printed
    )
    assert "going on after step 6" in printed


def test_a_full_disk(config, resume):
    failed = finish(config, devices=1, fault="disk_full")
    assert failed.returncode == 74
    path = config.workdir / "checkpoints" / "12"
    assert f"error: checkpoint {path} could not be written: " in failed.stderr
    assert "File too large" in failed.stderr
    assert "Run the same command again" in failed.stderr
    printed = resume()  # There is space again.
    assert "going on after step 6" in printed
    assert "refused" not in printed
