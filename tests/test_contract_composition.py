"""The optax contract: how updates are called, composed and cut into matrices."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_cases import (
    ALIASES,
    CASES,
    FACTORED,
    STATIC_ARGS,
    TRANSFORMS,
    assert_close,
    assert_same,
    factored_paths,
    gradients,
    only_w,
    plan_of,
    random_tree,
    run,
    w_trees,
)

import lorapre_jax as lp

pytestmark = pytest.mark.usefixtures("quick_compilation")

tree_get = optax.tree_utils.tree_get


# How updates are called and composed.


def test_params_and_extra_arguments_are_optional(case):
    params, grads = case.tree(), case.tree(1)
    tx = case.make()
    state = tx.init(params)
    expected = tx.update(grads, state, params)
    assert_same(tx.update(grads, state), expected)
    assert_same(tx.update(grads, state, params, value=1.0, unknown="x"), expected)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)


def test_chain(case):
    params, grads = case.tree(), gradients(case)
    halves = [jax.tree.map(lambda g: g / 2, g) for g in grads]
    expected, _ = run(case.make(), params, halves)
    chained = optax.chain(optax.scale(0.5), case.make(), optax.scale(2.0))
    assert factored_paths(chained, params) == FACTORED
    updates, _ = run(chained, params, grads)
    assert_close(updates, jax.tree.map(lambda u: 2 * u, expected))


def test_inject_hyperparams_equals_plain(case):
    """All numbers become tracers, also those without a schedule."""
    params, *grads = w_trees(0, 1, 2)
    kwargs = case.kwargs | {"matrices": lp.MatrixAxes()}
    expected, expected_state = run(case.factory(**kwargs), params, grads)
    tx = optax.inject_hyperparams(case.factory, STATIC_ARGS)(**kwargs)
    assert factored_paths(tx, params) == {"w"}
    state: Any = jax.jit(tx.init)(params)
    assert case.decay in state.hyperparams
    update = jax.jit(tx.update)
    for grad, plain in zip(grads, expected, strict=True):
        updates, state = update(grad, state, params)
        assert_close(updates, plain, rtol=1e-4, atol=2e-4)
    assert_close(state.inner_state, expected_state, rtol=1e-4, atol=1e-5)


def test_inject_hyperparams_schedules_a_decay(case):
    def schedule(step):
        return 0.5 + 0.1 * step

    params, grads = case.tree(), gradients(case)
    kwargs = case.kwargs | {case.decay: schedule}
    tx = optax.inject_hyperparams(case.factory, STATIC_ARGS)(**kwargs)
    updates, _ = run(tx, params, grads)
    state = case.make().init(params)
    for step, grad in enumerate(grads):
        plain = case.make(**{case.decay: schedule(step)})
        expected, state = plain.update(grad, state, params)
        assert_close(updates[step], expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", ALIASES)
def test_inject_hyperparams_takes_a_learning_rate_schedule(name):
    case = CASES[name]
    schedule = optax.linear_schedule(0.1, 0.01, 3)
    params, grads = case.tree(), gradients(case)
    kwargs = case.kwargs | {"learning_rate": schedule}
    tx = optax.inject_hyperparams(case.factory, STATIC_ARGS)(**kwargs)
    updates, _ = run(tx, params, grads)
    expected, _ = run(case.make(learning_rate=schedule), params, grads)
    assert_close(updates, expected, rtol=1e-4, atol=2e-4)


def test_forgotten_static_argument_raises_helpfully(case):
    (params,) = w_trees(0)
    with pytest.raises(TypeError, match=r"(?s)rank.*static_args"):
        optax.inject_hyperparams(case.factory)(**case.kwargs).init(params)


@pytest.mark.parametrize("name", ALIASES)
def test_constant_schedule_equals_its_constant(name):
    case = CASES[name]
    params, grads = case.tree(), gradients(case)
    expected, _ = run(case.make(learning_rate=0.03), params, grads)
    schedule = optax.constant_schedule(0.03)
    updates, _ = run(case.make(learning_rate=schedule), params, grads)
    assert_close(updates, expected)
    other, _ = run(case.make(learning_rate=0.06), params, grads)
    assert_close(other, jax.tree.map(lambda u: 2 * u, expected))


def test_multi_steps_equals_the_averaged_gradient(case):
    params, *grads = w_trees(0, 1, 2, 3, 4)
    means = [
        jax.tree.map(lambda a, b: (a + b) / 2, *pair) for pair in (grads[:2], grads[2:])
    ]
    expected, _ = run(only_w(case), params, means)
    multi = optax.MultiSteps(only_w(case), every_k_schedule=2)
    tx = multi.gradient_transformation()
    assert factored_paths(tx, params) == {"w"}
    update = jax.jit(tx.update)
    state = tx.init(params)
    for step, grad in enumerate(grads):
        updates, state = update(grad, state, params)
        if step % 2:
            assert_close(updates, expected[step // 2], rtol=1e-4, atol=2e-4)
        else:
            assert not updates["w"].any()


def test_apply_if_finite_keeps_the_state(case):
    """The state is the same bit for bit after a gradient with a single NaN."""
    params, good, bad = w_trees(0, 1, 2)
    bad = {"w": bad["w"].at[3, 3].set(jnp.nan)}
    tx = optax.apply_if_finite(only_w(case), max_consecutive_errors=3)
    assert factored_paths(tx, params) == {"w"}
    update = jax.jit(tx.update)
    _, before = update(good, tx.init(params), params)
    updates, after = update(bad, before, params)
    assert not updates["w"].any()
    assert_same(after.inner_state, before.inner_state)
    assert after.total_notfinite == 1
    assert_same(update(good, after, params)[0], update(good, before, params)[0])


def test_masked(case):
    """A masked leaf is returned unchanged, and has no state."""
    params, grads = case.tree(), gradients(case)
    mask = dict.fromkeys(params, True) | {"stack": False}
    tx = optax.masked(case.make(), mask)
    assert factored_paths(tx, params) == FACTORED - {"stack"}
    updates, state = run(tx, params, grads)
    full, _ = run(case.make(), params, grads)
    for step, (update, grad) in enumerate(zip(updates, grads, strict=True)):
        assert_same(update["stack"], grad["stack"])
        for name in params.keys() - {"stack"}:
            assert_close(update[name], full[step][name])
    for _, name in case.fields:
        assert "stack" not in tree_get(state, name)


@pytest.mark.parametrize("wrap", [optax.partition, optax.multi_transform])
def test_partition(case, wrap):
    params, grads = case.tree(), gradients(case, 2)
    labels = dict.fromkeys(params, "ours") | {"w": "sgd"}
    tx = wrap({"ours": case.make(), "sgd": optax.sgd(0.5)}, labels)
    assert factored_paths(tx, params) == FACTORED - {"w"}
    updates, _ = run(tx, params, grads)
    full, _ = run(case.make(), params, grads)
    for step, (update, grad) in enumerate(zip(updates, grads, strict=True)):
        assert_close(update["w"], -0.5 * grad["w"])
        for name in params.keys() - {"w"}:
            assert_close(update[name], full[step][name])


# Matrices inside of leaves.


def test_a_stack_equals_its_layers(case):
    """Nothing mixes across batch slices, whatever their number or scale."""
    layers = [w_trees(2 * i, 2 * i + 1, 2 * i + 2) for i in range(3)]
    for i, trees in enumerate(layers):
        layers[i] = [{"w": 10.0**i * tree["w"]} for tree in trees]
    alone = [run(only_w(case), params, grads)[0] for params, *grads in layers]
    params, *grads = (
        {"stack": jnp.stack([tree["w"] for tree in trees])}
        for trees in zip(*layers, strict=True)
    )
    assert factored_paths(only_w(case), params) == {"stack"}
    stacked, _ = run(only_w(case), params, grads)
    for i, step in itertools.product(range(3), range(2)):
        np.testing.assert_allclose(
            stacked[step]["stack"][i],
            alone[i][step]["w"],
            rtol=1e-4,
            atol=5e-5 * (10**i if case.factory is lp.lorapre_ema else 1),
        )


@pytest.mark.parametrize(
    ("name", "slices"), [("adam", 1), *((name, 3) for name in TRANSFORMS)]
)
def test_slices_at_once_change_nothing_but_memory(name, slices):
    """With two batch axes; of 4 slices, at most 3 at once means 2."""
    case = CASES[name]
    params, *grads = (random_tree({"w": (4, 2, 12, 8)}, seed) for seed in range(3))

    def outcome(slices):
        tx = only_w(case, slices_at_once=slices)
        assert factored_paths(tx, params) == {"w"}
        jaxpr = str(jax.make_jaxpr(tx.update)(grads[0], tx.init(params)))
        assert ("dynamic_update_slice" in jaxpr) == (slices is not None)
        return run(tx, params, grads, jit=True)

    assert_close(outcome(slices), outcome(None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("axes", "view"),
    [
        (lp.MatrixAxes(0, (1, 2)), lambda w: w.reshape(12, 2, 4)),
        (lp.MatrixAxes(1, (0, 2)), lambda w: w.reshape(12, 2, 4).swapaxes(0, 1)),
        (lp.MatrixAxes((1, 2), 0), lambda w: w.T.reshape(8, 3, 4)),
    ],
    ids=["heads", "heads_first", "transposed"],
)
def test_other_axes_equal_the_plain_matrix(case, axes, view):
    plain = w_trees(0, 1, 2)
    viewed = [{"w": view(tree["w"])} for tree in plain]
    tx = case.make(matrices=axes)
    assert factored_paths(tx, viewed[0]) == {"w"}
    expected, _ = run(only_w(case), plain[0], plain[1:])
    updates, _ = run(tx, viewed[0], viewed[1:])
    assert_close(updates, [{"w": view(update["w"])} for update in expected])


def test_muon_dimension_numbers_mean_the_same(case):
    params, *grads = w_trees(0, 1, 2)
    theirs = case.make(matrices=optax.contrib.MuonDimensionNumbers(0, 1))
    ours = case.make(matrices=lp.MatrixAxes(0, 1))
    assert factored_paths(theirs, params) == {"w"}
    assert_same(run(theirs, params, grads), run(ours, params, grads))
    # Rows and columns swapped: another matrix, so another random start or scale.
    swapped = case.make(matrices=optax.contrib.MuonDimensionNumbers(1, 0))
    assert plan_of(swapped.init(params)) != plan_of(ours.init(params))
