"""DCT-AdamW against a float64 NumPy oracle, and the properties of its basis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trajectories import gradients, run, size_in_bytes, wide

from benchmarks.baselines import dct

B1, B2, EPS = 0.9, 0.99, 1e-6
SHAPES = {"tall": (12, 7), "wide": (6, 10)}
PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


def dct3(n):
    i, j = np.mgrid[:n, :n]
    matrix = np.sqrt(2 / n) * np.cos(i * (2 * j + 1) * np.pi / (2 * n))
    matrix[0] /= np.sqrt(2)
    return matrix


def oracle(grads, rank, gap, norm):
    """The direction of every step for one matrix with at least as many columns as rows.

    The rotations are the products of the paper, not a gather.
    """
    basis = dct3(len(grads[0]))
    q = old = np.zeros((len(basis), rank))
    m, v = np.zeros((rank, grads[0].shape[1])), np.zeros((rank, grads[0].shape[1]))
    for t, g in enumerate(grads, 1):
        if (t - 1) % gap == 0:
            sizes = np.linalg.norm(basis.T @ g, norm, axis=1)
            old, q = q, basis[:, np.argsort(-sizes)[:rank]]
            m, v = q.T @ old @ m, np.abs(q.T @ old @ v)
        low = q.T @ g
        m, v = B1 * m + (1 - B1) * low, B2 * v + (1 - B2) * low**2
        yield q @ (m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + EPS))


@pytest.mark.parametrize(("gap", "norm"), [(1, 1), (3, 2)])
def test_follows_the_oracle(gap, norm):
    rank, grads = 3, gradients(SHAPES, 8)
    directions, _ = run(dct.scale_by_dct_adam(rank, B1, B2, EPS, gap, norm), grads)
    for name, direction in directions.items():
        expected = list(oracle(wide(grads[name]), rank, gap, norm))
        np.testing.assert_allclose(wide(direction), expected, rtol=1e-4, atol=5e-5)


def test_is_adam_of_the_transform_at_full_rank():
    steps, grads = 5, gradients(SHAPES, 5)
    directions, _ = run(dct.scale_by_dct_adam(99, B1, B2, EPS), grads)
    basis = dct3(6)
    rows = basis.T @ grads["wide"]
    left = np.arange(steps)[::-1, None, None]
    m, v = (
        ((1 - b) * b**left * x).sum(axis=0) / (1 - b**steps)
        for b, x in ((B1, rows), (B2, rows**2))
    )
    expected = basis @ (m / (np.sqrt(v) + EPS))
    np.testing.assert_allclose(directions["wide"][-1], expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000])
def test_basis_is_the_orthonormal_dct(n):
    basis = np.asarray(dct.dct_matrix(n))
    np.testing.assert_allclose(basis, dct3(n), atol=2e-6)
    np.testing.assert_allclose(basis.T @ basis, np.eye(n), atol=1e-5)


def test_columns_that_stay_keep_their_moments():
    mu = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    old = dct.Moments(jnp.asarray([4, 0, 7]), mu, mu**2)
    new = dct.rotate(old, jnp.asarray([7, 1, 4]))
    kept = np.array([[5, 6], [0, 0], [1, 2]])
    np.testing.assert_array_equal(new.mu, kept)
    np.testing.assert_array_equal(new.nu, kept**2)


def test_chooses_the_frequencies_that_are_there():
    """A gradient that is two columns of the basis is kept whole by rank two."""
    basis = dct3(6)
    rng = np.random.default_rng(0)
    g = basis[:, [1, 4]] @ rng.normal(size=(1, 2, 10))
    direction, state = run(dct.scale_by_dct_adam(2, eps=0.0), g)
    assert set(state.moments.indices[0]) == {1, 4}
    expected = basis[:, [1, 4]] @ np.sign(basis[:, [1, 4]].T @ g)
    np.testing.assert_allclose(direction, expected, atol=1e-4)


def test_keeps_indices_and_moments_alone():
    rank = 3
    state = jax.eval_shape(dct.scale_by_dct_adam(rank).init, PARAMS)
    assert size_in_bytes(state) == 4 + sum(
        4 * rank * (1 + 2 * max(shape)) for shape in SHAPES.values()
    )
