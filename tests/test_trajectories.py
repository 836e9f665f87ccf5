"""Fifty-step trajectories of every method against the float64 oracle."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import lorapre_jax as lp

STEPS, RANK, SEED = 50, 4, 3
PAPER = lp.AlgorithmOne()
SHAPES = {"tall": (28, 12), "wide": (12, 28), "square": (20, 20)}


def gradients(shape, seed=0, steps=STEPS):
    """Returns a low-rank signal that drifts slowly, in noise of full rank."""
    rng = np.random.default_rng(seed)
    p, q = shape
    left, right = rng.normal(size=(p, 3)), rng.normal(size=(3, q))
    for _ in range(steps):
        left = left + 0.1 * rng.normal(size=left.shape)
        yield 1e-2 * (left @ right + rng.normal(size=shape))


def normal_noise(q, rank=RANK, seed=SEED):
    draw = jax.random.normal(jax.random.key(seed), (rank, q), jnp.float32)
    return np.asarray(draw, np.float64)


def run(tx, grads, dtype, to_leaf=lambda x: x, to_matrix=lambda x: x):
    """Returns the updates of one leaf, after asserting that it is factored."""
    grads = [jnp.asarray(to_leaf(g), dtype) for g in grads]
    params = {"w": jnp.zeros_like(grads[0])}
    (leaf,) = lp.describe(tx, params).leaves
    assert leaf.is_factored
    update, state, updates = jax.jit(tx.update), tx.init(params), []
    for g in grads:
        u, state = update({"w": g}, state)
        updates.append(to_matrix(np.asarray(u["w"], np.float64)))
    return updates


def assert_close(updates, expected, bound):
    """Compares every step's update, relative to the step's Frobenius norm."""
    for step, (update, reference) in enumerate(zip(updates, expected, strict=True), 1):
        error = np.linalg.norm(update - reference) / np.linalg.norm(reference)
        assert error < bound, f"step {step}: relative error {error:.2e}"


def regression(shape, gain=1.0):
    p, q = shape
    return oracle.Regression(p, q, RANK, oracle.sketch(SEED, q, RANK), gain)


# The paper's rule inverts Gram matrices damped by as little as 1e-6.
TOLERANCE = {
    "float64": {"paper": 1e-6, "other": 1e-9},
    "float32": {"paper": 5e-3, "other": 1e-4},
}


def tolerance(dtype, method="other"):
    return TOLERANCE[dtype].get(method, TOLERANCE[dtype]["other"])


@pytest.mark.parametrize("gain", [0.0, 0.3])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_gain_of_the_residual(gain, dtype):
    shape, method = SHAPES["wide"], lp.LowRank(residual_gain=gain)
    with jax.enable_x64(dtype == "float64"):
        tx = lp.lorapre_ema(
            0.9, RANK, moment=method, min_dim_size_to_factor=1, factor_dtype=dtype,
            seed=SEED,
        )  # fmt: skip
        updates = run(tx, gradients(shape), dtype)
    expected = oracle.ema(gradients(shape), regression(shape, gain=gain))
    assert_close(updates, expected, tolerance(dtype))


@pytest.mark.parametrize(
    "method", [lp.LowRank(0.5), lp.RankOne(), lp.RotatedRankOne(), PAPER]
)
def test_methods_are_values(method):
    assert hash(method) == hash(dataclasses.replace(method))
    assert method == dataclasses.replace(method)
    assert not callable(method)


METHODS = {
    "default": (lp.LowRank(), lp.RotatedRankOne()),
    "gain": (lp.LowRank(residual_gain=0.3), lp.RotatedRankOne()),
    "rank_one": (lp.LowRank(), lp.RankOne()),
    "paper": (PAPER, PAPER),
    "both_factored": (lp.LowRank(), lp.LowRank()),
    "dense_first": (lp.Dense(), lp.RankOne()),
    "dense_second": (lp.LowRank(), lp.Dense()),
}


def oracle_of(method, shape):
    if method == PAPER:
        return oracle.Paper(shape[0], shape[1], RANK, normal_noise(shape[1]))
    if isinstance(method, lp.LowRank):
        return regression(shape, method.residual_gain)
    others = {
        lp.RotatedRankOne: oracle.Rotated,
        lp.RankOne: oracle.RankOne,
        lp.Dense: oracle.Dense,
    }
    return others[type(method)]()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_adam(method, shape, dtype):
    first, second = METHODS[method]
    with jax.enable_x64(dtype == "float64"):
        tx = lp.scale_by_lorapre_adam(
            RANK,
            first_moment=first,
            second_moment=second,
            min_dim_size_to_factor=1,
            factor_dtype=dtype,
            seed=SEED,
        )
        updates = run(tx, gradients(shape), dtype)
    expected = oracle.adam(
        gradients(shape), oracle_of(first, shape), oracle_of(second, shape)
    )
    assert_close(updates, expected, tolerance(dtype, method))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_ema(debias, shape, dtype):
    with jax.enable_x64(dtype == "float64"):
        tx = lp.lorapre_ema(
            0.8, RANK, debias, min_dim_size_to_factor=1, factor_dtype=dtype, seed=SEED
        )
        updates = run(tx, gradients(shape), dtype)
    first = regression(shape)
    expected = oracle.ema(gradients(shape), first, 0.8, debias)
    assert_close(updates, expected, tolerance(dtype))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("rms", [None, 0.2])
@pytest.mark.parametrize("method", ["default", "paper"])
def test_muon_in_x64(method, shape, nesterov, rms):
    moment, _ = METHODS[method]
    with jax.enable_x64(True):
        tx = lp.scale_by_lorapre_muon(
            RANK,
            nesterov=nesterov,
            consistent_rms=rms,
            moment=moment,
            min_dim_size_to_factor=1,
            factor_dtype="float64",
            seed=SEED,
        )
        updates = run(tx, gradients(shape), "float64")
    first = oracle_of(moment, shape)
    expected = oracle.muon(gradients(shape), first, 0.95, nesterov, rms=rms)
    assert_close(updates, expected, tolerance("float64", method))


@pytest.mark.parametrize("method", ["default", "paper"])
def test_muon_in_float32(method):
    shape, (moment, _) = SHAPES["tall"], METHODS[method]
    tx = lp.scale_by_lorapre_muon(
        RANK, moment=moment, min_dim_size_to_factor=1, seed=SEED
    )
    updates = run(tx, gradients(shape), "float32")
    expected = oracle.muon(gradients(shape), oracle_of(moment, shape))
    assert_close(updates, expected, 1e-2)


@pytest.mark.parametrize("slices_at_once", [None, 2])
def test_batch_and_fused_axes(slices_at_once):
    """(2 layers, 12 in, 3 batch, 7 x 4 out): six matrices of (12, 28)."""
    shape, count = SHAPES["wide"], 6
    streams = [list(gradients(shape, seed)) for seed in range(count)]
    stacked = [np.stack(step) for step in zip(*streams, strict=True)]

    def to_leaf(x):
        return x.reshape(2, 3, 12, 7, 4).transpose(0, 2, 1, 3, 4)

    def to_matrix(x):
        return x.transpose(0, 2, 1, 3, 4).reshape(count, 12, 28)

    with jax.enable_x64(True):
        tx = lp.scale_by_lorapre_adam(
            RANK,
            matrices=lp.MatrixAxes(rows=1, columns=(3, 4)),
            factor_dtype="float64",
            slices_at_once=slices_at_once,
            seed=SEED,
        )
        updates = run(tx, stacked, "float64", to_leaf, to_matrix)
    for i, stream in enumerate(streams):
        expected = oracle.adam(stream, regression(shape), oracle.Rotated())
        assert_close([u[i] for u in updates], expected, 1e-9)


def test_bfloat16_gradients_and_parameters():
    """Inputs and outputs are rounded, and the state is float32."""
    shape = SHAPES["wide"]
    rounded = [np.asarray(jnp.asarray(g, "bfloat16"), float) for g in gradients(shape)]
    tx = lp.scale_by_lorapre_adam(RANK, min_dim_size_to_factor=1, seed=SEED)
    updates = run(tx, rounded, "bfloat16")
    first = regression(shape)
    expected = oracle.adam(rounded, first, oracle.Rotated())
    assert_close(updates, expected, 5e-3)  # bfloat16 keeps 8 bits.


def test_bfloat16_factors():
    shape = SHAPES["wide"]
    tx = lp.scale_by_lorapre_adam(
        RANK, min_dim_size_to_factor=1, factor_dtype="bfloat16", seed=SEED
    )
    updates = run(tx, gradients(shape), "float32")
    first = regression(shape)
    expected = oracle.adam(gradients(shape), first, oracle.Rotated())
    assert_close(updates, expected, 5e-2)


def test_adamw_adds_decay_and_learning_rate():
    shape = SHAPES["wide"]
    rng = np.random.default_rng(1)
    start = rng.normal(size=shape)
    with jax.enable_x64(True):
        tx = lp.lorapre_adamw(
            optax.linear_schedule(0.1, 0.0, 40),
            RANK,
            weight_decay=0.05,
            update_scale=0.25,
            min_dim_size_to_factor=1,
            factor_dtype="float64",
            seed=SEED,
        )
        params: Any = {"w": jnp.asarray(start)}
        state, update = tx.init(params), jax.jit(tx.update)
        updates: Any
        for g in gradients(shape):
            updates, state = update({"w": jnp.asarray(g)}, state, params)
            params = optax.apply_updates(params, updates)
        result = np.asarray(params["w"])
    first = regression(shape)
    theta = start
    for t, u in enumerate(oracle.adam(gradients(shape), first, oracle.Rotated())):
        rate = 0.1 * max(0.0, 1 - t / 40)
        theta = theta - rate * (0.25 * u + 0.05 * theta)
    assert_close([result], [theta], 1e-7)  # optax computes schedules in float32.
