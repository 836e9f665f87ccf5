"""Q-GaLore against a float64 NumPy oracle; its four bits and its lazy refreshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trajectories import gradients, run, size_in_bytes, wide

from benchmarks.baselines import q_galore

B1, B2, EPS = 0.9, 0.99, 1e-6
SHAPES = {"tall": (80, 70), "wide": (20, 30)}  # The first takes two blocks.
PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


def int4(x):
    """`s (round(x / s) + z - z)` by blocks of 256, z an integer, codes from 0 to 15."""
    flat, out = x.ravel(), []
    for start in range(0, flat.size, 256):
        block = flat[start : start + 256]
        s = (max(block.max(), 0) - min(block.min(), 0)) / 15
        z = np.round(-min(block.min(), 0) / s)
        out.append(s * (np.clip(np.round(block / s) + z, 0, 15) - z))
    return np.concatenate(out).reshape(x.shape)


def singular_vectors(g, rank):
    """Left ones in float64, with the signs that JAX gives them: they are arbitrary."""
    u = np.linalg.svd(g.astype(np.float64), full_matrices=False)[0][:, :rank]
    as_in_jax = np.asarray(jnp.linalg.svd(g, full_matrices=False)[0][:, :rank])
    return u * np.sign((u * as_in_jax).sum(axis=0))


def oracle(grads, rank, gap, threshold, patience):
    """The direction of every step for one matrix with at least as many columns as rows.

    Also which steps refreshed the projector.
    """
    projector = np.zeros((len(grads[0]), rank))
    history, refreshes, directions = [], [], []
    m, v = np.zeros((rank, grads[0].shape[1])), np.zeros((rank, grads[0].shape[1]))
    for t, g in enumerate(grads, 1):
        if (t - 1) % gap == 0:
            refreshes.append(t - 1)
            u = singular_vectors(g, rank)
            if t > 1:
                a, b = projector[:, 0], u[:, 0]
                history.append(abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b))
            if len(history) >= patience and min(history[-patience:]) >= threshold:
                gap *= 2
            projector = int4(u)
        low = projector.T @ g.astype(np.float64)
        m, v = B1 * m + (1 - B1) * low, B2 * v + (1 - B2) * low**2
        adam = m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + EPS)
        directions.append(projector @ adam)
    return directions, refreshes, gap


@pytest.mark.parametrize("threshold", [0.2, 2.0])
def test_follows_the_oracle(threshold):
    rank, gap, patience, grads = 4, 2, 2, gradients(SHAPES, 10)
    # One matrix with a stable subspace, one without.
    grads["wide"] += 3 * np.random.default_rng(1).normal(size=SHAPES["wide"])
    tx = q_galore.scale_by_q_galore(rank, B1, B2, EPS, gap, threshold, patience)
    directions, states = run(tx, grads)
    for name, direction in directions.items():
        expected, refreshes, last_gap = oracle(
            np.float32(wide(grads[name])), rank, gap, threshold, patience
        )
        lazy = threshold < 1 and name == "wide"
        assert refreshes == ([0, 2, 4, 8] if lazy else [0, 2, 4, 6, 8])
        assert states.matrices[name].gap[-1] == last_gap
        np.testing.assert_allclose(wide(direction), expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(
    ("subspaces", "gaps"),
    [
        ("aaaaaaaaa", [1, 1, 2, 2, 4, 4, 4, 4, 8]),
        ("aabbbbbbb", [1, 1, 1, 1, 2, 2, 4, 4, 8]),
    ],
)
def test_gap_doubles_at_each_further_stable_refresh(subspaces, gaps):
    ones = np.ones(5, np.float32)
    g = {"a": np.outer([1, 0, 0], ones), "b": np.outer([0, 1, 0], ones)}
    tx = q_galore.scale_by_q_galore(1, update_proj_gap=1, patience=2)
    _, states = run(tx, np.stack([g[subspace] for subspace in subspaces]))
    assert states.matrices.gap.tolist() == gaps


@jax.jit
def round_trip(x):
    coded = q_galore.quantize(x)
    return coded, q_galore.dequantize(coded, x.shape)


@pytest.mark.parametrize("offset", [0.0, 5.0, -5.0])
def test_int4_is_off_by_half_a_step_at_most(offset):
    x = np.random.default_rng(0).normal(size=(33, 17)).astype(np.float32) + offset
    coded, decoded = round_trip(x)
    error = np.abs(decoded - x)
    span = max(x.max(), 0) - min(x.min(), 0)
    assert error.max() <= 1.0001 * span / 30
    codes = np.unique([np.asarray(coded.codes) & 15, np.asarray(coded.codes) >> 4])
    assert codes.min() == 0
    assert codes.max() == 15


def test_int4_keeps_zeros_and_what_lies_on_its_grid():
    grid = (np.arange(512) % 16 - 5.0).reshape(16, 32) / 8
    for x in (grid, 0 * grid):
        np.testing.assert_array_equal(round_trip(x.astype(np.float32))[1], x)


def test_keeps_half_a_byte_for_each_entry_of_the_projector():
    rank = 20
    state = jax.eval_shape(q_galore.scale_by_q_galore(rank).init, PARAMS)
    expected = 4
    for shape in SHAPES.values():
        p, q = sorted(shape)
        blocks = -(-p * rank // 256)
        expected += blocks * (128 + 4 + 1) + 4 + 4 + 2 * 4 * rank * q
    assert size_in_bytes(state) == expected
