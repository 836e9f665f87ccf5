"""The five optimizers: their leaves, their schedules, and that they learn."""

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from rich.console import Console

import lorapre_jax as lp
from examples.llama import layout
from examples.llama.config import Config, ModelConfig, OptimizerConfig
from examples.llama.optimizers import DEFAULT_RATES, clip, make_optimizer, schedule
from examples.llama.pure import PureLlama
from examples.llama.steps import abstract_state
from examples.llama.train import train

MODEL = ModelConfig(width=32, ffn_width=64, num_layers=2, num_heads=2)
NAMES = list(DEFAULT_RATES)


@functools.cache
def initial_params(scan_layers):
    config = dataclasses.replace(MODEL, scan_layers=scan_layers)
    return jax.jit(PureLlama(config, 40).init)(jax.random.key(0))


def params_for(name):
    """Returns small parameters, with stacked layers if the optimizer takes them."""
    return initial_params(scan_layers=name != "galore")


@pytest.mark.parametrize("name", NAMES)
def test_embedding_head_and_norms_get_plain_adam(name):
    one_rate = name.endswith("adamw")
    config = OptimizerConfig(
        name,
        rank=4,
        clip_norm=None,
        learning_rate=3e-3 if one_rate else 1.0,
        dense_learning_rate=None if one_rate else 3e-3,
    )
    tx = make_optimizer(config, steps=10)
    adam = optax.adam(schedule(3e-3, 0.1, 10), b1=0.9, b2=0.95)
    params = params_for(name)
    state, expected_state = tx.init(params), adam.init(params)
    update, adam_update = jax.jit(tx.update), jax.jit(adam.update)
    for step in range(2):
        key = jax.random.key(step)
        grads = optax.tree.random_like(key, params)
        updates, state = update(grads, state, params)
        expected, expected_state = adam_update(grads, expected_state)
        for part in ("embed", "head", "norm"):
            (actual,) = jax.tree.leaves(updates[part])
            (wanted,) = jax.tree.leaves(expected[part])
            np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-8)
        layer = updates["layers"][0] if name == "galore" else updates["layers"]
        wanted = expected["layers"][0] if name == "galore" else expected["layers"]
        np.testing.assert_allclose(
            layer["mlp_norm"]["scale"], wanted["mlp_norm"]["scale"], rtol=1e-4
        )
        if name != "adamw":  # the matrices have a rule of their own
            actual, wanted = (x["mlp"]["up"]["kernel"] for x in (layer, wanted))
            assert not np.allclose(actual, wanted, rtol=0.1)


@pytest.mark.parametrize("name", ["lorapre_adamw", "lorapre_muon", "galore"])
def test_low_rank_optimizers_keep_less_state_than_adamw(name):
    params = params_for(name)

    def ratio(**settings):
        tx = make_optimizer(OptimizerConfig(name, rank=2, **settings), steps=10)
        return lp.describe(tx, params).ratio

    assert ratio(factor_embeddings=True) < ratio() < 0.5


@pytest.mark.parametrize("algorithm", ["default", "paper"])
def test_factored_embeddings_have_second_moments_of_entries(algorithm):
    config = OptimizerConfig(rank=2, factor_embeddings=True, algorithm=algorithm)
    params = params_for("lorapre_adamw")
    leaves = lp.describe(make_optimizer(config, steps=10), params).leaves
    factored = {leaf.path: leaf.methods[1] for leaf in leaves if leaf.is_factored}
    embeddings = {factored.pop("embed/embedding"), factored.pop("head/kernel")}
    if algorithm == "paper":
        assert embeddings == set(factored.values()) == {lp.AlgorithmOne()}
    else:
        assert embeddings == {lp.RankOne()}
        assert set(factored.values()) == {lp.RotatedRankOne()}


