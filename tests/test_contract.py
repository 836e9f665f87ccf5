"""The optax contract: what every transform does on factored leaves."""

import copy
import inspect
import itertools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_cases import (
    CASES,
    FACTORED,
    TRANSFORMS,
    assert_close,
    assert_same,
    factored_paths,
    gradients,
    is_masked,
    only_w,
    plan_of,
    run,
    shapes_of,
    w_trees,
)

import lorapre_jax as lp

pytestmark = pytest.mark.usefixtures("quick_compilation")

tree_get = optax.tree_utils.tree_get


# What is public.


def test_nothing_else_is_public():
    names = {name for name in dir(lp) if not name.startswith("_")}
    assert names == set(lp.__all__)


@pytest.mark.parametrize("alias", [lp.lorapre_adamw, lp.lorapre_muon])
def test_learning_rate_annotation_is_an_object(alias):
    """optax's checks and config tools compare it, so it must not be a string."""
    annotation = inspect.signature(alias).parameters["learning_rate"].annotation
    assert annotation == optax.ScalarOrSchedule
    assert not isinstance(annotation, str)


# The state.


def test_every_matrix_of_the_cases_is_factored(case):
    tx, params = case.make(), case.tree()
    assert factored_paths(tx, params) == FACTORED
    in_state = [tree_get(tx.init(params), factors) for _, factors in case.fields]
    assert frozenset().union(*in_state) == FACTORED


@pytest.mark.parametrize("name", TRANSFORMS)
def test_state_is_a_named_tuple_of_its_own(name):
    case = CASES[name]
    state: Any = case.make().init(case.tree())
    assert type(state).__name__ in {
        "ScaleByLorapreAdamState",
        "ScaleByLorapreMuonState",
        "LorapreEmaState",
    }
    pairs = itertools.chain(*case.fields)
    assert set(type(state)._fields) == {"count", *pairs, "plan"}


def test_count_is_int32_and_saturates(case):
    """The count must stay at its maximum; an overflow would restart bias correction."""
    tx, params = case.make(), case.tree()
    state = tx.init(params)
    most = jnp.asarray(jnp.iinfo(jnp.int32).max, jnp.int32)

    def is_count(path, x):
        del x
        return getattr(path[-1], "name", None) == "count"

    counts = [
        x for path, x in jax.tree_util.tree_leaves_with_path(state) if is_count(path, x)
    ]
    assert counts
    assert all(count.dtype == jnp.int32 and count.shape == () for count in counts)
    late = jax.tree_util.tree_map_with_path(
        lambda path, x: most if is_count(path, x) else x, state
    )
    updates, late = tx.update(case.tree(1), late, params)
    for path, x in jax.tree_util.tree_leaves_with_path(late):
        if is_count(path, x):
            assert x == most
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))


def test_factors_are_dicts_by_leaf_path(case):
    """A path joins all keys on the way to the leaf, including positions in lists."""
    params = {"blocks": [{"w": jnp.ones((12, 8))}, {"w": jnp.ones((12, 8))}]}
    state = only_w(case).init(params)
    held = [tree_get(state, name) for _, name in case.fields]
    assert all(type(factors) is dict for factors in held)
    assert {path for factors in held for path in factors} == {
        "blocks/0/w",
        "blocks/1/w",
    }


def test_dense_moments_keep_the_parameter_tree(case):
    """They have a MaskedNode exactly for leaves whose moment is factored."""
    params = case.tree()
    state = case.make().init(params)
    for tree_name, factors_name in case.fields:
        factors = tree_get(state, factors_name)
        trees = optax.tree_utils.tree_get_all_with_path(state, tree_name)
        kept = [tree for _, tree in trees]
        for tree in kept:
            assert jax.tree.structure(tree, is_leaf=is_masked) == (
                jax.tree.structure(params)
            )
        for name, param in params.items():
            held = [tree[name] for tree in kept if not is_masked(tree[name])]
            # The alias of Muon leaves what is no matrix to Adam, in fields of its own.
            elsewhere = case.factory is lp.lorapre_muon and name == "bias"
            assert len(held) == (0 if name in factors or elsewhere else 1)
            for moment in held:
                assert moment.shape == param.shape


def test_no_array_in_the_state_is_empty(case):
    """Orbax refuses to write zero-size arrays."""
    params = case.tree() | {"empty": jnp.zeros((0, 4))}
    state = case.make().init(params)
    assert all(leaf.size for leaf in jax.tree.leaves(state))


def test_plan_is_static_and_without_leaves(case):
    state = case.make().init(case.tree())
    plan = plan_of(state)
    assert jax.tree.leaves(plan) == []
    again = plan_of(case.make().init(case.tree(7)))
    assert again is not plan
    assert again == plan
    assert hash(again) == hash(plan)
    assert jax.tree.structure(plan) == jax.tree.structure(again)
    assert plan != plan_of(case.make(rank=1).init(case.tree()))


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_plan_survives_copies(case, copied):
    plan = plan_of(case.make().init(case.tree()))
    again = copied(plan)
    assert again == plan
    assert hash(again) == hash(plan)
    assert jax.tree.structure(again) == jax.tree.structure(plan)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_tree_get_finds_every_field(name):
    case = CASES[name]
    state: Any = case.make().init(case.tree())
    for field in state._fields:
        found = tree_get(state, field)
        assert found is getattr(state, field)


# Initialisation.


