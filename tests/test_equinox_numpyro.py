"""The optimizers with Equinox (stacked layers, runs under vmap) and NumPyro's SVI."""

import functools
import pickle
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import orbax.checkpoint as ocp
import pytest
from contract_cases import assert_close, assert_same, plan_of, random_tree
from jax.flatten_util import ravel_pytree
from numpyro import distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal
from numpyro.optim import optax_to_numpyro

import lorapre_jax as lp
from lorapre_jax._leaves.plan import FactoredLeaf

pytestmark = pytest.mark.usefixtures("quick_compilation")

VOCAB, WIDTH, HIDDEN, DEPTH = 64, 32, 48, 3
SMALL: Any = {"rank": 4, "min_dim_size_to_factor": 16}
KERNELS = lp.RotatedRankOne()
ENDS = lp.RankOne()


def views(state: Any) -> dict[str, Any]:
    """Path -> (batch, rows, columns, second moment) of the leaves that are factored."""
    return {
        leaf.path: (
            leaf.view.batch_axes,
            leaf.view.row_axes,
            leaf.view.column_axes,
            leaf.methods[1],
        )
        for leaf in plan_of(state).leaves
        if isinstance(leaf, FactoredLeaf)
    }


def arrays(model: Any) -> Any:
    return eqx.filter(model, eqx.is_inexact_array)


# Equinox.


class Layer(eqx.Module):
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, HIDDEN, depth=1, key=key)

    def __call__(self, x):
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm)(x))


class Network(eqx.Module):
    """Attention, then a stack of layers under a scan."""

    embedding: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    stack: Layer
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.embedding = eqx.nn.Embedding(VOCAB, WIDTH, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(
            4, WIDTH, use_output_bias=True, key=keys[1]
        )
        self.stack = eqx.filter_vmap(Layer)(jax.random.split(keys[2], DEPTH))
        self.head = eqx.nn.Linear(WIDTH, VOCAB, key=keys[3])

    def __call__(self, tokens):
        x = jax.vmap(self.embedding)(tokens)
        causal = jnp.tril(jnp.ones((len(x), len(x)), bool))
        x = x + self.attention(x, x, x, mask=causal)
        layers, static = eqx.partition(self.stack, eqx.is_array)
        x, _ = jax.lax.scan(
            lambda x, layer: (eqx.combine(layer, static)(x), None), x, layers
        )
        return jax.vmap(self.head)(x)


class Stacks(eqx.Module):
    """Layers stacked by `filter_vmap`, and convolutions."""

    attention: eqx.nn.MultiheadAttention
    stem: eqx.nn.Conv2d
    convolutions: eqx.nn.Conv2d

    def __init__(self, key):
        keys = jax.random.split(key, DEPTH)
        self.stem = eqx.nn.Conv2d(3, 16, kernel_size=3, key=key)
        self.attention = eqx.filter_vmap(
            lambda key: eqx.nn.MultiheadAttention(4, WIDTH, key=key)
        )(keys)
        self.convolutions = eqx.filter_vmap(
            lambda key: eqx.nn.Conv2d(16, 32, kernel_size=3, key=key)
        )(keys)


PROJECTIONS = [f"attention/{name}_proj" for name in ("query", "key", "value", "output")]
# weight: (*batch, outputs, inputs)
ONE = ((), (1,), (0,), KERNELS)
STACKED = ((0,), (2,), (1,), KERNELS)


def abstract(make: Callable[[jax.Array], Any]) -> Any:
    return jax.eval_shape(lambda: arrays(make(jax.random.key(0))))


def test_kernels_are_seen_with_their_inputs_as_rows():
    params = abstract(Network)
    tx = lp.lorapre_adamw(0.01, **SMALL)
    state: Any = jax.eval_shape(tx.init, params)
    found = views(state)
    # The two sides of a rank-one estimate are alike: which is rows does not matter.
    batch, rows, columns, second = found.pop("embedding/weight")
    assert (batch, {*rows, *columns}, second) == ((), {0, 1}, ENDS)
    assert found == {
        **{f"{path}/weight": ONE for path in PROJECTIONS},
        "stack/mlp/layers/0/weight": STACKED,
        "stack/mlp/layers/1/weight": STACKED,
        "head/weight": ((), (1,), (0,), ENDS),
    }
    report = lp.describe(tx, params)
    assert report.factored_share > 0.95
    assert {leaf.path for leaf in report.leaves if not leaf.is_factored} == {
        "attention/output_proj/bias",
        "stack/norm/weight",
        "stack/norm/bias",
        "stack/mlp/layers/0/bias",
        "stack/mlp/layers/1/bias",
        "head/bias",
    }
    factors = optax.tree_utils.tree_get(state, "mu_factors")
    left, right = factors["stack/mlp/layers/0/weight"]
    assert (left.shape, right.shape) == ((DEPTH, WIDTH, 4), (DEPTH, HIDDEN, 4))


def test_convolutions_and_other_stacks():
    tx = lp.lorapre_adamw(0.01, **SMALL)
    assert views(jax.eval_shape(tx.init, abstract(Stacks))) == {
        **{f"{path}/weight": STACKED for path in PROJECTIONS},
        "stem/weight": ((), (1, 2, 3), (0,), KERNELS),
        "convolutions/weight": ((0,), (2, 3, 4), (1,), KERNELS),
    }


def sequences(seed: int) -> jax.Array:
    """Returns `(batch, time)` tokens; each decides the next by a fixed permutation."""
    rng = np.random.default_rng(0)
    after = rng.permutation(VOCAB)
    tokens = [np.random.default_rng(seed + 1).integers(VOCAB, size=16)]
    for _ in range(8):
        tokens.append(after[tokens[-1]])
    return jnp.asarray(np.stack(tokens, 1))


def cross_entropy(model: Network, tokens: jax.Array) -> jax.Array:
    logits = jax.vmap(model)(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


def trainer(tx: optax.GradientTransformation) -> Callable[..., Any]:
    @eqx.filter_jit
    def step(model, state, tokens):
        loss, grads = eqx.filter_value_and_grad(cross_entropy)(model, tokens)
        updates, state = tx.update(grads, state, arrays(model))
        return eqx.apply_updates(model, updates), state, loss

    return step


def train(step: Any, model: Any, state: Any, start: int, stop: int) -> Any:
    losses = []
    for i in range(start, stop):
        model, state, loss = step(model, state, sequences(i))
        losses.append(float(loss))
    return model, state, losses


RATE = 0.003


@eqx.filter_jit
def make_network(key: jax.Array) -> Network:
    return Network(key)


def committed(tree: Any) -> Any:
    """Commits arrays as those of a checkpoint are, so that a step is compiled once."""
    arrays, static = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, jax.devices()[0]), static)


