"""Layers that are separate leaves share programs, as if they were one stacked leaf."""

import math

import jax
import jax.numpy as jnp
import pytest
from contract_cases import CASES as ALL
from contract_cases import TRANSFORMS, assert_close, plan_of, random_tree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorapre_jax as lp
from benchmarks._collectives import collectives
from lorapre_jax._leaves import map_leaves, stacks
from lorapre_jax._leaves.plan import FactoredLeaf

pytestmark = pytest.mark.usefixtures("quick_compilation")

LAYERS, SHAPE = 4, (16, 24)
MATRIX = lp.MatrixAxes(-2, -1)
CASES = {name: ALL[name] for name in TRANSFORMS}


def make(name: str, **overrides):
    return CASES[name].make(matrices=MATRIX, **overrides)


def layers(count: int = LAYERS, seed: int = 0):
    """A matrix of each layer, and one whose path differs by more than a number."""
    shapes = {f"layers_{i}": SHAPE for i in range(count)} | {"out": SHAPE}
    return random_tree(shapes, seed)


def stacked(tree):
    first, *_ = names = [name for name in tree if name != "out"]
    assert first == "layers_0"
    return {"layers": jnp.stack([tree[name] for name in names]), "out": tree["out"]}


def trajectory(tx, grads):
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    assert all(isinstance(leaf, FactoredLeaf) for leaf in plan_of(state).leaves)
    for g in grads:
        updates, state = update(g, state)
    return updates, state


@pytest.fixture
def seen(monkeypatch):
    """The paths of the leaves of each stack that the rule was applied to."""
    found = []

    def watched(*args):
        for stack in stacks.stacks(*args):
            found.append([leaf.path for leaf in stack])
            yield stack

    monkeypatch.setattr(map_leaves, "stacks", watched)
    return found


@pytest.mark.parametrize(
    ("name", "at_once"), [(name, 2) for name in CASES] + [("adam", 1), ("adam", LAYERS)]
)
def test_the_update_is_that_of_a_stacked_leaf(monkeypatch, seen, name, at_once):
    monkeypatch.setattr(map_leaves, "AT_ONCE", at_once * math.prod(SHAPE))
    grads = [layers(seed=seed) for seed in range(3)]
    updates, state = trajectory(make(name), grads)
    assert [f"layers_{i}" for i in range(LAYERS)] in seen
    expected, _ = trajectory(make(name), list(map(stacked, grads)))
    assert_close(stacked(updates), expected, rtol=1e-4, atol=1e-5)
    assert plan_of(state) == plan_of(make(name).init(grads[0]))


def test_a_stack_has_a_largest_size(monkeypatch, seen):
    """What is copied is bounded; the same updates come in several stacks."""
    grads = [layers(seed=seed) for seed in range(2)]
    expected, _ = trajectory(make("ema"), grads)
    seen.clear()
    monkeypatch.setattr(stacks, "_LARGEST", 3 * math.prod(SHAPE))
    updates, _ = trajectory(make("ema"), grads)
    assert sorted(map(len, seen))[-3:] == [1, 1, 3]
    assert_close(updates, expected, rtol=1e-4, atol=1e-5)


def test_a_stack_of_large_leaves_is_a_part_of_all(seen):
    """And a leaf that is larger than that is never copied."""
    shapes = {f"layers/{i}/up": (2048, 8192) for i in range(40)}
    params = {k: jax.ShapeDtypeStruct(v, "float32") for k, v in shapes.items()}
    tx = lp.lorapre_ema(0.9, 4, matrices=MATRIX)
    jax.eval_shape(lambda g: tx.update(g, tx.init(g)), params)
    assert max(map(len, seen)) == 2  # A sixteenth of forty.
    few = dict(list(params.items())[:3])
    seen.clear()
    jax.eval_shape(lambda g: tx.update(g, tx.init(g)), few)
    assert max(map(len, seen)) == 1


def test_leaves_that_are_not_alike_are_apart(seen):
    shapes = {
        "layers_0/q": SHAPE,
        "layers_0/k": SHAPE,  # Perhaps sharded otherwise.
        "layers_1/q": SHAPE[::-1],
        "layers_2/q": SHAPE,
        "layers_3/q": SHAPE,
        "layers_0/w1": SHAPE,
        "layers_0/w3": SHAPE,
    }
    params = random_tree(shapes)
    params["layers_2/q"] = params["layers_2/q"].astype(jnp.bfloat16)
    tx = make("ema", moment={"layers_3": lp.LowRank(0.5), "layers_[012]": lp.LowRank()})
    tx.update(params, tx.init(params))
    assert sorted(seen) == [[name] for name in sorted(shapes)]


def test_slices_that_the_user_asks_for(seen):
    """Leaves with batch axes keep them, and a stack is computed in such slices too."""
    shapes = {f"layers_{i}/w": SHAPE for i in range(3)}
    shapes |= {f"layers_{i}/experts": (4, *SHAPE) for i in range(3)}
    grads = [random_tree(shapes, seed) for seed in range(2)]
    expected, _ = trajectory(make("adam"), grads)
    assert sorted(map(len, seen))[-2:] == [3, 3]
    seen.clear()
    updates, _ = trajectory(make("adam", slices_at_once=1), grads)
    assert sorted(map(len, seen))[-4:] == [1, 1, 1, 3]
    assert_close(updates, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_program_hardly_grows_with_the_layers(name):
    def lines(count: int) -> int:
        params, tx = layers(count), make(name)
        lowered = jax.jit(tx.update).lower(params, tx.init(params))
        return lowered.as_text().count("\n")

    few, many = lines(6), lines(12)
    assert many - few < 6 * 40
    assert lines(1) > 150  # One program is much more than a layer adds.


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", CASES)
def test_sharded_layers(name, kind):
    mesh = jax.make_mesh(
        (2, 2), ("fsdp", "tensor"), (kind,) * 2, devices=jax.devices()[:4]
    )
    place = NamedSharding(mesh, P("fsdp", "tensor"))
    grads = [layers(seed=seed) for seed in range(2)]
    expected, _ = trajectory(make(name), grads)
    grads = jax.device_put(grads, place)
    tx = make(name)
    places = lp.state_sharding(tx, grads[0])
    state = jax.jit(tx.init, out_shardings=places)(grads[0])
    out = jax.tree.map(lambda x: x.sharding, grads[0]), places
    update = jax.jit(tx.update, out_shardings=out)
    program = update.lower(grads[0], state).compile().as_text()
    for g in grads:
        updates, state = update(g, state)
    assert_close(updates, expected, rtol=1e-3, atol=2e-3)
    assert program is not None
    if name != "scale_by_muon":  # Which gathers, unless it is told the shardings.
        assert {x.kind for x in collectives(program)} == {"all-reduce"}
