"""Checkpoints that are not what was saved, on real files."""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lorapre_jax as lp
from examples.llama import files
from examples.llama.checkpoint import Checkpoints, DamagedCheckpoint

STATE = {"w": jnp.arange(4096.0), "step": jnp.asarray(0)}


def state_of(step):
    return jax.tree.map(lambda x: x + step, STATE)


@pytest.fixture
def workdir(tmp_path):
    """Two checkpoints, of steps 6 and 12."""
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
    assert kept == ["12.json", "6.json"]


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
    """Killed after Orbax's commit, before the digests."""
    (workdir / "digests" / "12.json").unlink()
    with Checkpoints(workdir) as checkpoints:
        assert "saving was interrupted" in checkpoints.set_aside[0]
        assert checkpoints.latest_step == 6


def test_one_whose_deletion_was_interrupted_is_no_damage(workdir):
    """Killed after the third was committed, while the first was deleted."""
    shutil.copytree(workdir / "checkpoints" / "12", workdir / "checkpoints" / "18")
    lose_a_file(workdir / "checkpoints" / "6")
    with Checkpoints(workdir) as checkpoints:
        (line,) = checkpoints.set_aside
        assert "18 refused: its saving was interrupted" in line
        assert checkpoints.latest_step == 12
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["12"]
    assert [path.name for path in (workdir / "digests").iterdir()] == ["12.json"]


def test_a_first_one_that_was_interrupted_is_no_loss(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, STATE)
    shutil.rmtree(tmp_path / "digests")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step is None


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


def test_digests_that_cannot_be_read(workdir):
    (workdir / "digests" / "12.json").write_text("{")
    with Checkpoints(workdir) as checkpoints:
        assert "12.json cannot be read" in checkpoints.set_aside[0]
        assert checkpoints.latest_step == 6


def test_another_optimizer_is_refused_leaf_by_leaf(tmp_path):
    """Both states have the same shapes."""
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