@functools.cache
def adamw_loss() -> float:
    tx = optax.adamw(RATE, b2=0.95, weight_decay=0.0)
    model = make_network(jax.random.key(0))
    _, _, losses = train(trainer(tx), model, tx.init(arrays(model)), 0, 30)
    assert losses[-1] < 0.5 * losses[0]
    return losses[-1]


def test_trains_like_adamw_and_goes_on_from_a_checkpoint(tmp_path):
    """At AdamW's learning rate, with checkpoints by Orbax and by Equinox."""
    tx = lp.lorapre_adamw(RATE, **SMALL)
    step = trainer(tx)
    model = committed(make_network(jax.random.key(0)))
    state = committed(tx.init(arrays(model)))
    assert plan_of(state) == plan_of(jax.eval_shape(tx.init, abstract(Network)))
    model, state, _ = train(step, model, state, 0, 20)
    expected, expected_state, losses = train(step, model, state, 20, 30)
    assert losses[-1] <= adamw_loss() + 0.01

    fresh = make_network(jax.random.key(1))
    params, static = eqx.partition(fresh, eqx.is_inexact_array)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", (arrays(model), state))
        checkpointer.wait_until_finished()
        target = params, jax.eval_shape(tx.init, params)
        params, by_orbax = checkpointer.restore(tmp_path / "orbax", target)
    resumed, resumed_state, _ = train(
        step, eqx.combine(params, static), by_orbax, 20, 30
    )
    assert plan_of(by_orbax) == plan_of(state)
    assert_same(arrays(resumed), arrays(expected))
    assert_same(resumed_state, expected_state)

    eqx.tree_serialise_leaves(tmp_path / "state.eqx", (model, state))
    like = fresh, jax.eval_shape(tx.init, arrays(fresh))
    _, by_equinox = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", like)
    assert_same(by_equinox, state)


