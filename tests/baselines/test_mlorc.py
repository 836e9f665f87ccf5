"""MLorc-AdamW against a float64 NumPy oracle, and where it must be Adam."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.baselines import mlorc

pytestmark = pytest.mark.usefixtures("quick_compilation")

B1, B2, EPS = 0.9, 0.99, 1e-6
SHAPES = {"tall": (12, 7), "wide": (6, 10)}


def gradients(steps, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
        for _ in range(steps)
    ]


def size_in_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def trajectory(tx, grads):
    update, directions = jax.jit(tx.update), []
    state: Any = jax.jit(tx.init)(grads[0])
    for g in grads:
        direction, state = update(g, state)
        directions.append(jax.device_get(direction))
    return directions, state


def compress(a, sketch, rank):
    """Randomised SVD (Halko et al., 2011), as the matrix it stands for."""
    q = np.linalg.qr(a @ sketch)[0]
    u, s, vt = np.linalg.svd(q.T @ a, full_matrices=False)
    return q @ (u[:, :rank] * s[:rank]) @ vt[:rank]


def oracle(grads, sketches, rank):
    """The direction of every step for one matrix."""
    m, v = np.zeros_like(grads[0]), np.zeros_like(grads[0])
    for t, (g, (for_m, for_v)) in enumerate(zip(grads, sketches, strict=True), 1):
        if (v < 0).any():
            v = np.maximum(v, 0) + np.abs(v[v < 0]).mean() * (v < 0)
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        yield m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + EPS)
        m, v = compress(m, for_m, rank), compress(v, for_v, rank)


@pytest.mark.parametrize("oversampling", [0, 2])
def test_follows_the_oracle(oversampling):
    rank, seed, grads = 2, 3, gradients(6)
    tx = mlorc.scale_by_mlorc(rank, B1, B2, EPS, oversampling, seed)
    directions, _ = trajectory(tx, grads)
    sketches = [
        mlorc.draw_sketches(seed, t, grads[0], rank + oversampling) for t in range(1, 7)
    ]
    for name in SHAPES:
        expected = oracle(
            [g[name].astype(np.float64) for g in grads],
            [np.asarray(s[name], np.float64) for s in sketches],
            rank,
        )
        actual = [d[name] for d in directions]
        np.testing.assert_allclose(actual, list(expected), rtol=1e-4, atol=5e-5)


def test_is_adam_at_full_rank():
    grads = gradients(5)
    directions, _ = trajectory(mlorc.scale_by_mlorc(20, B1, B2, EPS), grads)
    adam, _ = trajectory(optax.scale_by_adam(B1, B2, EPS), grads)
    for a, b in zip(directions, adam, strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=5e-5)


def test_lifts_each_negative_entry_to_their_mean_magnitude():
    lifted = mlorc.lift_negatives(jnp.asarray([[-1.0, 2.0], [0.0, -3.0]]))
    np.testing.assert_array_equal(lifted, [[2.0, 2.0], [0.0, 2.0]])
    positive = jnp.asarray([[1.0, 0.5]])
    np.testing.assert_array_equal(mlorc.lift_negatives(positive), positive)


def test_sketches_differ_between_steps_matrices_and_moments():
    first, second = (mlorc.draw_sketches(0, t, gradients(1)[0], 6) for t in (1, 2))
    drawn = [
        np.asarray(half).ravel()[:30]
        for sketches in (first, second)
        for pair in sketches.values()
        for half in pair
    ]
    assert np.max(np.abs(np.corrcoef(drawn) - np.eye(8))) < 0.8
    assert mlorc.draw_sketches(0, 1, gradients(1)[0], 3)["tall"].shape == (2, 7, 3)


def test_keeps_two_decompositions_of_each_matrix():
    rank = 3
    state = jax.eval_shape(mlorc.scale_by_mlorc(rank).init, gradients(1)[0])
    assert size_in_bytes(state) == 4 + sum(
        2 * 4 * rank * (p + q + 1) for p, q in SHAPES.values()
    )
