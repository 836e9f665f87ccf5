"""Restoring into another state than was saved: one error lists differences."""

import json
from fractions import Fraction

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

import lorapre_jax as lp

SHAPES = {"bias": (8,), "square": (16, 16), "stack": (2, 16, 32)}
PARAMS = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in SHAPES.items()}
DENSE_FIRST = {"first_moment": lp.Dense(), "second_moment": lp.RankOne()}
AXES = {"square": lp.MatrixAxes(0, 1), "stack": lp.MatrixAxes()}


def state(params=PARAMS, rank: int | Fraction = 4, axes=AXES, exclude=(), **fields):
    matrices = lp.select_matrices(axes=axes, exclude=exclude)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        lp.lorapre_adamw(1e-3, rank, matrices=matrices, **fields),
    )
    return jax.eval_shape(tx.init, params)


RECORD = json.loads(json.dumps(lp.state_record(state())))


def test_the_same_fits():
    lp.check_state_record(RECORD, state())
    lp.check_state_record(RECORD, state(rank=Fraction(1, 4)))  # As much here.
    assert RECORD == {
        "1/0": {
            "bias": {"shape": [8], "matrices": None, "rank": None,
                     "moments": ["Dense", "Dense"]},
            "square": {"shape": [16, 16], "matrices": "rows [0], columns [1]",
                       "rank": 4, "moments": ["LowRank", "RotatedRankOne"]},
            "stack": {"shape": [2, 16, 32], "matrices": "rows [1], columns [2]",
                      "rank": 4, "moments": ["LowRank", "RotatedRankOne"]},
        }
    }  # fmt: skip


@pytest.mark.parametrize(
    ("other", "lines"),
    [
        (
            {"rank": 2},
            ["square: rank 4 when saved, 2 now", "stack: rank 4 when saved, 2 now"],
        ),
        ({"exclude": ["square"]}, ["square: rank 4 when saved, None now"]),
        (
            {"axes": AXES | {"square": lp.MatrixAxes(1, 0)}},
            [
                "square: matrices rows [0], columns [1] when saved, "
                "rows [1], columns [0] now"
            ],
        ),
        (
            {"second_moment": lp.LowRank()},
            ["square: moments [", "'RotatedRankOne'] when saved", "stack: moments ["],
        ),
        (
            {"params": PARAMS | {"square": jax.ShapeDtypeStruct((16, 4), jnp.float32)}},
            [
                "square: shape [16, 16] when saved, [16, 4] now; "
                "rank 4 when saved, None now"
            ],
        ),
        (
            {"params": PARAMS | {"bias": jax.ShapeDtypeStruct((9,), jnp.float32)}},
            ["bias: shape [8] when saved, [9] now", "another model"],
        ),
        (
            {"params": {n: x for n, x in PARAMS.items() if n != "bias"}},
            ["bias: only in the saved state"],
        ),
    ],
)
def test_another_one_does_not(other, lines):
    """In two of these cases all shapes are the same."""
    with pytest.raises(ValueError, match="of another optimizer or model") as error:
        lp.check_state_record(RECORD, state(**other))
    for line in [*lines, "lorapre_jax.convert_state(state, tx, params)"]:
        assert line in str(error.value)
    same = {*SHAPES} - {line.split(":")[0] for line in lines}
    assert not any(f"  {path}:" in str(error.value) for path in same)


def test_nor_do_methods_without_a_rank():
    """Only the methods tell here that a leaf is dense."""
    saved = lp.state_record(state(**DENSE_FIRST))
    with pytest.raises(ValueError, match=r"square: .*; moments \['Dense', 'RankOne'\]"):
        lp.check_state_record(saved, state(**DENSE_FIRST, exclude=["square"]))


def test_a_state_of_optax_does_not():
    adamw = jax.eval_shape(optax.adamw(1e-3).init, PARAMS)
    assert lp.state_record(adamw) == {}
    lp.check_state_record({}, adamw)
    with pytest.raises(ValueError, match="stack: not in the saved state"):
        lp.check_state_record(lp.state_record(adamw), state())


@pytest.mark.parametrize("record", [None, {"step": 5}, {"1/0": {"square": {}}}])
def test_what_is_no_record(record):
    with pytest.raises(ValueError, match="is not a record of a state"):
        lp.check_state_record(record, state())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # The gain is no part of the state: it says how the factors are read.
        *(({}, {"first_moment": lp.LowRank(residual_gain=x)}) for x in (1, 0.5)),
        # Nor is a rank where nothing has it.
        (
            {**DENSE_FIRST, "rank": 2},
            {**DENSE_FIRST, "rank": 4},
        ),
    ],
)
def test_states_that_mean_the_same_fit(one, other):
    lp.check_state_record(lp.state_record(state(**one)), state(**other))


def test_a_part_of_a_chain_is_named():
    average = lp.lorapre_ema(0.9, 4, matrices=lp.MatrixAxes())
    params = {"square": PARAMS["square"]}
    twice = jax.eval_shape(optax.chain(average, average).init, params)
    once = jax.eval_shape(optax.chain(average, optax.identity()).init, params)
    with pytest.raises(ValueError, match=r"square \(in '1' of the state\): not in"):
        lp.check_state_record(lp.state_record(once), twice)


def test_it_goes_with_an_orbax_checkpoint(tmp_path):
    tx = lp.lorapre_adamw(1e-3, 4, matrices=lp.MatrixAxes())
    params = {"square": jnp.ones((16, 16))}
    saved = tx.init(params)
    with ocp.StandardCheckpointer() as checkpointer:
        record = lp.state_record(saved)
        checkpointer.save(tmp_path / "state", saved, custom_metadata=record)
        checkpointer.wait_until_finished()
        found = checkpointer.metadata(tmp_path / "state").custom_metadata
        assert found is not None
        lp.check_state_record(found, saved)
        assert found == record
