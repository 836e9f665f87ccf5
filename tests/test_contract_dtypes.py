"""The optax contract: dtypes and compilation."""

import functools
import itertools

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
    factored_paths,
    gradients,
    only_w,
    run,
    shapes_of,
    w_trees,
)

import lorapre_jax as lp

pytestmark = pytest.mark.usefixtures("quick_compilation")

tree_get = optax.tree_utils.tree_get

HALF = [jnp.bfloat16, jnp.float16, jnp.float32]
PAIRS = list(itertools.product(HALF, HALF))


# Dtypes and compilation.


@pytest.mark.parametrize(("grad_dtype", "param_dtype"), PAIRS)
def test_dtypes_of_updates_and_state(case, grad_dtype, param_dtype):
    """Updates have optax's dtypes, and the state keeps its own in scan and cond.

    Tracing is enough, since JAX raises if a carry or a branch changes its type.
    """
    tx, params = case.make(), case.tree(dtype=param_dtype)
    state, grads = tx.init(params), case.tree(1, grad_dtype)

    def step(state, grads):
        updates, new = tx.update(grads, state, params)
        return jax.lax.cond(grads["w"][0, 0] > 0, lambda: new, lambda: state), updates

    after, updates = jax.eval_shape(
        functools.partial(jax.lax.scan, step),
        state,
        jax.tree.map(lambda g: jnp.stack([g, -g]), grads),
    )
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert shapes_of(after) == shapes_of(state)

    param, grad = {"w": params["w"]}, {"w": grads["w"]}
    expected = jax.eval_shape(
        lambda p, g: case.reference.update(g, case.reference.init(p), p)[0], param, grad
    )
    for leaf in jax.tree.leaves(updates):
        assert leaf.dtype == expected["w"].dtype


