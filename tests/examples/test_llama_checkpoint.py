"""Checkpoints whose files are not what was saved."""

import os
import shutil
import uuid
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lorapre_jax as lp
from examples.llama import files
from examples.llama.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    SaveFailed,
    newest,
)

STATE = {"w": jnp.arange(4096.0), "step": jnp.asarray(0)}


def state_of(step):
    return jax.tree.map(lambda x: x + step, STATE)


@pytest.fixture
def workdir(tmp_path):
    """Returns a workdir with checkpoints of steps 6 and 12."""
    with Checkpoints(tmp_path) as checkpoints:
        for step in (3, 6, 12):
            checkpoints.save(step, state_of(step))
    return tmp_path


def largest_file(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def truncate(folder):
    file = largest_file(folder)
    file.write_bytes(file.read_bytes()[:-7])


def flip_a_bit(folder):
    file = largest_file(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose_a_file(folder):
    largest_file(folder).unlink()


def restored(checkpoints):
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), STATE)
    return checkpoints.restore(abstract)


def test_a_good_one_is_restored(workdir):
    with Checkpoints(workdir) as checkpoints:
        assert not checkpoints.set_aside
        assert checkpoints.latest_step == 12
        np.testing.assert_array_equal(restored(checkpoints)["w"], state_of(12)["w"])
    kept = sorted(path.name for path in (workdir / "digests").iterdir())
    assert kept == ["12.json", "6.json", "run"]


@pytest.mark.parametrize("spec", [P("x"), P()], ids=["sharded", "replicated"])
def test_what_is_donated_while_it_is_written_is_saved_as_it_was(tmp_path, spec):
    sharding = NamedSharding(jax.make_mesh((8,), ("x",)), spec)
    make = jax.jit(partial(jax.random.normal, shape=(2**20,)), out_shardings=sharding)
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    advance(make(jax.random.key(0)))  # Compiled by now.

    def goes_on_before_the_commit(step: int) -> bool:
        x = make(jax.random.key(step))
        checkpoints.save(step, {"x": x})
        for _ in range(3):
            x = advance(x)
        jax.block_until_ready(x)
        return not checkpoints.path(step).exists()

    with Checkpoints(tmp_path) as checkpoints:
        # Where the machine is busy the writer may be quicker, once or twice.
        assert any(goes_on_before_the_commit(step) for step in range(1, 6))
    with Checkpoints(tmp_path) as checkpoints:
        step = checkpoints.latest_step
        assert step is not None
        x = make(jax.random.key(step))
        there = checkpoints.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})
    np.testing.assert_array_equal(there["x"], x)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_a_file])
def test_a_damaged_one_is_refused_by_name_and_the_one_before_used(workdir, damage):
    file = largest_file(workdir / "checkpoints" / "12")
    damage(workdir / "checkpoints" / "12")
    with Checkpoints(workdir) as checkpoints:
        (line,) = checkpoints.set_aside
        assert f"{workdir / 'checkpoints' / '12'} refused" in line
        assert file.name in line
        assert checkpoints.latest_step == 6
        assert not (workdir / "digests" / "12.json").exists()
        np.testing.assert_array_equal(restored(checkpoints)["w"], state_of(6)["w"])
        checkpoints.save(12, state_of(12))  # The run comes by again.
    assert (workdir / "damaged" / "12").is_dir()
    with Checkpoints(workdir) as checkpoints:
        assert not checkpoints.set_aside
        assert checkpoints.latest_step == 12


def test_one_whose_saving_was_interrupted_is_saved_again(workdir):
    """The run was killed after Orbax's commit, before the digests were written."""
    (workdir / "digests" / "12.json").unlink()
    with Checkpoints(workdir) as checkpoints:
        assert "saving was interrupted" in checkpoints.set_aside[0]
        assert checkpoints.latest_step == 6
        assert (workdir / "damaged" / "12-unfinished").is_dir()
        checkpoints.save(9, state_of(9))
    assert not list((workdir / "damaged").iterdir())  # It is of no use any more.


