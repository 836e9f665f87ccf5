"""The optax contract: what the arguments do, and parity with optax if all is dense."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from contract_cases import (
    ALIASES,
    CASES,
    COMMON,
    FACTORED,
    assert_close,
    assert_same,
    factored_paths,
    gradients,
    only_w,
    random_tree,
    run,
    w_trees,
)

import lorapre_jax as lp

pytestmark = pytest.mark.usefixtures("quick_compilation")

tree_get = optax.tree_utils.tree_get


# What the arguments do.


def test_seed_decides_the_random_start(case):
    params, grads = case.tree(), gradients(case)
    updates, _ = run(case.make(seed=3), params, grads)
    again, _ = run(case.make(seed=3), params, grads)
    other, _ = run(case.make(seed=4), params, grads)
    assert_same(again, updates)
    for name in FACTORED:
        difference = jnp.abs(other[-1][name] - updates[-1][name]).max()
        assert difference > 1e-4 * jnp.abs(updates[-1][name]).max()


@pytest.mark.parametrize("name", [n for n in CASES if n != "ema"])
def test_update_scale_is_for_factored_leaves(name):
    case = CASES[name]
    params, grads = case.tree(), gradients(case)
    whole, _ = run(case.make(), params, grads)
    scaled, _ = run(case.make(update_scale=0.25), params, grads)
    for before, after in zip(whole, scaled, strict=True):
        for leaf in before:
            factor = 0.25 if leaf in FACTORED else 1
            assert_close(after[leaf], factor * before[leaf])


@pytest.mark.parametrize("name", ALIASES)
def test_update_scale_leaves_weight_decay_alone(name):
    case = CASES[name]
    params, grads = case.tree(), case.tree(1)
    decayed, plain = (
        run(case.make(update_scale=0.25, weight_decay=wd), params, [grads])[0][0]
        for wd in (0.1, 0.0)
    )
    for leaf in FACTORED:
        decay = -0.01 * 0.1 * params[leaf]
        assert_close(decayed[leaf] - plain[leaf], decay, rtol=1e-3)


MASKS = {
    "all": None,
    "tree": {"bias": False, "heads": True, "stack": False, "w": True},
    "function": lambda params: jax.tree.map(lambda p: p.ndim == 2, params),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_adamw_decays_as_optax_does(mask):
    case = CASES["adamw"]
    params, grads = case.tree(), gradients(case)
    kwargs = {"b1": 0.9, "b2": 0.99, "weight_decay": 0.1, "mask": mask}
    expected, _ = run(optax.adamw(0.01, **kwargs), params, grads)
    dense = case.make(first_moment=lp.Dense(), second_moment=lp.Dense(), **kwargs)
    assert not factored_paths(dense, params)
    updates, _ = run(dense, params, grads)
    assert_close(updates, expected)
    kwargs["weight_decay"] = 0.0
    factored, _ = run(case.make(**kwargs), params, grads[:1])
    kwargs["weight_decay"] = 0.1
    decayed, _ = run(case.make(**kwargs), params, grads[:1])
    decays: Any = mask(params) if callable(mask) else mask
    decays = decays or dict.fromkeys(params, True)
    for leaf, decay in decays.items():
        expected_decay = -0.01 * 0.1 * params[leaf] * decay
        actual = decayed[0][leaf] - factored[0][leaf]
        assert_close(actual, expected_decay, rtol=1e-3)


# Parity with optax where everything is dense.


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_dense_adam_is_optax_adam(name):
    case = CASES[name]
    params, grads = case.tree(), gradients(case, 10)
    dense = {"first_moment": lp.Dense(), "second_moment": lp.Dense()}
    tx = case.make(b1=0.8, b2=0.97, eps=1e-6, **dense)
    assert not factored_paths(tx, params)
    updates, state = run(tx, params, grads)
    theirs: Any = optax.scale_by_adam if name == "adam" else (
        lambda *args: optax.adamw(0.01, *args, weight_decay=0.0)
    )  # fmt: skip
    expected, expected_state = run(theirs(0.8, 0.97, 1e-6), params, grads)
    assert_close(updates, expected)
    for field in ("mu", "nu"):
        assert_close(tree_get(state, field), tree_get(expected_state, field))


@pytest.mark.parametrize(
    ("nesterov", "consistent_rms"), [(True, None), (False, None), (True, 0.2)]
)
def test_dense_muon_is_optax_muon(nesterov, consistent_rms):
    case = CASES["muon"]
    params, grads = case.tree(), gradients(case, 10)
    numbers = optax.contrib.MuonDimensionNumbers
    shared = {
        "beta": 0.9,
        "nesterov": nesterov,
        "consistent_rms": consistent_rms,
        "weight_decay": 0.1,
        "adam_b1": 0.8,
        "adam_weight_decay": 0.2,
        "adam_learning_rate": 0.03,
    }
    dimension_numbers: Any = {
        "bias": None,
        "heads": numbers((0,), (1, 2)),
        "stack": numbers(1, 2),
        "w": numbers(),
    }
    theirs = optax.contrib.muon(
        0.01, muon_weight_dimension_numbers=dimension_numbers, **shared
    )
    ours = case.make(moment=lp.Dense(), **shared)
    assert not factored_paths(ours, params)
    updates, _ = run(ours, params, grads, jit=True)
    expected, _ = run(theirs, params, grads, jit=True)
    if nesterov:  # Which optax hands on to Adam, and we do not.
        for tree in (*updates, *expected):
            del tree["bias"]
    assert_close(updates, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("debias", [True, False])
def test_dense_ema_is_optax_ema(debias):
    case = CASES["ema"]
    params, grads = case.tree(), gradients(case, 10)
    tx = case.make(moment=lp.Dense(), debias=debias)
    assert not factored_paths(tx, params)
    updates, state = run(tx, params, grads)
    expected, expected_state = run(optax.ema(0.9, debias), params, grads)
    assert_close(updates, expected)
    assert_close(tree_get(state, "ema"), tree_get(expected_state, "ema"))


MOMENTUM_METHODS = {
    "heavy_ball": lambda ema: optax.chain(ema, optax.sgd(0.1 / (1 - 0.9))),
    "signum": lambda ema: optax.chain(
        ema, optax.scale_by_sign(), optax.sgd(optax.linear_schedule(0.05, 0.0, 200))
    ),
}


@pytest.mark.parametrize("method", MOMENTUM_METHODS.values(), ids=MOMENTUM_METHODS)
def test_momentum_methods_are_chains_around_the_average(method):
    (target,) = w_trees(1)
    tx = method(lp.lorapre_ema(0.9, 2, debias=False, matrices=lp.MatrixAxes()))
    params = jax.tree.map(jnp.zeros_like, target)
    assert factored_paths(tx, params) == {"w"}

    @jax.jit
    def train(params, state):
        def step(carry, _):
            params, state = carry
            grads = jax.tree.map(lambda w, t: 0.1 * (w - t), params, target)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=200)[0]

    trained, _ = train(params, tx.init(params))
    first = float(jnp.mean(target["w"] ** 2))
    assert float(jnp.mean((trained["w"] - target["w"]) ** 2)) < 1e-2 * first


def test_dense_heavy_ball_is_optax_momentum():
    params, *grads = w_trees(*range(6))
    ours = MOMENTUM_METHODS["heavy_ball"](
        lp.lorapre_ema(0.9, 2, debias=False, moment=lp.Dense())
    )
    updates, _ = run(ours, params, grads)
    expected, _ = run(optax.sgd(0.1, momentum=0.9), params, grads)
    assert_close(updates, expected, rtol=1e-4)


def test_default_matrices_are_large():
    """The default rule, if nothing says which leaves are matrices."""
    shapes = {"wide": (16, 24), "thin": (16, 4), "bias": (24,)}
    tx = lp.scale_by_lorapre_adam(2, min_dim_size_to_factor=8)
    assert factored_paths(tx, random_tree(shapes)) == {"wide"}
    named = lp.scale_by_lorapre_adam(**COMMON)
    assert factored_paths(named, CASES["adam"].tree()) == FACTORED


def test_a_rank_that_does_not_pay_is_reported(case):
    """For 12 x 8 at rank 5, factors would have 100 numbers; the moment has 96."""
    (params,) = w_trees(0)
    (leaf,) = lp.describe(only_w(case, rank=5), params).leaves
    assert not leaf.is_factored
    assert "does not pay" in leaf.why_dense
    (leaf,) = lp.describe(only_w(case, rank=4), params).leaves
    assert leaf.is_factored
