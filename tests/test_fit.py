"""Every function that reads a state refuses arrays that do not fit its plan."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import pytest
from contract_cases import CASES, Case, random_tree
from flax import nnx

import lorapre_jax as lp

pytestmark = pytest.mark.usefixtures("quick_compilation")

READERS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "update": lambda tx, state, params: tx.update(params, state, params),
    "traced update": lambda tx, state, params: jax.eval_shape(
        tx.update, params, state, params
    ),
    "describe": lambda tx, state, params: lp.describe(tx, params, state),
    "state_record": lambda tx, state, params: lp.state_record(state),
    "check_state_record": lambda tx, state, params: lp.check_state_record(
        lp.state_record(tx.init(params)), state
    ),
    "diagnostics": lambda tx, state, params: lp.diagnostics(state, params),
    "convert_state": lambda tx, state, params: lp.convert_state(state, tx, params),
}


@pytest.fixture(params=READERS)
def read(request) -> Callable[[Any, Any, Any], Any]:
    return READERS[request.param]


def with_arrays_of(other: Any, state: Any) -> Any:
    """Returns the structure of one state with the arrays of another."""
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(other))


def test_factors_of_another_rank(case: Case, read):
    params = case.tree()
    tx, other = case.make(), case.make(rank=1)
    state = with_arrays_of(other.init(params), tx.init(params))
    message = (
        r"Leaf 'heads': `(mu|nu|momentum|ema)_factors/heads/left` has shape \(12, 1\) "
        r"in the optimizer state, whose plan says \(12, 2\) for \w+\(.*\) at rank 2\. "
        r".*`saved_tx.init\(params\)`.*lorapre_jax.convert_state"
    )
    with pytest.raises(ValueError, match=message):
        read(tx, state, params)


def other_shape(**methods: Any) -> Any:
    """Returns a state of `w: (12, 8)` with the arrays of one of `w: (9, 8)`."""
    tx = lp.scale_by_lorapre_adam(2, matrices=lp.MatrixAxes(), **methods)
    params = {"w": jnp.ones((12, 8))}
    state = with_arrays_of(tx.init({"w": jnp.ones((9, 8))}), tx.init(params))
    return tx, state, params


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            {"first_moment": lp.Dense(), "second_moment": lp.Dense()},
            "`mu/w` has shape (9, 8) in the optimizer state, whose plan says (12, 8) "
            "for Dense(). ",
        ),
        (
            {"first_moment": lp.Dense(), "second_moment": lp.RankOne()},
            "`mu/w` has shape (9, 8)",
        ),
        ({}, "`mu_factors/w/left` has shape (9, 2)"),
        (
            {"first_moment": lp.AlgorithmOne(), "second_moment": lp.AlgorithmOne()},
            "`mu_factors/w/left` has shape (9, 2)",
        ),
    ],
)
def test_arrays_of_another_leaf(methods, message, read):
    tx, state, params = other_shape(**methods)
    with pytest.raises(ValueError, match=re.escape(f"Leaf 'w': {message}")):
        read(tx, state, params)


@pytest.mark.parametrize(
    ("field", "shape", "says"),
    [
        ("row", (9,), "(12,) for RankOne() at rank 2"),
        ("column", (3,), "(8,) for RankOne() at rank 2"),
        ("direction", (3,), "(2,) for RotatedRankOne() at rank 2"),
    ],
)
def test_statistics_of_another_shape(field, shape, says, read):
    second = None if field == "direction" else lp.RankOne()
    tx = lp.scale_by_lorapre_adam(2, matrices=lp.MatrixAxes(), second_moment=second)
    params = {"w": jnp.ones((12, 8))}
    state: Any = tx.init(params)
    wrong = state.nu_factors["w"]._replace(**{field: jnp.zeros(shape)})
    message = f"`nu_factors/w/{field}` has shape {shape} in the optimizer state, whose "
    with pytest.raises(ValueError, match=re.escape(f"{message}plan says {says}")):
        read(tx, state._replace(nu_factors={"w": wrong}), params)


def test_what_is_missing(read):
    tx, state, params = other_shape()
    message = "`mu_factors/w/left` is missing|no array or sharding 'mu_factors/w/left'"
    with pytest.raises(ValueError, match=message):
        read(tx, state._replace(mu_factors={}), params)


def test_what_flax_reads_back():
    """Flax accepts factors of any rank, with the plan of the target state."""
    params = {"w": jnp.ones((12, 8))}
    tx, saved_tx = (
        optax.chain(lp.lorapre_adamw(1e-3, rank, matrices=lp.MatrixAxes()))
        for rank in (4, 2)
    )
    saved = flax.serialization.to_bytes(saved_tx.init(params))
    wrong = flax.serialization.from_bytes(tx.init(params), saved)
    with pytest.raises(ValueError, match=r"\(12, 2\) in the .* says \(12, 4\)"):
        tx.update(params, wrong, params)
    right = flax.serialization.from_bytes(saved_tx.init(params), saved)
    state = lp.convert_state(right, tx, params)
    tx.update(params, state, params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
    """A box, as in test_boxes."""

    array: Any
    names: tuple[str | None, ...] = dataclasses.field(metadata={"static": True})


BOXES: dict[str, Callable[[Any], Any]] = {
    "Partitioned": lambda x: nn.Partitioned(x, ("a", "b")),
    "Variable": lambda x: nnx.Param(x, out_sharding=("a", "b"), eager_sharding=False),
    "registered": lambda x: Box(x, ("a", "b")),
}


@pytest.fixture(autouse=True, scope="module")
def box_is_registered():
    lp.register_box(
        Box,
        lambda box: box.names,
        lambda box, array, axes: Box(
            array, tuple(None if i is None else box.names[i] for i in axes)
        ),
    )


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_boxed_states(box, read):
    tx, other = (
        lp.scale_by_lorapre_adam(rank, matrices=lp.MatrixAxes()) for rank in (2, 1)
    )
    params = {"w": box(jnp.ones((12, 8)))}
    read(tx, tx.init(params), params)
    state = with_arrays_of(other.init(params), tx.init(params))
    with pytest.raises(ValueError, match=r"'w': .*/left` has shape \(12, 1\)"):
        read(tx, state, params)
    dense = lp.scale_by_lorapre_adam(
        2, first_moment=lp.Dense(), second_moment=lp.Dense()
    )
    state = with_arrays_of(dense.init({"w": box(jnp.ones((9, 8)))}), dense.init(params))
    with pytest.raises(ValueError, match=r"'w': `mu/w` has shape \(9, 8\)"):
        read(dense, state, params)


@pytest.mark.parametrize("name", CASES)
def test_a_stack_of_states(name):
    """A stack, as for several seeds, can be reported, and an error in it is found."""
    case = CASES[name]
    several = jax.tree.map(lambda x: jnp.stack([x, x, x]), case.tree())
    tx, other = case.make(), case.make(rank=1)
    state = jax.vmap(tx.init)(several)
    assert lp.state_record(state) == lp.state_record(tx.init(case.tree()))
    jax.eval_shape(jax.vmap(tx.update), several, state, several)
    wrong = with_arrays_of(jax.vmap(other.init)(several), state)
    with pytest.raises(ValueError, match=r"\(3, 12, 1\) in .* says \(3, 12, 2\)"):
        lp.state_record(wrong)
    with pytest.raises(ValueError, match=r"\(12, 1\) in .* says \(12, 2\)"):
        jax.vmap(tx.update)(several, wrong, several)


def test_what_is_no_array_passes():
    """Abstract values, shardings, masked leaves and optax's placeholder."""
    params = random_tree({"w": (12, 8), "bias": (8,)})
    ours = lp.scale_by_lorapre_adam(2, matrices=lp.select_matrices("^w$"))
    tx = optax.masked(ours, {"w": True, "bias": False})
    record = lp.state_record(tx.init(params))
    assert lp.state_record(jax.eval_shape(tx.init, params)) == record
    places = lp.state_sharding(tx, params)
    assert lp.state_record(places) == record
    assert lp.describe(tx, params, places).device_bytes
    tx.update(params, tx.init(params), params)
    optax.tree_utils.tree_map_params(tx, lambda x: x, tx.init(params))