def test_what_killed_writers_leave_is_cleared(workdir):
    part = f"{uuid.uuid4().hex}.part"
    left = [workdir / "digests" / f"12.json.{part}", workdir / f"config.yaml.{part}"]
    mine = [workdir / "digests" / "notes.json", workdir / "notes.part"]
    for path in (*left, *mine):
        path.write_text("{")
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(15, state_of(15))
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in mine)
    assert (workdir / "digests" / "15.json").exists()


def move(folder, source, target):
    """Moves a checkpoint and its digests."""
    for kind, suffix in (("checkpoints", ""), ("digests", ".json")):
        (folder / kind / f"{source}{suffix}").rename(
            folder / kind / f"{target}{suffix}"
        )


def test_a_checkpoint_under_another_name_is_refused(workdir):
    move(workdir, 12, 15)
    with Checkpoints(workdir) as checkpoints:
        assert "is the checkpoint of step 12, renamed" in checkpoints.set_aside[0]
        assert checkpoints.latest_step == 6


def test_two_that_changed_their_names_are_refused(workdir):
    for source, target in ((6, 7), (12, 6), (7, 12)):
        move(workdir, source, target)
    with pytest.raises(DamagedCheckpoint, match="of step 12, renamed"):
        Checkpoints(workdir)


def test_the_checkpoint_of_another_run_is_refused(workdir, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    with Checkpoints(other) as checkpoints:
        checkpoints.save(15, state_of(15))
    for kind, name in (("checkpoints", "15"), ("digests", "15.json")):
        (other / kind / name).rename(workdir / kind / name)
    run = workdir / "digests" / "run"
    with Checkpoints(workdir) as checkpoints:
        assert f"of another run than that of {run}" in checkpoints.set_aside[0]
        assert checkpoints.latest_step == 12
    (workdir / "digests" / "run").unlink()  # Its own digests tell as well.
    with Checkpoints(workdir) as checkpoints:
        assert not checkpoints.set_aside
        assert checkpoints.latest_step == 12


@pytest.mark.parametrize("content", [b"", b"\xff", b"0", b"x" * 32])
def test_a_damaged_name_of_the_run_is_no_obstacle(workdir, content):
    run = workdir / "digests" / "run"
    name = run.read_bytes()
    run.write_bytes(content)
    assert newest(workdir).name == "12"
    with Checkpoints(workdir) as checkpoints:
        assert not checkpoints.set_aside
    assert run.read_bytes() == name


@pytest.mark.parametrize("what", ["emptied", "removed", "never there"])
def test_a_run_whose_checkpoints_are_gone_is_no_new_one(workdir, what):
    shutil.rmtree(workdir / "checkpoints")
    if what == "emptied":  # As where a disk is mounted.
        (workdir / "checkpoints").mkdir()
    if what == "never there":
        shutil.rmtree(workdir / "digests")
        (workdir / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DamagedCheckpoint, match="are gone, though") as error:
        Checkpoints(workdir)
    assert str(workdir / "checkpoints") in str(error.value)


def test_a_failure_of_the_last_save_is_named(tmp_path, monkeypatch):
    """Whatever error closing the manager raises."""

    def broken(*_):
        raise RuntimeError("closed in a bad state")

    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(files, "digests", lambda _: os.write(-1, b""))
    monkeypatch.setattr(type(checkpoints._manager), "close", broken)
    with (
        pytest.raises(SaveFailed, match=r"3 could not be written: .*Bad file"),
        checkpoints,
    ):
        checkpoints.save(3, STATE)


def test_one_whose_deletion_was_interrupted_is_no_damage(workdir):
    """The run was killed after the third commit, while the first was being deleted."""
    shutil.copytree(workdir / "checkpoints" / "12", workdir / "checkpoints" / "18")
    lose_a_file(workdir / "checkpoints" / "6")
    with Checkpoints(workdir) as checkpoints:
        (line,) = checkpoints.set_aside
        assert "18 refused: its saving was interrupted" in line
        assert checkpoints.latest_step == 12
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["12"]
    names = {path.name for path in (workdir / "digests").iterdir()}
    assert names == {"12.json", "run"}


def test_a_first_one_that_was_interrupted_is_no_loss(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, STATE)
    (tmp_path / "digests" / "3.json").unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step is None


def test_a_single_one_that_has_lost_its_digests_is_not_taken_for_interrupted(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, STATE)
    shutil.rmtree(tmp_path / "digests")
    with pytest.raises(DamagedCheckpoint, match=r"3\.json is missing"):
        Checkpoints(tmp_path)
    assert (tmp_path / "checkpoints" / "3").is_dir()


def test_one_that_comes_after_another_is_not_the_first(workdir):
    """The first one is lost; a run that starts anew would lose all of it."""
    shutil.rmtree(workdir / "checkpoints" / "6")
    (workdir / "digests" / "12.json").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"left\. Give another `workdir`"):
        Checkpoints(workdir)
    assert (workdir / "checkpoints" / "12").is_dir()


