"""MLorc-AdamW against a float64 NumPy oracle, and where it must be Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trajectories import gradients, run, size_in_bytes

from benchmarks.baselines import mlorc

B1, B2, EPS = 0.9, 0.99, 1e-6
SHAPES = {"tall": (12, 7), "wide": (6, 10)}
PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


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
    rank, seed, grads = 2, 3, gradients(SHAPES, 6)
    tx = mlorc.scale_by_mlorc(rank, B1, B2, EPS, oversampling, seed)
    directions, _ = run(tx, grads)
    sketches = [
        mlorc.draw_sketches(seed, t, PARAMS, rank + oversampling) for t in range(1, 7)
    ]
    for name, direction in directions.items():
        drawn = [np.asarray(s[name], np.float64) for s in sketches]
        expected = list(oracle(grads[name], drawn, rank))
        np.testing.assert_allclose(direction, expected, rtol=1e-4, atol=5e-5)


def test_is_adam_at_full_rank():
    grads = gradients(SHAPES, 5)
    directions, _ = run(mlorc.scale_by_mlorc(20, B1, B2, EPS), grads)
    adam, _ = run(optax.scale_by_adam(B1, B2, EPS), grads)
    for name in SHAPES:
        np.testing.assert_allclose(directions[name], adam[name], rtol=1e-4, atol=5e-5)


def test_lifts_each_negative_entry_to_their_mean_magnitude():
    lifted = mlorc.lift_negatives(jnp.asarray([[-1.0, 2.0], [0.0, -3.0]]))
    np.testing.assert_array_equal(lifted, [[2.0, 2.0], [0.0, 2.0]])
    positive = jnp.asarray([[1.0, 0.5]])
    np.testing.assert_array_equal(mlorc.lift_negatives(positive), positive)


def test_sketches_differ_between_steps_matrices_and_moments():
    first, second = (mlorc.draw_sketches(0, t, PARAMS, 6) for t in (1, 2))
    drawn = [
        np.asarray(half).ravel()[:30]
        for sketches in (first, second)
        for pair in sketches.values()
        for half in pair
    ]
    assert np.max(np.abs(np.corrcoef(drawn) - np.eye(8))) < 0.8
    assert mlorc.draw_sketches(0, 1, PARAMS, 3)["tall"].shape == (2, 7, 3)


def test_keeps_two_decompositions_of_each_matrix():
    rank = 3
    state = jax.eval_shape(mlorc.scale_by_mlorc(rank).init, PARAMS)
    assert size_in_bytes(state) == 4 + sum(
        2 * 4 * rank * (p + q + 1) for p, q in SHAPES.values()
    )
