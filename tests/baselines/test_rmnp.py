"""RMNP against its equations in float64, and where it must be Muon."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trajectories import SIZES, P, Q, normal, run

from benchmarks.baselines.rmnp import scale_by_rmnp

SHAPES = [(P, Q), (Q, P)]


def oracle(grads, nesterov, beta=0.95):
    """The algorithm for matrices of shape (outputs, inputs), with an average."""
    m, directions = np.zeros_like(grads[0]), []
    outputs, inputs = m.shape
    for g in grads:
        m = beta * m + (1 - beta) * g
        u = beta * m + (1 - beta) * g if nesterov else m
        rows = np.stack([row / np.linalg.norm(row) for row in u])
        directions.append(np.sqrt(max(1, outputs / inputs)) * rows)
    return np.stack(directions)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_follows_its_equations(nesterov, shape):
    grads = normal(shape)
    tx = scale_by_rmnp() if nesterov else scale_by_rmnp(nesterov=False)
    directions, _ = run(tx, grads)
    expected = oracle(grads.transpose(0, 2, 1), nesterov).transpose(0, 2, 1)
    np.testing.assert_allclose(directions, expected, rtol=1e-4, atol=1e-6)


def test_is_muon_if_the_columns_are_orthogonal():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(Q, P)))[0]
    grads = basis * rng.uniform(0.1, 10, size=(len(SIZES), 1, P))
    u, _, vt = np.linalg.svd(grads, full_matrices=False)
    directions, _ = run(scale_by_rmnp(), grads)
    np.testing.assert_allclose(directions, u @ vt, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_consistent_root_mean_square(shape):
    directions, _ = run(scale_by_rmnp(consistent_rms=0.2), normal(shape))
    rms = np.sqrt(np.mean(np.square(directions), axis=(1, 2)))
    np.testing.assert_allclose(rms, 0.2, rtol=1e-5)
    plain, _ = run(scale_by_rmnp(), normal(shape))
    ratio = directions / plain
    np.testing.assert_allclose(ratio, ratio[0, 0, 0], rtol=1e-4)


def test_zero_gradients_leave_no_mark():
    grads = normal()
    directions, _ = run(scale_by_rmnp(), np.concatenate([0 * grads[:1], grads]))
    assert (directions[0] == 0).all()
    np.testing.assert_array_equal(directions[1:], run(scale_by_rmnp(), grads)[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_size_of_the_state(shape):
    state = scale_by_rmnp().init(jnp.zeros(shape))
    assert [jnp.size(leaf) for leaf in jax.tree.leaves(state)] == [P * Q]


def test_leaves_must_be_matrices():
    with pytest.raises(ValueError, match=r"\['bias'\] has shape \(4,\)"):
        scale_by_rmnp().init({"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)})