def test_imported_weights_are_never_unfinished(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, STATE)
    (tmp_path / "digests" / "0.json").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"0\.json is missing"):
        Checkpoints(tmp_path)
    assert (tmp_path / "checkpoints" / "0").is_dir()


def test_where_none_is_good_nothing_is_begun_silently(workdir):
    for step in ("6", "12"):
        flip_a_bit(workdir / "checkpoints" / step)
    for _ in range(2):
        with pytest.raises(DamagedCheckpoint, match="None is left") as error:
            Checkpoints(workdir)
        for step in ("6", "12"):
            assert f"{workdir / 'checkpoints' / step} refused" in str(error.value)


def test_older_ones_without_digests_are_not_taken_for_interrupted(workdir):
    shutil.rmtree(workdir / "digests")
    with pytest.raises(DamagedCheckpoint, match=r"6\.json is missing"):
        Checkpoints(workdir)


NAMELESS = '{"run": 1, "step": 12, "files": {}}'
LISTED = f'{{"run": "{"a" * 32}", "step": 12, "files": {{"a": ["b"]}}}}'


@pytest.mark.parametrize(
    "content", ["{", "", "[]", '{"a": 1}', "null", NAMELESS, LISTED]
)
def test_digests_that_cannot_be_read(workdir, content):
    (workdir / "digests" / "12.json").write_text(content)
    (workdir / "digests" / "run").unlink()  # The other one has its name, too.
    with Checkpoints(workdir) as checkpoints:
        assert "12.json cannot be read" in checkpoints.set_aside[0]
        assert checkpoints.latest_step == 6


def test_another_optimizer_is_refused_leaf_by_leaf(tmp_path):
    """The shapes of both states are the same."""
    params = {"w": jnp.ones((16, 16))}
    rows, columns = (
        lp.scale_by_lorapre_adam(4, matrices=axes).init(params)
        for axes in (lp.MatrixAxes(0, 1), lp.MatrixAxes(1, 0))
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, rows)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(jax.eval_shape(lambda: rows))
        with pytest.raises(ValueError, match=r"w: matrices rows \[0\]") as error:
            checkpoints.restore(jax.eval_shape(lambda: columns))
    assert "convert_state" in str(error.value)


def test_what_ended_the_run_is_told_before_what_could_not_be_saved(
    tmp_path, monkeypatch
):
    def broken(*_):
        raise OSError("No space left")

    monkeypatch.setattr(files, "digests", broken)
    with pytest.raises(RuntimeError, match="the fault") as error:  # noqa: SIM117, PT012
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(3, STATE)
            raise RuntimeError("the fault")
    assert "could not be written: No space left" in error.value.__notes__[0]
