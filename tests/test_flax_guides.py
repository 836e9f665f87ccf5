"""Flax's own ways to create a sharded optimizer state, in NNX and Linen.

In each of them the framework reads the state's sharding off the state itself.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lorapre_jax as lp

pytestmark = pytest.mark.usefixtures("quick_compilation")

RANK = 8
OPTIONS: dict[str, Any] = {"rank": RANK, "min_dim_size_to_factor": 16}
OPTIMIZERS = {
    "adamw": lambda: lp.lorapre_adamw(1e-2, **OPTIONS),
    "muon": lambda: lp.lorapre_muon(1e-2, **OPTIONS),
    "paper": lambda: lp.lorapre_adamw(
        1e-2,
        first_moment=lp.AlgorithmOne(),
        second_moment=lp.AlgorithmOne(),
        **OPTIONS,
    ),
}
RULES = (("embed", "fsdp"), ("mlp", "tensor"), ("heads", "tensor"))
X = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)

# What each factor's axes are sharded over; of `down` the other way round.
SPECS = {
    "up/kernel": {"rows": "fsdp", "columns": "tensor"},
    "down/kernel": {"rows": "tensor", "columns": "fsdp"},
}
FIELDS = {
    "left": ("rows", None),
    "right": ("columns", None),
    "row": ("rows",),
    "column": ("columns",),
    "direction": (None,),
}


@pytest.fixture(params=OPTIMIZERS)
def tx(request):
    return OPTIMIZERS[request.param]()


@pytest.fixture(scope="module")
def mesh():
    auto = (AxisType.Auto,) * 2
    return jax.make_mesh((2, 2), ("fsdp", "tensor"), auto, devices=jax.devices()[:4])


def assert_sharded(state: Any):
    """Asserts that there are factors, and that all are sharded."""
    leaves = by_path(state)
    found = {path: x for path, x in leaves.items() if "_factors" in path}
    for kernel in SPECS:
        assert any(kernel in path for path in found)
    for path, x in found.items():
        kernel = next(k for k in SPECS if k in path)
        entries = [
            SPECS[kernel].get(side or "") for side in FIELDS[path.split("/")[-1]]
        ]
        sharding = jax.sharding.NamedSharding(x.sharding.mesh, P(*entries))
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (path, x.sharding)


def by_path(state: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    names = (
        (jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in flat
    )
    return {name.removesuffix("/value"): x for name, x in names}


class Net(nnx.Module):
    def __init__(self, rngs):
        init = nnx.initializers.lecun_normal()
        up = nnx.with_partitioning(init, ("fsdp", "tensor"))
        down = nnx.with_partitioning(init, ("tensor", "fsdp"))
        self.up = nnx.Linear(64, 128, kernel_init=up, rngs=rngs)
        self.down = nnx.Linear(128, 64, kernel_init=down, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.gelu(self.up(x)))


@nnx.jit
def train_step(model, optimizer, x):
    loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - x) ** 2))(model)
    optimizer.update(model, grads)
    return loss


def created_sharded(tx, mesh):
    @nnx.jit
    def create():
        model = Net(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        state = nnx.state(optimizer)
        specs = nnx.get_partition_spec(state)
        nnx.update(optimizer, jax.lax.with_sharding_constraint(state, specs))
        return model, optimizer

    with jax.set_mesh(mesh):
        return create()


def test_nnx_creation_with_constraints_from_partition_specs(tx, mesh):
    model, optimizer = created_sharded(tx, mesh)
    assert_sharded(nnx.as_pure(nnx.state(optimizer)))
    with jax.set_mesh(mesh):
        losses = [train_step(model, optimizer, X) for _ in range(3)]
    assert losses[-1] < losses[0]
    assert_sharded(nnx.as_pure(nnx.state(optimizer)))
    params = nnx.state(model, nnx.Param)
    for state in (optimizer.opt_state, nnx.state(optimizer)):
        report = lp.describe(tx, params, state)
        assert not report.replicated
        assert report.device_bytes is not None
        # Factors and moments of the two kernels are sharded over two devices or four.
        assert report.device_bytes < 0.6 * report.total_bytes
    lp.check_state_sharding(tx, params, optimizer.opt_state)


def test_nnx_abstract_model(tx, mesh):
    def create():
        return nnx.Optimizer(Net(nnx.Rngs(0)), tx, wrt=nnx.Param)

    _, state = nnx.get_abstract_model(create, mesh)
    assert_sharded(nnx.as_pure(state))


def test_nnx_state_is_saved_and_restored_where_it_was(tx, mesh, tmp_path):
    model, optimizer = created_sharded(tx, mesh)
    with jax.set_mesh(mesh):
        train_step(model, optimizer, X)
    saved = nnx.state((model, optimizer))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        fresh = created_sharded(tx, mesh)
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            nnx.state(fresh),
        )
        nnx.update(fresh, checkpointer.restore(tmp_path / "state", target))
    assert_sharded(nnx.as_pure(nnx.state(fresh[1])))
    with jax.set_mesh(mesh):
        for _ in range(2):
            assert train_step(*fresh, X) == train_step(model, optimizer, X)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name, size, axes in (
            ("up", 128, ("embed", "mlp")),
            ("down", 64, ("mlp", "embed")),
        ):
            init: Any = nn.with_logical_partitioning(
                nn.initializers.lecun_normal(), axes
            )
            x = nn.Dense(size, kernel_init=init, name=name)(jnp.tanh(x))
        return x


def linen_init(tx):
    net = Mlp()
    return lambda key: TrainState.create(
        apply_fn=net.apply, params=net.init(key, X)["params"], tx=tx
    )


def linen_update(state):
    def loss(params):
        return jnp.mean((state.apply_fn({"params": nn.unbox(params)}, X) - X) ** 2)

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


linen_step = jax.jit(linen_update)


def linen_created(tx, mesh):
    init = linen_init(tx)
    abstract = jax.eval_shape(init, jax.random.key(0))
    specs = nn.get_partition_spec(abstract)
    where: Any = nn.logical_to_mesh_sharding(specs, mesh, RULES)  # pyright: ignore
    return jax.jit(init, out_shardings=where)(jax.random.key(0)), where


def test_linen_logical_axes(tx, mesh):
    state, _ = linen_created(tx, mesh)
    assert_sharded(state.opt_state)
    losses = []
    for _ in range(3):
        state, loss = linen_step(state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert_sharded(state.opt_state)
    lp.check_state_sharding(tx, state.params, state.opt_state)


def test_a_replicated_state_is_named(mesh):
    """A framework replicates bare arrays, since it does not know their axes."""
    tx = OPTIMIZERS["adamw"]()
    state, _ = linen_created(tx, mesh)
    everywhere = jax.sharding.NamedSharding(mesh, P())
    replicated = jax.tree.map(lambda x: everywhere, state.opt_state)
    with pytest.raises(ValueError, match="0/mu_factors/down/kernel/left, 0/mu_factors"):
        lp.check_state_sharding(tx, state.params, replicated)
    report = lp.describe(tx, state.params, replicated)
    assert report.device_bytes == report.total_bytes
    assert "Replicated, though their parameters are sharded: 0/mu_f" in str(report)
    some = replicated[0]._replace(mu_factors={})
    with pytest.raises(ValueError, match="no array or sharding '0/mu_factors/down"):
        lp.describe(tx, state.params, (some, *replicated[1:]))


def test_multi_head_attention_by_default():
    """At AdamW's rate, the loss is no worse than AdamW's with factored kernels."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(128, 64, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
            self.up = nnx.Linear(64, 256, rngs=rngs)
            self.down = nnx.Linear(256, 64, rngs=rngs)
            self.head = nnx.Linear(64, 128, rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            x = x + self.attention(x, mask=nnx.make_causal_mask(tokens))
            return self.head(x + self.down(jax.nn.gelu(self.up(x))))

    rng = np.random.default_rng(0)
    follows = rng.permutation(128)
    tokens = [rng.integers(0, 128, (16, 1))]
    for _ in range(16):
        tokens.append(follows[tokens[-1]])
    batch = jnp.asarray(np.concatenate(tokens, 1))

    def final_loss(tx):
        model = Block(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            def loss(model):
                logits = model(batch[:, :-1])
                return optax.losses.softmax_cross_entropy_with_integer_labels(
                    logits, batch[:, 1:]
                ).mean()

            value, grads = nnx.value_and_grad(loss)(model)
            optimizer.update(model, grads)
            return value

        return [float(step(model, optimizer)) for _ in range(20)][-1]

    tx = lp.lorapre_adamw(3e-3, RANK, min_dim_size_to_factor=16)
    params = nnx.state(Block(nnx.Rngs(0)), nnx.Param)
    report = lp.describe(tx, params)
    kernels = {leaf.path for leaf in report.leaves if leaf.path.endswith("/kernel")}
    factored = {leaf.path for leaf in report.leaves if leaf.is_factored}
    assert factored == kernels | {"embed/embedding"}
    assert report.factored_share > 0.95
    assert final_loss(tx) <= final_loss(optax.adamw(3e-3, b2=0.95)) + 0.01
