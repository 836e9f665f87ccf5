"""SinkGD against its equations, and Sinkhorn's iteration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trajectories import P, Q, defaults, normal, run

from benchmarks.baselines.sinkgd import scale_by_sinkgd

SINKGD = scale_by_sinkgd()


def oracle(g, iterations=5):
    """Algorithm 3, for a matrix of the paper: (out, in)."""
    m, n = g.shape
    x = np.array(g)
    for _ in range(iterations):
        for i in range(m):
            x[i] *= np.sqrt(n) / np.linalg.norm(x[i])
        for j in range(n):
            x[:, j] *= np.sqrt(m) / np.linalg.norm(x[:, j])
    return x


@pytest.mark.parametrize("shape", [(P, Q), (Q, P)])
def test_follows_its_equations(shape):
    grads = normal(shape=shape)
    directions, _ = run(SINKGD, grads)
    expected = [oracle(g.T).T for g in grads]
    np.testing.assert_allclose(directions, expected, rtol=1e-4)


def test_is_the_iteration_of_sinkhorn_on_the_squares():
    grads = normal()
    directions, _ = run(SINKGD, grads)
    squares = grads**2
    for _ in range(5):
        squares = squares / squares.mean(axis=1, keepdims=True)
        squares = squares / squares.mean(axis=2, keepdims=True)
    expected = np.sign(grads) * np.sqrt(squares)
    np.testing.assert_allclose(directions, expected, rtol=1e-4)


def test_ends_with_rows_and_columns_of_one_size():
    squares = run(scale_by_sinkgd(iterations=100), normal())[0] ** 2
    np.testing.assert_allclose(squares.mean(axis=1), 1, rtol=1e-4)
    np.testing.assert_allclose(squares.mean(axis=2), 1, rtol=1e-4)


def test_scales_of_rows_and_columns_do_not_matter():
    grads = normal()
    rows, columns = np.linspace(0.1, 3, P), np.linspace(5, 1, Q)
    tx = scale_by_sinkgd(iterations=100)
    expected, _ = run(tx, grads)
    directions, _ = run(tx, 1e-9 * rows[:, None] * grads * columns)
    np.testing.assert_allclose(directions, expected, rtol=1e-3, atol=1e-4)


def test_zeros_stay_zero():
    grads = normal()
    grads[0], grads[1, 2], grads[1, :, 3] = 0, 0, 0
    directions, _ = run(SINKGD, grads)
    np.testing.assert_array_equal(directions == 0, grads == 0)
    assert np.isfinite(directions).all()


def test_has_no_state():
    assert not jax.tree.leaves(SINKGD.init(jnp.zeros((P, Q))))


def test_defaults_are_the_published_ones():
    assert defaults(scale_by_sinkgd) == {"iterations": 5}


def test_leaves_must_be_matrices():
    with pytest.raises(ValueError, match=r"\['bias'\] has shape \(4,\)"):
        SINKGD.init({"bias": jnp.zeros(4)})
