"""Muon with `param_shardings=`: each device orthogonalises its share of matrices."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from contract_cases import CASES, PAPER, assert_close, random_tree, run
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharding_cases import (
    AUTO,
    EXPLICIT,
    LARGE,
    LAYOUTS,
    MATRICES,
    SHAPES,
    compiled_update,
    make,
    train,
)

import lorapre_jax as lp
from benchmarks._collectives import collectives

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Two leaves of one matrix size share a stack; its five matrices leave devices idle.
LEAVES = SHAPES | {"again": (2, 2, 16, 32)}
ALL = lp.select_matrices(
    axes={
        "^heads$": lp.MatrixAxes(0, (1, 2)),
        "^(stack|w|again)$": lp.MatrixAxes(),
    }
)
MOMENTS = (lp.LowRank(residual_gain=0.6), PAPER, lp.Dense())
TRIPLES = [
    (layout, MOMENTS[i % 3], (AUTO, EXPLICIT)[i % 2])
    for i, layout in enumerate(LAYOUTS)
]


@pytest.mark.parametrize(("layout", "moment", "kind"), TRIPLES)
def test_trajectories_are_those_of_one_device(layout, moment, kind):
    fields = {"matrices": ALL, "moment": moment, "ns_steps": 2}
    params, *grads = (random_tree(LEAVES, seed) for seed in range(4))
    expected, expected_state = run(
        make("scale_by_muon", **fields), params, grads, jit=True
    )
    layout = LAYOUTS[layout]
    shardings = layout.shardings(params, kind)
    tx = make("scale_by_muon", param_shardings=shardings, **fields)
    params, *grads = (layout.shard(x, kind) for x in (params, *grads))
    updates, state = train(tx, params, grads, lp.state_sharding(tx, params))
    assert_close(updates, expected[-1], rtol=1e-3, atol=2e-3)
    assert_close(state, expected_state, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_matrices_are_exchanged_and_nothing_is_gathered(layout):
    """At most four times a device's share is sent, plus reductions of factors."""
    layout = LAYOUTS[layout]
    shardings = layout.shardings(LARGE, AUTO)
    tx = make("scale_by_muon", ns_steps=1, param_shardings=shardings)
    found = collectives(compiled_update(tx, layout))
    assert {x.kind for x in found} <= {"all-to-all", "all-reduce"}
    exchanged = sum(x.nbytes for x in found if x.kind == "all-to-all")
    assert exchanged <= 4 * 4 * sum(padded_share(layout, name) for name in LARGE)
    sides = [x for x in found if x.kind == "all-reduce"]
    assert all(math.prod(x.shape) <= 8 * 128 * 3 for x in sides), sides


def padded_share(layout, name) -> int:
    """Returns a leaf's elements per device if each device has whole matrices."""
    spec = layout.shardings(LARGE, AUTO)[name].spec
    *batch, p, q = (8, 64, 128) if name == "stack" else (64, 128)
    split = math.prod(
        layout.mesh[axis]
        for entry in spec[len(batch) :]
        for axis in (entry if isinstance(entry, tuple) else (entry,))
        if axis is not None
    )
    here = math.prod(batch) // (layout.mesh.get("layers", 1) if batch else 1)
    here //= layout.mesh.get("expert", 1) if batch else 1
    return math.ceil(here / split) * p * q


def test_the_alias_and_other_leaves():
    layout = LAYOUTS["both"]
    tree = random_tree(SHAPES | {"bias": (8,)})
    shardings = layout.shardings(tree, AUTO)
    make_alias = CASES["muon"].make
    fields: Any = {"rank": 3, "matrices": MATRICES, "ns_steps": 2}
    one = make_alias(**fields)
    expected, _ = run(one, tree, [tree], jit=True)
    params = layout.shard(tree, AUTO)
    tx = make_alias(param_shardings=shardings, **fields)
    updates, _ = train(tx, params, [params], lp.state_sharding(tx, params))
    assert_close(updates, expected[-1], rtol=1e-3, atol=2e-3)


def test_half_precision_gradients_travel_as_such():
    layout = LAYOUTS["both"]
    shardings = layout.shardings(LARGE, AUTO)
    tx = make("scale_by_muon", ns_steps=2, param_shardings=shardings)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_tree(LARGE))
    params = layout.shard(half, AUTO)
    updates, _ = train(tx, params, [params], lp.state_sharding(tx, params))
    expected, _ = run(make("scale_by_muon", ns_steps=2), half, [half], jit=True)
    assert_close(updates, expected[-1], rtol=0.05, atol=0.05)