def test_init_is_the_same_from_anything(case):
    """From arrays, abstract values, `eval_shape` and jit, with one random start."""
    tx, params = case.make(), case.tree()
    abstract = jax.eval_shape(lambda: params)
    state = tx.init(params)
    assert_same(tx.init(params), state)
    assert_same(tx.init(case.tree(5)), state)
    assert_close(jax.jit(tx.init)(params), state, rtol=1e-6, atol=0)
    assert_same(tx.init(abstract), state)
    shaped = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(shaped) == jax.tree.structure(state)
    assert shapes_of(shaped) == shapes_of(state)
    assert shapes_of(jax.eval_shape(tx.init, abstract)) == shapes_of(state)


def test_dense_trees_are_optax_placeholder(case):
    class Placeholder:
        pass

    tx = case.make()
    jax.tree_util.register_pytree_node(
        Placeholder, lambda _: ((), None), lambda *_: Placeholder()
    )
    placeholder = Placeholder()
    state = tx.init(placeholder)
    for tree, _ in case.fields:
        for _, found in optax.tree_utils.tree_get_all_with_path(state, tree):
            assert isinstance(found, Placeholder), tree


def test_tree_map_params_reaches_dense_moments(case):
    """It reaches nothing else: no factors, no count, no state of the learning rate."""
    tx, params = case.make(), case.tree()
    _, state = run(tx, params, gradients(case, 1))
    same = optax.tree_utils.tree_map_params(tx, lambda x: x, state)
    assert_same(same, state)
    doubled = optax.tree_utils.tree_map_params(tx, lambda x: 2 * x, state)
    trees = {"mu", "nu", "momentum", "ema"}
    for (path, was), now in zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree.leaves(doubled),
        strict=True,
    ):
        keys = {getattr(key, "name", None) for key in path}
        factor = 2 if keys & trees else 1
        np.testing.assert_array_equal(np.asarray(now), factor * np.asarray(was))


def test_tree_map_params_makes_specs_of_a_state(case):
    """As optax documents it, with a tree of the parameters' specs."""
    tx, params = case.make(), case.tree()
    state = tx.init(params)
    specs = {name: f"spec of {name}" for name in params}
    found = optax.tree_utils.tree_map_params(
        tx,
        lambda x, spec: x if is_masked(x) else spec,
        state,
        specs,
        transform_non_params=lambda _: "replicated",
        is_leaf=is_masked,
    )
    trees = [
        tree
        for field in ("mu", "nu", "momentum", "ema")
        for _, tree in optax.tree_utils.tree_get_all_with_path(state, field)
    ]
    dense = {f"spec of {n}" for tree in trees for n in tree if not is_masked(tree[n])}
    assert set(jax.tree.leaves(found)) == {"replicated"} | dense
    # As a prefix tree it says where to put the state.
    everywhere = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    places = jax.tree.map(lambda _: everywhere, found)
    placed = jax.device_put(state, places)
    assert {x.sharding for x in jax.tree.leaves(placed)} == {everywhere}


# Leaves that are not matrices.


def test_odd_leaves_pass_through(case):
    """None, MaskedNode and empty leaves are returned; a scalar gets optax's update."""
    scalar = {} if case.only_matrices else {"scalar": jnp.float32(0.5)}
    odd = {"none": None, "masked": optax.MaskedNode(), "empty": jnp.zeros((0, 3))}
    tx = case.make()
    params, grads = (case.tree(seed) | odd | scalar for seed in (0, 1))
    assert factored_paths(tx, params) == FACTORED
    updates, state = tx.update(grads, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    assert updates["empty"].shape == (0, 3)
    if scalar:
        expected, _ = run(case.reference, scalar, [{"scalar": grads["scalar"]}])
        assert_close(updates["scalar"], expected[0]["scalar"])
    without, _ = run(tx, case.tree(), [case.tree(1)])
    assert_close({name: updates[name] for name in without[0]}, without[0])
    tx.update(grads, state, params)


@pytest.mark.parametrize("tree", [{}, {"a": None}, {"a": optax.MaskedNode()}], ids=str)
def test_nothing_to_optimize(case, tree):
    tx = case.make()
    state = tx.init(tree)
    updates, state = tx.update(tree, state, tree)
    assert updates == tree
    tx.update(tree, state, tree)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_updates_can_be_differentiated(name):
    """In forward and reverse mode, from the first step on, and also with a zero row."""
    tx = only_w(CASES[name])
    params, grads, tangents = w_trees(0, 1, 2)
    grads = {"w": grads["w"].at[0].set(0)}
    assert factored_paths(tx, params) == {"w"}

    @jax.jit
    def two_updates(grads):
        first, state = tx.update(grads, tx.init(params), params)
        return first, tx.update(jax.tree.map(jnp.square, grads), state, params)[0]

    out, forwards = jax.jvp(two_updates, (grads,), (tangents,))
    cotangents = jax.tree.map(jnp.cos, out)
    (backwards,) = jax.vjp(two_updates, grads)[1](cotangents)
    along = optax.tree.vdot(forwards, cotangents)
    assert jnp.isfinite(along)
    np.testing.assert_allclose(
        optax.tree.vdot(backwards, tangents), along, rtol=1e-2, atol=1e-3
    )


def test_zero_gradients_give_finite_updates(case):
    """Later updates are as without zero gradients, except for the count."""
    params = case.tree()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = run(case.make(), params, [zeros, zeros, *gradients(case, 2)])
    for leaf in jax.tree.leaves(updates[:2]):
        assert bool((leaf == 0).all())
    for leaf in jax.tree.leaves(updates[2:]):
        assert bool(jnp.isfinite(leaf).all())
        assert bool((leaf != 0).any())
