"""The optimizers with Flax, Haiku, Orbax, pmap, vmap and sharded arrays."""

import functools
import re
from typing import Any

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from contract_cases import (
    CASES,
    FACTORED,
    Case,
    assert_close,
    assert_same,
    factored_paths,
    plan_of,
    random_tree,
    run,
)
from flax import nnx, serialization
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorapre_jax as lp

pytestmark = pytest.mark.usefixtures("quick_compilation")

tree_get = optax.tree_utils.tree_get

KERNELS = lp.select_matrices(include="kernel$")
OPTIMIZERS = {
    "adamw": lambda **kwargs: lp.lorapre_adamw(0.01, **kwargs),
    "muon": lambda **kwargs: lp.lorapre_muon(0.01, **kwargs),
    "heavy_ball": lambda **kwargs: optax.chain(
        lp.lorapre_ema(0.9, **kwargs), optax.sgd(0.1)
    ),
}
KERNEL_PATHS = {"down/kernel", "up/kernel"}
X = random_tree({"x": (32, 16)})["x"]
Y = jnp.sin(X)


@pytest.fixture(params=[name for name in CASES if not CASES[name].is_alias])
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


@pytest.fixture(params=["adamw", "muon"])
def make_alias(request):
    return OPTIMIZERS[request.param]


def mean_squared_error(predicted: Any) -> jax.Array:
    return jnp.mean((predicted - Y) ** 2)


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


# Flax NNX.