@pytest.mark.parametrize("name", TRANSFORMS)
def test_state_dtypes_do_not_depend_on_the_parameters(name):
    """It is float32 at least, so that a bfloat16 model loses nothing between steps."""
    case = CASES[name]
    dtypes = [
        [leaf.dtype for leaf in jax.tree.leaves(case.make().init(case.tree(dtype=d)))]
        for d in HALF
    ]
    assert dtypes[0] == dtypes[1] == dtypes[2]
    assert set(dtypes[0]) == {jnp.dtype("int32"), jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_follows_single_precision(case, dtype):
    """The computation between inputs and outputs in half precision is in float32."""
    params = case.tree()
    grads = [jax.tree.map(lambda g: g.astype(dtype), g) for g in gradients(case)]
    single = [jax.tree.map(lambda g: g.astype(jnp.float32), g) for g in grads]
    expected, _ = run(case.make(), params, single)
    half = jax.tree.map(lambda p: p.astype(dtype), params)
    updates, _ = run(case.make(), half, grads)
    for name in FACTORED:
        for step in range(3):
            assert updates[step][name].dtype == dtype
            rounded = expected[step][name].astype(dtype)
            np.testing.assert_allclose(
                np.asarray(updates[step][name], np.float32),
                np.asarray(rounded, np.float32),
                rtol=2e-2,
                atol=1e-3,
            )


def test_factors_in_bfloat16(case):
    params = case.tree()
    tx = case.make(factor_dtype="bfloat16")
    assert factored_paths(tx, params) == FACTORED
    updates, state = run(tx, params, gradients(case))
    assert all(u.dtype == jnp.float32 for u in jax.tree.leaves(updates))
    pairs = 0
    for _, name in case.fields:
        for factors in tree_get(state, name).values():
            # The row and column statistics of RankOne are too small to be worth it.
            if hasattr(factors, "left"):
                pairs += 1
                assert factors.left.dtype == factors.right.dtype == jnp.bfloat16
            else:
                assert factors.row.dtype == factors.column.dtype == jnp.float32
    assert pairs
    single, _ = run(case.make(), params, gradients(case))
    for name in FACTORED:
        scale = float(jnp.abs(single[-1][name]).max())
        difference = float(jnp.abs(updates[-1][name] - single[-1][name]).max())
        assert 0 < difference < 0.1 * scale


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(
    ("grad_dtype", "param_dtype"),
    list(itertools.product([jnp.bfloat16, jnp.float32], repeat=2)),
)
def test_strict_dtype_promotion(name, grad_dtype, param_dtype):
    """Tracing is enough, since JAX raises if two dtypes are combined."""
    case = CASES[name]
    tx, params = case.make(), case.tree(dtype=param_dtype)
    grads = case.tree(1, grad_dtype)
    expected = jax.eval_shape(tx.update, grads, tx.init(params), params)
    with jax.numpy_dtype_promotion("strict"):
        assert factored_paths(tx, params) == FACTORED
        outcome = jax.eval_shape(tx.update, grads, tx.init(params), params)
    assert shapes_of(outcome) == shapes_of(expected)


SECOND_MOMENTS = {"rank one": lp.RankOne(), "low rank": lp.LowRank()}


def under_strict_rank_promotion(tx, params, grads):
    """Tracing is enough, since JAX raises if arrays of different ranks are combined."""
    with jax.numpy_rank_promotion("raise"):
        state = jax.eval_shape(tx.init, params)
        return jax.eval_shape(tx.update, grads, state, params)


@pytest.mark.parametrize("slices", [None, 1])
def test_strict_rank_promotion(case, slices):
    params, grads = case.tree(), case.tree(1)
    tx = case.make(slices_at_once=slices)
    assert factored_paths(tx, params) == FACTORED
    expected = jax.eval_shape(tx.update, grads, tx.init(params), params)
    outcome = under_strict_rank_promotion(tx, params, grads)
    assert shapes_of(outcome) == shapes_of(expected)


@pytest.mark.parametrize("second", SECOND_MOMENTS.values(), ids=SECOND_MOMENTS)
def test_strict_rank_promotion_in_second_moments(second):
    case = CASES["adam"]
    tx = case.make(second_moment=second)
    under_strict_rank_promotion(tx, case.tree(), case.tree(1))


def test_strict_rank_promotion_in_what_is_asked_of_a_state():
    case = CASES["adam"]
    params, grads = w_trees(0, 1)
    dense = {"first_moment": lp.Dense(), "second_moment": lp.Dense()}
    kinds = [{"second_moment": lp.LowRank()}, {"second_moment": lp.RankOne()}, dense]
    with jax.numpy_rank_promotion("raise"):
        state = only_w(case).init(params)
        jax.eval_shape(lp.diagnostics, state, grads)
        for kind in [*kinds, {"rank": 1}]:
            state = lp.convert_state(
                state, only_w(case, **kind), params, b1=0.9, b2=0.95
            )


@pytest.mark.parametrize("name", TRANSFORMS)
def test_x64(name):
    """x64 changes nothing in float32, and float64 has its full accuracy."""
    case = CASES[name]
    params, *grads = w_trees(0, 1, 2)
    single, single_state = run(only_w(case), params, grads, jit=True)
    with jax.enable_x64(True):
        assert factored_paths(only_w(case), params) == {"w"}
        updates, state = run(only_w(case), params, grads, jit=True)
        assert shapes_of(state) == shapes_of(single_state)
        assert_close(updates, single, rtol=1e-4, atol=2e-4)

        double = [
            {"w": jnp.asarray(tree["w"], jnp.float64)} for tree in (params, *grads)
        ]
        tx = only_w(case, factor_dtype="float64")
        assert factored_paths(tx, double[0]) == {"w"}
        updates, state = run(tx, double[0], double[1:], jit=True)
        assert shapes_of(state) == shapes_of(tx.init(double[0]))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state)}
    assert dtypes == {jnp.dtype("int32"), jnp.dtype("float64")}
    assert updates[-1]["w"].dtype == jnp.float64
    difference = np.abs(np.asarray(updates[-1]["w"]) - np.asarray(single[-1]["w"]))
    assert 0 < difference.max() < 2e-2 * np.abs(single[-1]["w"]).max()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_wide_states_are_computed_as_wide(name):
    """With float32 gradients of float64 parameters, the computation stays float64."""
    case = CASES[name]
    with jax.enable_x64(True):
        single = w_trees(0, 1, 2)
        params, *grads = jax.tree.map(lambda x: x.astype("float64"), single)
        tx = only_w(case, factor_dtype="float64")
        expected = run(tx, params, grads, jit=True)
        assert_close(run(tx, params, single[1:], jit=True), expected, 1e-9, 1e-12)


def test_traced_once_and_converges(case):
    """The loss is quadratic; the second call of `update` compiles nothing."""
    target = case.tree(1)
    steps = 300
    tx = case.make_optimizer(optax.cosine_decay_schedule(0.1, steps))
    params = case.tree()
    assert factored_paths(tx, params) == FACTORED
    traces = []

    def loss(params):
        errors = jax.tree.map(lambda w, t: jnp.sum((w - t) ** 2), params, target)
        return sum(jax.tree.leaves(errors)) / 2

    @jax.jit
    def step(params, state):
        traces.append(None)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    first, state = loss(params), tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    assert len(traces) == 1
    assert loss(params) < 1e-3 * first