# Seeds and learning rates under vmap.


class Mlp(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.up = eqx.nn.Linear(16, 24, key=keys[0])
        self.down = eqx.nn.Linear(24, "scalar", key=keys[1])

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


X = random_tree({"x": (32, 16)})["x"]
Y = jnp.sin(X.sum(1) / 4)


def plain(seed, rate):
    return lp.lorapre_adamw(rate, seed=seed, **SMALL), lambda state: state


def injected(seed, rate):
    make = optax.inject_hyperparams(lp.lorapre_adamw, static_args=tuple(SMALL))
    tx = make(learning_rate=0.5, seed=0, **SMALL)

    def set_hyperparams(state):
        hyper = {"learning_rate": rate, "seed": seed}
        return state._replace(hyperparams=state.hyperparams | hyper)

    return tx, set_hyperparams


@pytest.mark.parametrize("make", [plain, injected])
def test_vmap_over_seeds_and_learning_rates_equals_one_by_one(make):
    """The seed is that of the model and of the optimizer."""

    def run(seed, rate):
        model = Mlp(jax.random.key(seed))
        tx, set_hyperparams = make(seed, rate)
        state = set_hyperparams(tx.init(arrays(model)))
        assert views(state).keys() == {"up/weight"}
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def loss(params):
            return jnp.mean((jax.vmap(eqx.combine(params, static))(X) - Y) ** 2)

        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, state), losses = jax.lax.scan(step, (params, state), length=5)
        return params, state, losses

    seeds, rates = jnp.arange(3), jnp.array([0.003, 0.01, 0.03])
    together = jax.jit(jax.vmap(run))(seeds, rates)
    alone = jax.jit(run)
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], together)
        expected = alone(seeds[i], rates[i])
        assert_close(one, expected, rtol=1e-3, atol=1e-4)
        assert expected[-1][-1] < expected[-1][0]


# NumPyro.


def network(x, y=None):
    """A model with weights (16, 24) and (24,) and noise, all with priors."""
    normal = dist.Normal(0.0, 1.0)
    up = numpyro.sample("up", normal.expand([16, 24]).to_event(2))
    down = numpyro.sample("down", normal.expand([24]).to_event(1))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    with numpyro.plate("data", len(x)):
        mean = jnp.tanh(x @ up / 4) @ down
        numpyro.sample("y", dist.Normal(mean, noise), obs=y)


def through_bytes(state: Any) -> Any:
    return pickle.loads(pickle.dumps(state))


def through_leaves(state: Any) -> Any:
    leaves, structure = jax.tree.flatten(state)
    arrays = [jnp.asarray(np.asarray(leaf)) for leaf in leaves]
    return jax.tree.unflatten(structure, arrays)


def through_one_vector(state: Any) -> Any:
    vector, back = ravel_pytree(state.optim_state)
    return state._replace(optim_state=back(vector))


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_numpyro_svi(guide):
    tx = lp.lorapre_adamw(0.01, **SMALL)
    svi = SVI(network, guide(network), optax_to_numpyro(tx), Trace_ELBO())
    state = svi.init(jax.random.PRNGKey(0), X, Y)
    update = jax.jit(svi.update)
    losses = []
    for _ in range(40):
        state, loss = update(state, X, Y)
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 20

    _, (params, opt_state) = state.optim_state
    assert params["up_auto_loc"].shape == (16, 24)
    assert views(opt_state) == {"up_auto_loc": ((), (0,), (1,), KERNELS)}
    factors = optax.tree_utils.tree_get(opt_state, "mu_factors")["up_auto_loc"]
    assert factors.left.shape == (16, 4)
    assert factors.left.any()
    assert factors.right.any()

    expected = update(state, X, Y)
    for travel in (through_bytes, through_leaves, through_one_vector):
        back = travel(state)
        assert plan_of(back.optim_state) == plan_of(state.optim_state)
        assert_same(update(back, X, Y), expected)


def test_a_module_that_can_be_called_is_no_function_of_labels():
    """Muon's tree of labels has the parameters' structure, which may be callable."""
    mlp = eqx.nn.MLP(16, 16, 32, 1, key=jax.random.key(0))
    params = eqx.filter(mlp, eqx.is_inexact_array)
    tx = lp.lorapre_muon(0.1, 4, min_dim_size_to_factor=8)
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
