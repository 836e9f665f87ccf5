"""A decoder that is built, sharded and checkpointed as in nanodo.

Linen's `Partitioned` boxes that name mesh axes, `nn.get_sharding`, MultiSteps and
Orbax's manager; heads are axes of their own, and the embedding is the head too.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType

import lorapre_jax as lp

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTH, HEADS, VOCABULARY, LENGTH, RATE = 64, 4, 96, 16, 3e-3
OPTIONS: dict[str, Any] = {"rank": 8, "min_dim_size_to_factor": 16}


def sharded(*names):
    return nn.with_partitioning(nn.initializers.xavier_uniform(), names)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        def into_heads(name):
            init: Any = sharded("data", None, None)
            shape = (HEADS, WIDTH // HEADS)
            return nn.DenseGeneral(shape, kernel_init=init, use_bias=False, name=name)(
                x
            )

        q, k, v = map(into_heads, ("query", "key", "value"))
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        y = nn.dot_product_attention(q, k, v, mask=mask)
        out: Any = sharded(None, None, "data")
        return nn.DenseGeneral(
            WIDTH, axis=(-2, -1), kernel_init=out, use_bias=False, name="attn_out_proj"
        )(y)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + Attention(name="CausalAttn_0")(nn.RMSNorm()(x))
        up: Any = sharded("data", None)
        down: Any = sharded(None, "data")
        y = nn.Dense(4 * WIDTH, kernel_init=up, use_bias=False)(nn.RMSNorm()(x))
        return x + nn.Dense(WIDTH, kernel_init=down, use_bias=False)(jax.nn.gelu(y))


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        init: Any = nn.with_partitioning(nn.initializers.normal(0.1), (None, "data"))
        embed = nn.Embed(VOCABULARY, WIDTH, embedding_init=init, name="embed")
        position = nn.Embed(LENGTH, WIDTH, embedding_init=init, name="pos_embed")
        x = embed(tokens) + position(jnp.arange(tokens.shape[1]))
        x = Block(name="blocks_0")(x)
        return embed.attend(nn.RMSNorm(name="out_ln")(x))


NET = Decoder()


@dataclasses.dataclass
class Run:
    """A jitted init and step of one optimizer, and the state's shardings."""

    tx: optax.GradientTransformation

    def __post_init__(self):
        auto = (AxisType.Auto,)
        mesh = jax.make_mesh((4,), ("data",), auto, devices=jax.devices()[:4])
        self.abstract = jax.eval_shape(self.init, jax.random.key(0))
        self.places: Any = nn.get_sharding(self.abstract, mesh)
        self.step = jax.jit(self.update, out_shardings=(self.places, None))

    def init(self, key):
        tokens = jnp.zeros((1, LENGTH), jnp.int32)
        params = NET.init(key, tokens)["params"]
        return TrainState.create(apply_fn=NET.apply, params=params, tx=self.tx)

    def start(self):
        return jax.jit(self.init, out_shardings=self.places)(jax.random.key(0))

    def update(self, state, tokens):
        def loss(params):
            logits: Any = state.apply_fn({"params": params}, tokens[:, :-1])
            return optax.losses.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            ).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    def train(self, state, steps):
        losses = []
        for step in steps:
            state, loss = self.step(state, batch(step))
            losses.append(float(loss))
        return state, losses


def batch(step):
    """Returns tokens that follow a fixed rule, except for a tenth that are random."""
    rng = np.random.default_rng(step)
    follows = np.random.default_rng(0).permutation(VOCABULARY)
    tokens = [rng.integers(0, VOCABULARY, 16)]
    for _ in range(LENGTH):
        noise = rng.integers(0, VOCABULARY, 16)
        tokens.append(np.where(rng.random(16) < 0.1, noise, follows[tokens[-1]]))
    return jnp.asarray(np.stack(tokens, 1))


def assert_sharded(run, state):
    report = lp.describe(run.tx, state.params, state.opt_state)
    blocks = [leaf for leaf in report.leaves if leaf.path.startswith("blocks_")]
    factored = sum(leaf.size for leaf in blocks if leaf.is_factored)
    assert factored > 0.95 * sum(leaf.size for leaf in blocks)
    kept = {leaf.path: leaf for leaf in report.leaves}
    query = kept["blocks_0/CausalAttn_0/query/kernel"]
    out = kept["blocks_0/CausalAttn_0/attn_out_proj/kernel"]
    assert (query.p, query.q) == (out.p, out.q) == (WIDTH, WIDTH)
    assert kept["embed/embedding"].methods[-1] == lp.RankOne()
    assert not report.replicated
    # Each kernel has one side of two sharded over four devices.
    assert report.device_bytes is not None
    assert report.device_bytes < 0.7 * report.total_bytes


def test_sharded_by_its_boxes_and_resumed_exactly(tmp_path):
    tx = optax.MultiSteps(lp.lorapre_adamw(RATE, **OPTIONS), 2)
    run = Run(tx.gradient_transformation())
    state, _ = run.train(run.start(), range(3))
    assert_sharded(run, state)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.StandardSave(state))  # pyright: ignore
        manager.wait_until_finished()
        leaves = zip(
            jax.tree.leaves(run.abstract), jax.tree.leaves(run.places), strict=True
        )
        target = jax.tree.unflatten(
            jax.tree.structure(run.abstract),
            [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p) for x, p in leaves],
        )
        back = manager.restore(3, args=ocp.args.StandardRestore(target))  # pyright: ignore
    state, losses = run.train(state, range(3, 7))
    back, again = run.train(back, range(3, 7))
    assert again == losses
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_no_worse_than_adamw_at_its_rate():
    final = {}
    for name, tx in (
        ("ours", lp.lorapre_adamw(RATE, **OPTIONS)),
        ("adamw", optax.adamw(RATE, b2=0.95)),
    ):
        run = Run(tx)
        _, losses = run.train(run.start(), range(60))
        final[name] = np.mean(losses[-5:])
        assert final[name] < losses[0] - 0.5
    assert final["ours"] <= final["adamw"] + 0.01
