"""RACS against its equations in float64, and what the paper says of its scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trajectories import SIZES, P, Q, defaults, normal, run

from benchmarks.baselines import racs
from benchmarks.baselines.racs import scale_by_racs

SCALE = 0.05
RACS = scale_by_racs()
UNLIMITED = scale_by_racs(limiter=np.inf)


def oracle(grads, b=0.9, scale=SCALE, limiter=1.01, iterations=5):
    """Algorithm 1, and the steps at which the limiter acted."""
    s, q, before = np.zeros(Q), np.zeros(P), 0.0
    directions, limited = [], []
    for g in grads:
        new_q = np.ones(P)
        for _ in range(iterations):
            new_s = np.diag(g.T @ np.diag(new_q) @ g) / np.sum(new_q**2)
            new_q = np.diag(g @ np.diag(new_s) @ g.T) / np.sum(new_s**2)
        s, q = b * s + (1 - b) * new_s, b * q + (1 - b) * new_q
        d = np.diag(q**-0.5) @ g @ np.diag(s**-0.5)
        limited.append(bool(before > 0 and np.linalg.norm(d) > limiter * before))
        if limited[-1]:
            d *= limiter * before / np.linalg.norm(d)
        before = np.linalg.norm(d)
        directions.append(scale * d)
    return np.stack(directions), limited


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("size", [1, 1e-10])
def test_follows_its_equations(tall, size):
    grads = normal()
    expected, limited = oracle(grads)
    assert any(limited[1:])
    assert not all(limited[1:])
    if tall:
        grads, expected = (x.transpose(0, 2, 1) for x in (grads, expected))
    directions, _ = run(RACS, size * grads)
    np.testing.assert_allclose(directions, expected, rtol=1e-4)


def test_scales_are_the_principal_singular_vectors_of_the_squares():
    """Proposition 3."""
    squares = normal()[0] ** 2
    rows, columns = racs.two_sided_scales(jnp.asarray(squares, jnp.float32), 50)
    u, sigma, vt = np.linalg.svd(squares)
    np.testing.assert_allclose(
        np.outer(rows, columns), sigma[0] * np.outer(u[:, 0], vt[0]), rtol=1e-4
    )


def test_a_first_gradient_of_rank_one_moves_by_its_sign():
    rng = np.random.default_rng(1)
    g = np.outer(rng.normal(size=P), rng.normal(size=Q))
    directions, _ = run(RACS, g[None])
    np.testing.assert_allclose(directions[0], SCALE / 0.1 * np.sign(g), rtol=1e-4)


def test_the_direction_grows_no_faster_than_the_limiter():
    growth = {}
    for tx in (RACS, UNLIMITED):
        directions, states = run(tx, normal())
        norms = np.linalg.norm(directions, axis=(1, 2))
        np.testing.assert_allclose(SCALE * states.matrices.norm, norms, rtol=1e-4)
        growth[tx] = np.max(norms[1:] / norms[:-1])
    assert growth[RACS] == pytest.approx(1.01, rel=1e-4)
    assert growth[UNLIMITED] > 1.5


def test_zero_gradients_leave_no_mark():
    """Not on the limiter either, which what follows would never outgrow."""
    directions, _ = run(RACS, normal(sizes=np.arange(len(SIZES)) > 0))
    assert (directions[0] == 0).all()
    assert np.linalg.norm(directions[1]) > SCALE


def test_a_row_and_a_column_of_zeros_stay():
    grads = normal()
    grads[:, 2], grads[:, :, 3] = 0, 0
    directions, _ = run(RACS, grads)
    np.testing.assert_array_equal(directions == 0, grads == 0)
    assert np.isfinite(directions).all()


@pytest.mark.parametrize("shape", [(P, Q), (Q, P)])
def test_size_of_the_state(shape):
    leaves = jax.tree.leaves(RACS.init(jnp.zeros(shape)))
    assert sum(jnp.size(leaf) for leaf in leaves) == P + Q + 1


def test_defaults_are_the_published_ones():
    expected = {"b": 0.9, "scale": 0.05, "limiter": 1.01, "iterations": 5}
    assert defaults(scale_by_racs) == expected


def test_leaves_must_be_matrices():
    with pytest.raises(ValueError, match=r"\['bias'\] has shape \(4,\)"):
        RACS.init({"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)})
