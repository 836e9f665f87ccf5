"""Fira against its equations in float64, and what the paper says of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trajectories import SIZES, P, Q, normal, run

from benchmarks.baselines.fira import scale_by_fira

RANK, GAP = 2, 3
FIRA = scale_by_fira(RANK, update_proj_gap=GAP)
UNLIMITED = scale_by_fira(RANK, update_proj_gap=GAP, limiter=np.inf)


def residual(directions, projectors):
    """Returns the part outside of the projectors' spaces."""
    return directions - projectors @ (projectors.transpose(0, 2, 1) @ directions)


def oracle(grads, projectors, b1=0.9, b2=0.999, eps=1e-8, limiter=1.01):
    """Algorithm 1, and the steps at which the limiter acted.

    Singular vectors are found here; only their signs are those of `projectors`.
    """
    mu, nu, before = np.zeros((RANK, Q)), np.zeros((RANK, Q)), 0.0
    directions, limited = [], []
    for t, g in enumerate(grads):
        if t % GAP == 0:
            u = np.linalg.svd(g)[0][:, :RANK]
            u = u * np.sign(np.sum(u * projectors[t], axis=0))
        r = u.T @ g
        mu, nu = b1 * mu + (1 - b1) * r, b2 * nu + (1 - b2) * r**2
        n = (mu / (1 - b1 ** (t + 1))) / (np.sqrt(nu / (1 - b2 ** (t + 1))) + eps)
        s = g - u @ r
        for j in range(Q):
            s[:, j] *= np.linalg.norm(n[:, j]) / np.linalg.norm(r[:, j])
        limited.append(bool(before > 0 and np.linalg.norm(s) > limiter * before))
        if limited[-1]:
            s *= limiter * before / np.linalg.norm(s)
        before = np.linalg.norm(s)
        directions.append(u @ n + s)
    return np.stack(directions), limited


@pytest.mark.parametrize("tall", [False, True])
def test_follows_its_equations(tall):
    grads = normal()
    given = grads.transpose(0, 2, 1) if tall else grads
    directions, states = run(FIRA, given)
    expected, limited = oracle(grads, states.matrices.projector)
    assert any(limited[1:])
    assert not all(limited[1:])
    expected = expected.transpose(0, 2, 1) if tall else expected
    np.testing.assert_allclose(directions, expected, rtol=1e-3, atol=1e-4)


def test_full_rank_is_adam_in_the_basis_of_the_projector():
    grads = normal()
    directions, states = run(scale_by_fira(P), grads)
    basis = states.matrices.projector[0]
    rotated, _ = run(optax.scale_by_adam(), basis.T @ grads)
    np.testing.assert_allclose(directions, basis @ rotated, rtol=1e-3, atol=1e-4)


def test_a_column_of_the_residual_takes_the_factor_of_its_projection():
    grads = normal()
    directions, states = run(UNLIMITED, grads)
    projectors = states.matrices.projector
    low, adam = (projectors.transpose(0, 2, 1) @ x for x in (grads, directions))
    factors = np.linalg.norm(adam, axis=1) / np.linalg.norm(low, axis=1)
    np.testing.assert_allclose(
        residual(directions, projectors),
        factors[:, None] * residual(grads, projectors),
        rtol=1e-2,
        atol=1e-4,
    )


def test_the_residual_grows_no_faster_than_the_limiter():
    growth = {}
    for tx in (FIRA, UNLIMITED):
        directions, states = run(tx, normal())
        parts = residual(directions, states.matrices.projector)
        norms = np.linalg.norm(parts, axis=(1, 2))
        np.testing.assert_allclose(states.matrices.norm, norms, rtol=1e-4)
        growth[tx] = np.max(norms[1:] / norms[:-1])
    assert growth[FIRA] == pytest.approx(1.01, rel=1e-4)
    assert growth[UNLIMITED] > 1.5


def test_the_projector_changes_every_gap_steps_only():
    _, states = run(FIRA, normal())
    projectors = states.matrices.projector
    changed = (projectors[1:] != projectors[:-1]).any(axis=(1, 2))
    np.testing.assert_array_equal(changed, np.arange(1, len(SIZES)) % GAP == 0)


def test_zero_gradients_leave_no_mark():
    """Not on the limiter either, which what follows would never outgrow."""
    directions, states = run(FIRA, normal(sizes=np.arange(len(SIZES)) > 0))
    assert (directions[0] == 0).all()
    assert np.linalg.norm(residual(directions, states.matrices.projector)[1]) > 1


@pytest.mark.parametrize("shape", [(P, Q), (Q, P)])
def test_size_of_the_state(shape):
    state = FIRA.init(jnp.zeros(shape))
    sizes = [jnp.size(leaf) for leaf in jax.tree.leaves(state)]
    assert sum(sizes) == P * RANK + 2 * RANK * Q + 1 + 1  # The last one is the count.


def test_leaves_must_be_matrices():
    with pytest.raises(ValueError, match=r"\['bias'\] has shape \(4,\)"):
        FIRA.init({"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)})
