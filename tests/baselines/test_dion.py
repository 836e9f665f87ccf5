"""Dion against its equations in float64, and where it must be Muon."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trajectories import P, Q, normal, run

from benchmarks.baselines.dion import scale_by_dion

RANK = 3
DION = scale_by_dion(RANK)
SHAPES = [(P, Q), (Q, P)]


def oracle(grads, basis, mu=0.95, eps=1e-8):
    """Directions without their scale, for matrices with at least as many rows."""
    q, m, directions = basis, np.zeros_like(grads[0]), []
    for g in grads:
        b = m + g
        p = np.linalg.qr(b @ q)[0]
        r = b.T @ p
        m = b - (1 - mu) * p @ r.T
        q = np.stack([c / (np.linalg.norm(c) + eps) for c in r.T], axis=1)
        directions.append(p @ q.T)
    return np.stack(directions)


@pytest.mark.parametrize("tall", [False, True])
def test_follows_its_equations(tall):
    """A tall matrix here has more inputs than outputs."""
    grads = normal((Q, P))
    given = grads if tall else grads.transpose(0, 2, 1)
    state: Any = DION.init(jnp.asarray(given[0]))
    expected = oracle(grads, np.asarray(state.matrices.basis, np.float64))
    expected = expected if tall else expected.transpose(0, 2, 1)
    outputs_per_input = P / Q if tall else Q / P
    directions, _ = run(DION, given)
    np.testing.assert_allclose(
        directions, np.sqrt(outputs_per_input) * expected, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("rank", [RANK, P])
def test_comes_to_orthogonalise_gradients_of_its_rank(rank):
    """Which Muon does at once."""
    u, _, vt = np.linalg.svd(normal()[0], full_matrices=False)
    u, vt = u[:, :rank], vt[:rank]
    g = u * 2.0 ** -np.arange(rank) @ vt
    directions, _ = run(scale_by_dion(rank), np.stack([g] * 30))
    np.testing.assert_allclose(directions[-1], np.sqrt(Q / P) * u @ vt, atol=1e-4)
    assert not np.allclose(directions[0], directions[-1], atol=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_momentum_of_full_rank_is_that_of_muon(shape):
    """It decays as a whole, since the update contains all of it."""
    grads = normal(shape)
    _, states = run(scale_by_dion(P), grads)
    heavy_ball, _ = run(optax.trace(0.95), grads)
    heavy_ball = heavy_ball if shape == (P, Q) else heavy_ball.transpose(0, 2, 1)
    np.testing.assert_allclose(
        states.matrices.momentum, 0.95 * heavy_ball, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("shape", [*SHAPES, (P, P)])
@pytest.mark.parametrize("rank", [RANK, P])
def test_consistent_root_mean_square(rank, shape):
    directions, _ = run(scale_by_dion(rank, consistent_rms=0.2), normal(shape))
    rms = np.sqrt(np.mean(np.square(directions), axis=(1, 2)))
    np.testing.assert_allclose(rms, 0.2, rtol=1e-4)
    plain, _ = run(scale_by_dion(rank), normal(shape))
    ratio = np.sqrt(np.mean(np.square(plain), axis=(1, 2))) / rms
    np.testing.assert_allclose(directions * ratio[0], plain, rtol=1e-3, atol=1e-5)


def test_zero_gradients_leave_no_mark():
    grads = normal()
    directions, states = run(DION, np.concatenate([0 * grads[:1], grads]))
    assert (directions[0] == 0).all()
    np.testing.assert_allclose(
        np.linalg.norm(states.matrices.basis[0], axis=0), 1, rtol=1e-5
    )
    expected, _ = run(DION, grads)
    np.testing.assert_allclose(directions[1:], expected, rtol=1e-3, atol=1e-4)


def test_every_leaf_and_seed_has_its_own_first_basis():
    like = {"a": jnp.zeros((P, Q)), "b": jnp.zeros((P, Q))}
    states: list[Any] = [scale_by_dion(RANK, seed=seed).init(like) for seed in (0, 1)]
    bases = [state.matrices[name].basis.ravel() for state in states for name in like]
    assert np.max(np.abs(np.corrcoef(bases) - np.eye(4))) < 0.8


@pytest.mark.parametrize("shape", SHAPES)
def test_size_of_the_state(shape):
    sizes = [jnp.size(x) for x in jax.tree.leaves(DION.init(jnp.zeros(shape)))]
    assert sum(sizes) == P * Q + P * RANK


def test_leaves_must_be_matrices():
    with pytest.raises(ValueError, match=r"\['bias'\] has shape \(4,\)"):
        DION.init({"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)})
