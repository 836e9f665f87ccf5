"""The state on meshes: its sharding, the traffic of an update, and the results."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_cases import CASES, assert_close, factored_paths, random_tree, run
from jax.sharding import PartitionSpec as P
from sharding_cases import (
    AUTO,
    BEHIND,
    EXPLICIT,
    LAYOUTS,
    METHODS,
    SHAPES,
    Layout,
    assert_lies,
    make,
    params_sharding,
    train,
    tree_of,
)

import lorapre_jax as lp

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_every_array_has_its_place():
    layout = LAYOUTS["experts"]
    tree = random_tree(SHAPES | {"bias": (8,)})
    tx = make("adam", second_moment=lp.LowRank())
    found = lp.state_sharding(tx, layout.shard(tree, AUTO))
    spec = jax.tree.map(lambda x: x.spec, found)
    assert spec.count == P()
    assert spec.mu["bias"] == P()
    assert spec.mu_factors["heads"] == (
        P("fsdp", None),
        P("tensor", None, None),
    )
    assert spec.mu_factors["stack"].left == P("expert", "fsdp", None)
    assert spec.nu_factors["stack"].right == P("expert", "tensor", None)
    assert spec.nu_factors["w"].left == P(("expert", "fsdp"), None)
    rank_one = lp.state_sharding(make("adam"), layout.shard(tree, AUTO))
    assert rank_one.nu_factors["stack"].row.spec == P("expert", "fsdp")
    assert rank_one.nu_factors["stack"].column.spec == P("expert", "tensor")


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["adam", "scale_by_muon"])
def test_init_places_the_state_by_itself(name, layout, kind):
    tx = make(name)
    params = LAYOUTS[layout].shard(tree_of(CASES[name]), kind)
    state = tx.init(params)
    assert_lies(state, lp.state_sharding(tx, params))
    assert jax.tree.structure(state) == jax.tree.structure(
        lp.state_sharding(tx, params)
    )


def test_abstract_parameters_do():
    params = LAYOUTS["both"].shard(tree_of(CASES["adam"]), AUTO)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    tx = make("adam")
    assert lp.state_sharding(tx, abstract) == lp.state_sharding(tx, params)


def test_any_optax_transform_has_its_place():
    layout = LAYOUTS["both"]
    params = layout.shard(random_tree(SHAPES), AUTO)
    every_step = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(make("adam"), {"heads": True, "stack": False, "w": True}),
        optax.adamw(optax.constant_schedule(1e-3)),
    )
    tx = optax.MultiSteps(every_step, 2).gradient_transformation()
    found = lp.state_sharding(tx, params)
    acc = found.acc_grads
    assert acc["stack"].spec == P(None, "fsdp", "tensor")
    assert found.mini_step.spec == P()
    masked, adamw = found.inner_opt_state[1:]
    assert masked.inner_state.mu_factors["w"].left.spec == P("fsdp", None)
    assert adamw[0].nu["heads"].spec == P("fsdp", "tensor")
    assert adamw[2].count.spec == P()
    state = jax.jit(tx.init, out_shardings=found)(params)
    assert_lies(state, found)


def test_one_device():
    params = random_tree(SHAPES)
    found = lp.state_sharding(make("adam"), params)
    assert set(jax.tree.leaves(found)) == {params["w"].sharding}
    third = jax.device_put(params, jax.devices()[3])
    assert_lies(make("adam").init(third), lp.state_sharding(make("adam"), third))
    assert all(
        x.devices() == {jax.devices()[3]}
        for x in jax.tree.leaves(make("adam").init(third))
    )


def test_what_was_never_placed_is_with_the_others():
    params = LAYOUTS["rows"].shard(random_tree(SHAPES), AUTO) | {"bias": jnp.ones(8)}
    tx = make("adam")
    found = lp.state_sharding(tx, params)
    assert found.count.spec == found.mu["bias"].spec == P()
    assert_lies(jax.jit(tx.init, out_shardings=found)(params), found)


def test_two_views_of_one_leaf():
    """The factors of each transform are sharded like its own matrices."""
    layout = dataclasses.replace(LAYOUTS["columns"], heads=P("tensor"))
    params = layout.shard(random_tree({"heads": (16, 8, 4)}), AUTO)
    tx = optax.chain(
        lp.lorapre_ema(0.9, 2, matrices=lp.MatrixAxes(0, (1, 2))),
        lp.scale_by_lorapre_adam(2, matrices=lp.MatrixAxes((1, 2), 0)),
    )
    assert_lies(tx.init(params), lp.state_sharding(tx, params))


# Every pair of method, layout and kind of axes occurs.
EVERY = LAYOUTS | {"behind": BEHIND}
PAIRS = [
    (name, layout, (AUTO, EXPLICIT)[(i + j) % 2])
    for i, name in enumerate(METHODS)
    for j, layout in enumerate(EVERY)
]


@pytest.mark.parametrize(("name", "layout", "kind"), PAIRS)
def test_trajectories_are_those_of_one_device(name, layout, kind):
    case, tx = CASES[name], make(name)
    params, *grads = (tree_of(case, seed) for seed in range(4))
    assert factored_paths(tx, params) == set(SHAPES)
    all_expected, expected_state = run(tx, params, grads, jit=True)
    params, *grads = (EVERY[layout].shard(x, kind) for x in (params, *grads))
    places = lp.state_sharding(tx, params)
    updates, state = train(tx, params, grads, places)
    assert_lies(state, places)
    assert_lies(updates, params_sharding(params))
    assert_close(updates, all_expected[-1], rtol=1e-3, atol=2e-3)
    assert_close(state, expected_state, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [lp.state_sharding, lambda tx, p: tx.init(p)])
def test_the_second_axis_of_a_fused_side_is_followed(method):
    params = BEHIND.shard(random_tree(SHAPES), AUTO)
    right = method(make("adam"), params).mu_factors["heads"].right
    sharding = getattr(right, "sharding", right)
    assert sharding.spec == P(None, "tensor", None)


def test_a_mesh_axis_of_one_device_divides_nothing():
    layout = Layout({"fsdp": 4, "tensor": 1}, P("fsdp", None, "tensor"), P(), P())
    state: Any = make("adam").init(layout.shard(random_tree(SHAPES), AUTO))
    assert state.mu_factors["heads"].left.sharding.spec == P("fsdp", None)


def test_an_axis_behind_one_of_a_single_element_is_followed():
    layout = dataclasses.replace(LAYOUTS["both"], heads=P("fsdp", None, "tensor"))
    shapes = SHAPES | {"heads": (16, 1, 32)}
    tx = make("adam")
    state: Any = tx.init(layout.shard(random_tree(shapes), AUTO))
    assert state.mu_factors["heads"].right.sharding.spec == P(None, "tensor", None)


def test_parameters_without_a_place():
    abstract = {"w": jax.ShapeDtypeStruct((16, 32), jnp.float32)}
    with pytest.raises(ValueError, match="Leaf 'w' carries no sharding"):
        lp.state_sharding(make("adam", matrices=lp.MatrixAxes()), abstract)
    with pytest.raises(ValueError, match="Leaf 'w' carries no sharding"):
        lp.state_sharding(optax.adam(1e-3), {"w": np.zeros((16, 32))})
    with pytest.raises(ValueError, match="no leaves"):
        lp.state_sharding(optax.adam(1e-3), {})


# Inside of shard_map, and by Linen's logical axes.


@pytest.mark.parametrize("name", METHODS)
def test_inside_shard_map_every_device_has_layers_of_its_own(name):
    tx = make(name, matrices=lp.MatrixAxes())
    shapes = {"stack": SHAPES["stack"]}
    params, *grads = (random_tree(shapes, seed) for seed in range(3))
    expected, expected_state = run(tx, params, grads, jit=True)
    mesh = jax.make_mesh((8,), ("layers",), (AUTO,))
    local = {"stack": jax.ShapeDtypeStruct((1, 16, 32), jnp.float32)}
    specs = jax.tree.map(
        lambda x: P("layers") if x.ndim else P(), jax.eval_shape(tx.init, local)
    )
    init = jax.shard_map(tx.init, mesh=mesh, in_specs=P("layers"), out_specs=specs)
    update = jax.shard_map(
        tx.update,
        mesh=mesh,
        in_specs=(P("layers"), specs),
        out_specs=(P("layers"), specs),
    )
    state = jax.jit(init)(params)
    for grad in grads:
        updates, state = jax.jit(update)(grad, state)
    assert_close(updates, expected[-1], rtol=1e-3, atol=2e-3)
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True)
    for x, y in leaves:
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_inside_shard_map_the_batch_is_divided(name):
    """Gradients are summed over devices, and the state is the same on all of them."""
    tx = make(name, matrices=lp.MatrixAxes())
    params = random_tree({"w": SHAPES["w"]})
    rows = random_tree({"x": (32, 16)}, 1)["x"]

    def step(params, state, rows):
        grads = jax.grad(lambda p: jnp.mean(jnp.tanh(rows @ p["w"]) ** 2))(params)
        grads = jax.tree.map(lambda g: g / jax.lax.axis_size("data"), grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def alone(params, state, rows):
        grads = jax.grad(lambda p: jnp.mean(jnp.tanh(rows @ p["w"]) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    mesh = jax.make_mesh((8,), ("data",), (AUTO,))
    divided = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P()
    )
    expected, state = params, tx.init(params)
    expected_state = state
    for _ in range(2):
        params, state = jax.jit(divided)(params, state, rows)
        expected, expected_state = jax.jit(alone)(expected, expected_state, rows)
    assert_close(params, expected, rtol=1e-3, atol=2e-3)
    assert_close(state, expected_state, rtol=1e-3, atol=1e-3)


def test_logical_axes_of_linen():
    """`nn.logical_to_mesh_sharding` shards the parameters, and the state like them."""

    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name, size, axes in (
                ("up", 32, ("embed", "ffn")),
                ("down", 16, ("ffn", "embed")),
            ):
                init: Any = nn.initializers.lecun_normal()
                init = nn.with_logical_partitioning(init, axes)
                x = nn.Dense(size, kernel_init=init, use_bias=False, name=name)(x)
            return x

    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), (AUTO,) * 2)
    rules = [("embed", "fsdp"), ("ffn", "tensor")]
    tx = make("adam", matrices=lp.MatrixAxes())

    def init(key):
        return Mlp().init(key, jnp.ones((1, 16)))["params"]

    boxed = jax.eval_shape(init, jax.random.key(0))
    logical = nn.get_partition_spec(boxed)
    where = nn.logical_to_mesh_sharding(logical, mesh, rules)  # pyright: ignore
    params = jax.jit(lambda key: nn.unbox(init(key)), out_shardings=where)(
        jax.random.key(0)
    )
    places = lp.state_sharding(tx, params)
    assert places.mu_factors["up/kernel"].left.spec == P("fsdp", None)
    assert places.mu_factors["down/kernel"].right.spec == P("fsdp", None)
    state = jax.jit(tx.init, out_shardings=places)(params)
    updates, state = jax.jit(tx.update, out_shardings=(where, places))(params, state)
    assert_lies(state, places)
    one, _ = run(tx, jax.device_get(params), [jax.device_get(params)])
    assert_close(updates, one[-1], rtol=1e-3, atol=2e-3)