class NnxMlp(nnx.Module):
    """Kernels (16, 8) and (8, 16), optionally sharded over ("x", "y")."""

    def __init__(self, sharded: bool = False):
        init = nnx.initializers.lecun_normal()
        if sharded:
            init = nnx.with_partitioning(init, ("x", "y"))
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(16, 8, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(8, 16, kernel_init=init, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def train_nnx(model, tx, loss, steps: int = 10):
    """Trains by `nnx.Optimizer`; returns the losses and the state."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    return losses, nnx.as_pure(optimizer.opt_state)


def nnx_params(model) -> Any:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def factors_of(state: Any) -> dict[str, Any]:
    """Returns the factors of the first moment."""
    kinds = {"LorapreEma": "ema_factors", "LorapreMuon": "momentum_factors"}
    name = next((n for k, n in kinds.items() if k in repr(state)), "mu_factors")
    return tree_get(state, name)


def assert_follows(factors: Any):
    """Asserts that factors are sharded like kernels on ("x", "y")."""
    assert set(factors) == KERNEL_PATHS
    for pair in factors.values():
        for x, spec in ((pair.left, P("x", None)), (pair.right, P("y", None))):
            expected = NamedSharding(x.sharding.mesh, spec)
            assert x.sharding.is_equivalent_to(expected, 2), x.sharding


def test_nnx_optimizer_equals_a_plain_loop(make):
    tx = make(rank=2, matrices=KERNELS)
    model = NnxMlp()
    graph, params = nnx.split(NnxMlp(), nnx.Param)
    params = nnx.to_pure_dict(params)
    losses, state = train_nnx(model, tx, lambda model: mean_squared_error(model(X)))
    assert losses[-1] < 0.95 * losses[0]
    assert set(factors_of(state)) == KERNEL_PATHS
    assert all(factors.left.any() for factors in factors_of(state).values())

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: mean_squared_error(nnx.merge(graph, p)(X)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    plain_state = tx.init(params)
    for _ in range(10):
        params, plain_state = step(params, plain_state)
    assert_close(nnx_params(model), params, rtol=1e-4, atol=1e-5)
    assert_close(factors_of(state), factors_of(plain_state), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "rank"), [("adamw", 2), ("adamw", 3), ("muon", 3)])
def test_nnx_optimizer_with_sharded_kernels(name, rank):
    """Kernels sharded both ways over a (4, 2) mesh; rank 3 divides by neither.

    `nnx.Optimizer` shards whatever stands in a parameter's place like the parameter,
    which is why factors stand elsewhere (it breaks `optax.contrib.galore`).
    """
    tx = OPTIMIZERS[name](rank=rank, matrices=KERNELS)

    def loss(model):
        return mean_squared_error(model(X))

    plain = NnxMlp()
    expected, _ = train_nnx(plain, tx, loss)
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        model = NnxMlp(sharded=True)
        losses, state = train_nnx(model, tx, loss)
    assert_follows(factors_of(state))
    sharding: Any = model.up.kernel[...].sharding
    assert sharding.spec == P("x", "y")
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert_close(nnx_params(model), nnx_params(plain), rtol=1e-3, atol=1e-4)


def test_nnx_optimizer_under_explicit_axes(make):
    """Under explicit axes JAX refuses to contract two axes that are sharded alike."""
    tx = make(rank=3, matrices=KERNELS)

    def loss(model):
        leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
        return sum(jnp.sum((leaf - 0.1) ** 2) for leaf in leaves)

    plain = NnxMlp()
    expected, _ = train_nnx(plain, tx, loss, steps=3)
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        model = NnxMlp(sharded=True)
        losses, state = train_nnx(model, tx, loss, steps=3)
    assert_follows(factors_of(state))
    sharding: Any = model.up.kernel[...].sharding
    assert sharding.spec == P("x", "y")
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


# Flax Linen and Haiku.


class LinenMlp(nn.Module):
    boxes: str

    @nn.compact
    def __call__(self, x):
        init: Any = nn.initializers.lecun_normal()
        if self.boxes == "Partitioned":
            init = nn.with_partitioning(init, ("x", "y"))
        if self.boxes == "LogicallyPartitioned":
            init = nn.with_logical_partitioning(init, ("embed", "mlp"))
        x = jnp.tanh(nn.Dense(8, kernel_init=init, name="up")(x))
        return nn.Dense(16, kernel_init=init, name="down")(x)


@functools.cache
def train_linen(name: str, boxes: str) -> tuple[list[float], TrainState]:
    tx = OPTIMIZERS[name](rank=2, matrices=KERNELS)
    net = LinenMlp(boxes)
    params = net.init(jax.random.key(0), X)["params"]
    assert type(params["up"]["kernel"]).__name__ == boxes
    assert factored_paths(tx, params) == KERNEL_PATHS
    state = TrainState.create(apply_fn=net.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        value, grads = jax.value_and_grad(
            lambda params: mean_squared_error(net.apply({"params": params}, X))
        )(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(10):
        state, value = step(state)
        losses.append(float(value))
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
    return losses, state


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_flax_serializes_a_state(name):
    _, state = train_linen(name, "ArrayImpl")
    fresh = state.tx.init(state.params)
    back: Any = serialization.from_bytes(fresh, serialization.to_bytes(state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, back, state.opt_state)
    assert jax.tree.structure(back) == jax.tree.structure(state.opt_state)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("boxes", ["ArrayImpl", "Partitioned", "LogicallyPartitioned"])
def test_linen_train_state(name, boxes):
    """Boxed parameters stay boxed, have the paths of plain ones and train like them."""
    losses, state = train_linen(name, boxes)
    assert losses[-1] < 0.95 * losses[0]
    assert set(factors_of(state.opt_state)) == KERNEL_PATHS
    plain_losses, plain_state = train_linen(name, "ArrayImpl")
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-5)
    factors = factors_of(state.opt_state)
    if boxes != "ArrayImpl":
        names = {"Partitioned": ("x", "y"), "LogicallyPartitioned": ("embed", "mlp")}
        rows, columns = names[boxes]
        left, right = factors["up/kernel"]
        assert (left.names, right.names) == ((rows, None), (columns, None))
        assert type(left).__name__ == boxes
    assert_close(nn.unbox(factors), factors_of(plain_state.opt_state))


def test_haiku(make_alias):
    def forward(x):
        return hk.Linear(16, name="down")(jnp.tanh(hk.Linear(8, name="up")(x)))

    net = hk.without_apply_rng(hk.transform(forward))
    params = net.init(jax.random.key(0), X)
    tx = make_alias(rank=2, matrices=lp.select_matrices(include=["^up/w$", "^down/w$"]))
    assert factored_paths(tx, params) == {"up/w", "down/w"}

    def loss(params):
        return mean_squared_error(net.apply(params, X))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    first, state = loss(params), tx.init(params)
    for _ in range(10):
        params, state = step(params, state)
    assert set(factors_of(state)) == {"up/w", "down/w"}
    assert loss(params) < 0.95 * first


# Many devices, many seeds.


def test_pmap_equals_the_full_batch(case):
    """With averaged gradients on 8 devices, every copy of the state stays the same."""
    assert jax.local_device_count() == 8
    params = random_tree({"w": (12, 8)})
    batch = random_tree({"x": (16, 12), "y": (16, 8)}, 1)
    tx = case.make_optimizer(0.01, matrices=lp.MatrixAxes())
    assert factored_paths(tx, params) == {"w"}

    def gradient(params, batch):
        def loss(params):
            return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)

        return jax.grad(loss)(params)

    def apply(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def parallel_step(params, state, batch):
        grads = jax.lax.pmean(gradient(params, batch), "devices")
        return apply(params, state, grads)

    def replicated(tree):
        return jax.tree.map(lambda x: jnp.stack([x] * 8), tree)

    state = tx.init(params)
    copies, states = replicated(params), replicated(state)
    shards = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
    parallel = jax.pmap(parallel_step, axis_name="devices")
    single = jax.jit(lambda p, s: apply(p, s, gradient(p, batch)))
    for _ in range(3):
        copies, states = parallel(copies, states, shards)
        params, state = single(params, state)
    for device in (0, 7):
        copy, its_state = jax.tree.map(lambda x, i=device: x[i], (copies, states))
        assert_close(copy, params, rtol=1e-4, atol=1e-5)
        assert_close(its_state, state, rtol=1e-3, atol=1e-4)


def test_vmap_over_seeds_equals_one_by_one(case):
    """Parameters of three runs stacked in a new leading axis."""
    runs = [
        [random_tree({"w": (12, 8)}, 3 * i + j) for j in range(3)] for i in range(3)
    ]
    tx = case.make(matrices=lp.MatrixAxes())
    params, *grads = (
        jax.tree.map(lambda *x: jnp.stack(x), *trees)
        for trees in zip(*runs, strict=True)
    )
    state = jax.vmap(tx.init)(params)
    # Inside of vmap the leaf has two axes: three runs, not one stack of layers.
    assert plan_of(state).leaves[0].shape == (12, 8)
    update = jax.jit(jax.vmap(tx.update))
    for grad in grads:
        updates, state = update(grad, state, params)
    for i, (param, *alone) in enumerate(runs):
        expected, expected_state = run(tx, param, alone)
        one, one_state = jax.tree.map(lambda x, i=i: x[i], (updates, state))
        assert_close(one, expected[-1], rtol=1e-4, atol=2e-4)
        assert_close(one_state, expected_state, rtol=1e-3, atol=1e-5)


def test_state_keeps_its_sharding(case):
    """From `init` on, since a change would recompile every later step."""
    mesh = mesh_of(AxisType.Auto)
    specs = {"heads": P("y"), "stack": P(None, "x", "y"), "w": P("x", "y")}

    def shard(tree):
        return {
            name: jax.device_put(x, NamedSharding(mesh, specs.get(name, P())))
            for name, x in tree.items()
        }

    params, grads = shard(case.tree()), shard(case.tree(1))
    tx = case.make()
    assert factored_paths(tx, params) == FACTORED
    before = tx.init(params)
    update = jax.jit(tx.update)
    _, after = update(grads, before, params)
    for (path, was), now in zip(
        jax.tree_util.tree_leaves_with_path(before),
        jax.tree.leaves(after),
        strict=True,
    ):
        if not was.ndim:
            continue  # optax's counts are on one device at first.
        name = jax.tree_util.keystr(path)
        assert was.sharding.is_equivalent_to(now.sharding, was.ndim), name


def collectives(
    case: Case, slices: int | None, init_sees: bool = False, dense: bool = False
) -> set[str]:
    """Returns the collectives in an update of 16 layers, sharded over 8 devices."""
    mesh = jax.make_mesh((8,), ("layers",), axis_types=(AxisType.Auto,))
    params = random_tree({"stack": (16, 12, 8)})
    rank = {"rank": 8} if dense else {}  # It does not pay.
    tx = case.make(matrices=lp.MatrixAxes(), slices_at_once=slices, **rank)
    assert factored_paths(tx, params) == (set() if dense else {"stack"})
    layers = NamedSharding(mesh, P("layers"))
    everywhere = NamedSharding(mesh, P())
    placed = jax.device_put(params, layers)
    state = jax.tree.map(
        lambda x: jax.device_put(x, layers if x.ndim else everywhere),
        tx.init(placed if init_sees else params),
    )
    params = placed
    program = jax.jit(tx.update).lower(params, state).compile().as_text()
    assert program is not None
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return set(re.findall(rf"({names})(?:-start)?\(", program))


def test_sharded_layers_are_walked_where_they_lie(case):
    """With as many slices at once as devices, each device computes its own layers."""
    assert not collectives(case, 8)


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("dense", [False, True])
def test_init_sees_that_layers_are_sharded(slices, dense):
    """Then a layer of each device is computed, whatever `slices_at_once` says."""
    assert not collectives(CASES["adam"], slices, init_sees=True, dense=dense)


def test_the_search_for_collectives_finds_some():
    """If `init` saw layers on one device, each layer has to be gathered."""
    assert "all-gather" in collectives(CASES["adam"], 1)


# Checkpoints.


@pytest.mark.parametrize("name", CASES)
def test_orbax_round_trip(name, tmp_path):
    """Restored into the shapes of `init`, training continues identically."""
    case = CASES[name]
    # A vector is dense, and an empty leaf has no state at all.
    shapes: dict[str, tuple[int, ...]] = {"w": (12, 8), "empty": (0, 4)}
    if not case.only_matrices:
        shapes["bias"] = (8,)
    params, *grads = (random_tree(shapes, seed) for seed in range(4))
    tx = case.make(matrices=lp.select_matrices(include="^w$"))
    assert factored_paths(tx, params) == {"w"}
    update = jax.jit(tx.update)
    state = tx.init(params)
    for grad in grads[:2]:
        _, state = update(grad, state, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(tx.init, params)
        restored = checkpointer.restore(tmp_path / "state", target)
    assert_same(restored, state)
    assert plan_of(restored) == plan_of(state)
    resumed = update(grads[2], restored, params)
    assert_same(resumed, update(grads[2], state, params))