def test_small_half_precision_gradients():
    """The residual is a small part of the gradient, which float16 would lose."""
    layout = LAYOUTS["both"]
    shardings = layout.shardings(SHAPES, AUTO)
    tx = make("scale_by_muon", ns_steps=2, param_shardings=shardings)
    params, *grads = (random_tree(SHAPES, seed) for seed in range(7))
    params = jax.tree.map(lambda x: x.astype(jnp.float16), params)
    small = [jax.tree.map(lambda x: (1e-6 * x).astype(jnp.float16), g) for g in grads]
    expected, _ = run(make("scale_by_muon", ns_steps=2), params, small, jit=True)
    params, *small = (layout.shard(x, AUTO) for x in (params, *small))
    updates, _ = train(tx, params, small, lp.state_sharding(tx, params))
    assert_close(updates, expected[-1], rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_gradients_of_several_dtypes_that_lie_elsewhere(kind):
    layout = LAYOUTS["both"]
    tree = {n: jnp.asarray(x, jnp.bfloat16) for n, x in random_tree(SHAPES).items()}
    grads = random_tree(SHAPES, 1)
    grads = grads | {"w": grads["w"].astype(jnp.bfloat16)}
    expected, _ = run(make("scale_by_muon", ns_steps=2), tree, [grads], jit=True)
    shardings = layout.shardings(tree, kind)
    tx = make("scale_by_muon", ns_steps=2, param_shardings=shardings)
    elsewhere = dataclasses.replace(layout, stack=P(None, "tensor", "fsdp"), w=P())
    with jax.numpy_dtype_promotion("strict"):
        state = tx.init(layout.shard(tree, kind))
        updates, _ = jax.jit(tx.update)(elsewhere.shard(grads, kind), state)
    assert_close(updates, expected[-1], rtol=0.05, atol=0.05)


def test_few_matrices_at_once():
    layout = LAYOUTS["layers"]
    layout = dataclasses.replace(layout, stack=P(None, "layers"))
    shapes = {"stack": (40, 16, 32)}
    params = random_tree(shapes)
    whole = make("scale_by_muon", ns_steps=2, matrices=lp.MatrixAxes())
    expected, _ = run(whole, params, [params], jit=True)
    tx = make(
        "scale_by_muon",
        ns_steps=2,
        matrices=lp.MatrixAxes(),
        param_shardings=layout.shardings(params, AUTO),
        slices_at_once=2,
    )
    params = layout.shard(params, AUTO)
    updates, _ = train(tx, params, [params], lp.state_sharding(tx, params))
    assert_close(updates, expected[-1], rtol=1e-3, atol=2e-3)


def test_on_one_device_there_is_nothing_to_share():
    params = random_tree(SHAPES)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    tx = make("scale_by_muon", ns_steps=2, param_shardings=shardings)
    expected, _ = run(make("scale_by_muon", ns_steps=2), params, [params])
    assert_close(run(tx, params, [params])[0], expected)
    mixed: Any = LAYOUTS["both"].shardings(params, AUTO) | {"w": shardings["w"]}
    with pytest.raises(ValueError, match="'w': `param_shardings` places it on one"):
        make("scale_by_muon", param_shardings=mixed).init(params)


@pytest.mark.parametrize(
    "spec", [P("fsdp", "tensor", None), P(None, ("tensor", "fsdp", "more"))]
)
def test_a_sharding_that_does_not_fit(spec):
    params = random_tree(SHAPES | {"w": (16, 12)})
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "tensor", "more"), (AUTO,) * 3)
    shardings: Any = {name: NamedSharding(mesh, P()) for name in params}
    tx = make(
        "scale_by_muon",
        param_shardings=shardings | {"w": NamedSharding(mesh, spec)},
    )
    with pytest.raises(ValueError, match=r"Leaf 'w': `param_shardings` has .*\(16, 12"):
        tx.init(params)


@pytest.mark.parametrize("sharding", [None, P("fsdp"), "missing"])
def test_a_leaf_without_a_sharding(sharding):
    layout = LAYOUTS["both"]
    params = random_tree(SHAPES)
    shardings: Any = layout.shardings(params, AUTO) | {"w": sharding}
    if sharding == "missing":
        del shardings["w"]
    tx = make("scale_by_muon", param_shardings=shardings)
    message = re.escape("Leaf 'w': `param_shardings` has") + ".*not a NamedSharding"
    with pytest.raises(ValueError, match=message):
        tx.init(params)