@pytest.mark.parametrize("name", NAMES)
def test_tied_embeddings_have_a_place_and_a_rule(name):
    """The embedding is the only leaf, and its gradient comes from both uses."""
    config = dataclasses.replace(
        MODEL, tie_embeddings=True, scan_layers=name != "galore"
    )
    settings = {"rank": 2, "factor_embeddings": name != "adamw"}
    tx = make_optimizer(OptimizerConfig(name, **settings), steps=10)
    mesh = layout.make_mesh("fsdp=4,tensor=2", jax.devices())
    abstract = abstract_state(PureLlama(config, 40), tx, mesh)
    assert abstract.params["embed"]["embedding"].sharding.spec == P("tensor", "fsdp")
    if name.startswith("lorapre"):
        leaves = {leaf.path: leaf for leaf in lp.describe(tx, abstract.params).leaves}
        assert leaves["embed/embedding"].is_factored


@pytest.mark.parametrize("name", ["lorapre_adamw", "lorapre_muon"])
def test_few_layers_at_once_change_no_update(name):
    params = params_for(name)
    grads = optax.tree.random_like(jax.random.key(0), params)

    def update(layers_at_once):
        config = OptimizerConfig(name, rank=4, layers_at_once=layers_at_once)
        tx = make_optimizer(config, steps=10)
        step = jax.jit(tx.update)
        state = tx.init(params)
        return step(grads, state, params)[0], str(step.trace(grads, state).jaxpr)

    (expected, together), (actual, one_by_one) = update(None), update(1)
    assert one_by_one.count("scan") + one_by_one.count("while") > together.count(
        "while"
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        actual,
        expected,
    )


def test_bfloat16_gradients_are_clipped_by_their_exact_norm():
    """Sums of squares in bfloat16 would have an error of some per cent."""
    grads = {str(i): jnp.full(100, 0.1, jnp.bfloat16) for i in range(300)}
    tx = clip(1.0)
    clipped, _ = tx.update(grads, tx.init(grads))
    assert {x.dtype for x in jax.tree.leaves(clipped)} == {jnp.dtype("bfloat16")}
    norm = optax.tree.norm(optax.tree.cast(clipped, "float32"))
    np.testing.assert_allclose(norm, 1.0, rtol=2e-3)


def test_schedule_rises_to_its_peak_and_falls_to_a_tenth():
    rate = schedule(1.0, warmup=0.1, steps=100)
    start, middle = np.asarray(rate(0)), np.asarray(rate(5))
    assert 0 < start < middle < 1
    np.testing.assert_allclose(rate(jnp.asarray([10, 55, 100])), [1, 0.55, 0.1])
    for warmup in (0.0, 1.0):
        values = schedule(1.0, warmup, steps=2)(jnp.arange(4))
        assert np.isfinite(values).all()


@pytest.mark.parametrize("name", NAMES)
def test_learns(name, tiny_config):
    config = tiny_config(name)
    result = train(config, Console(file=io.StringIO()))
    # 5.55 nats at the start; each of the five gets below 5 within twelve steps.
    assert result.held_out_loss < 5.0
    assert (result.state_ratio < 0.9) == (name != "adamw")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "`optimizer.rank` must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "`optimizer.learning_rate` must be > 0"),
        ({"b1": 1.0}, r"`optimizer.b1` must be in \[0, 1\), got 1.0"),
        ({"warmup": 2.0}, "`optimizer.warmup` must be in"),
        ({"weight_decay": -1.0}, "must not be negative"),
        ({"dense_learning_rate": 0.1}, "has one learning rate"),
        ({"name": "adamw", "factor_embeddings": True}, "means nothing"),
        ({"name": "muon", "layers_at_once": 1}, "is for lorapre_adamw and"),
        ({"layers_at_once": 0}, "`optimizer.layers_at_once` must be at least 1, got 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)


def test_galore_names_the_mend_for_stacked_layers():
    with pytest.raises(ValueError, match=r"`model\.scan_layers: false`"):
        Config(optimizer=OptimizerConfig("galore"))
