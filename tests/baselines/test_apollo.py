"""APOLLO and APOLLO-Mini against their equations, and what the paper says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trajectories import SIZES, P, Q, normal, run

from benchmarks.baselines import _matrices
from benchmarks.baselines.apollo import scale_by_apollo, scale_by_apollo_mini

RANK, GAP = 3, 3
APOLLO = scale_by_apollo(RANK, update_proj_gap=GAP, seed=5)
UNLIMITED = scale_by_apollo(RANK, update_proj_gap=GAP, seed=5, limiter=np.inf)
MINI = scale_by_apollo_mini(update_proj_gap=GAP, seed=5)


def drawn(seed, draw, rank):
    """The projection of a lone leaf."""
    key = optax.tree.split_key_like(jax.random.key(seed), jnp.zeros(()))
    return np.asarray(_matrices.random_projection(key, draw, (rank, P)), np.float64)


def oracle(
    grads, rank, per_column, scale, b1=0.9, b2=0.999, eps=1e-8, limiter=1.01, seed=5
):
    """Algorithm 1, and the steps at which the limiter acted."""
    mu, nu, before = np.zeros((rank, Q)), np.zeros((rank, Q)), 0.0
    directions, limited = [], []
    for t, g in enumerate(grads):
        r = drawn(seed, t // GAP, rank) @ g
        mu, nu = b1 * mu + (1 - b1) * r, b2 * nu + (1 - b2) * r**2
        n = (mu / (1 - b1 ** (t + 1))) / (np.sqrt(nu / (1 - b2 ** (t + 1))) + eps)
        if per_column:
            s = [np.linalg.norm(n[:, j]) / np.linalg.norm(r[:, j]) for j in range(Q)]
            d = scale * g @ np.diag(s)
        else:
            d = scale * g * np.linalg.norm(n) / np.linalg.norm(r)
        limited.append(bool(before > 0 and np.linalg.norm(d) > limiter * before))
        if limited[-1]:
            d = d / np.linalg.norm(d) * limiter * before
        before = np.linalg.norm(d)
        directions.append(d)
    return np.stack(directions), limited


@pytest.mark.parametrize(
    ("tx", "setting", "tall"),
    [
        (APOLLO, (RANK, True, 1.0), False),
        (APOLLO, (RANK, True, 1.0), True),
        (MINI, (1, False, np.sqrt(128)), False),
    ],
    ids=["apollo", "apollo_tall", "mini"],
)
def test_follows_its_equations(tx, setting, tall):
    grads = normal()
    expected, limited = oracle(grads, *setting)
    assert any(limited[1:])
    assert not all(limited[1:])
    if tall:
        grads, expected = (x.transpose(0, 2, 1) for x in (grads, expected))
    directions, _ = run(tx, grads)
    np.testing.assert_allclose(directions, expected, rtol=1e-3, atol=1e-5)


def test_the_direction_is_the_gradient_with_one_factor_a_channel():
    """A channel runs along the smaller side."""
    for axis, shape in ((0, (P, Q)), (1, (Q, P))):
        grads = normal(shape=shape)
        factors = run(APOLLO, grads)[0] / grads
        mean = factors.mean(axis=axis + 1, keepdims=True)
        np.testing.assert_allclose(factors, factors * 0 + mean, rtol=1e-4)
        assert (mean > 0).all()
        assert mean[0].std() > 1e-2


def test_the_direction_of_mini_is_the_gradient_with_one_factor():
    grads = normal()
    factors = run(MINI, grads)[0] / grads
    mean = factors.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(factors, factors * 0 + mean, rtol=1e-4)
    assert (mean > 0).all()


def test_the_factor_shrinks_with_the_root_of_the_rank():
    """Equation 9, at the first step, where Adam takes the sign."""
    grads = normal(shape=(128, 1024), sizes=np.ones(1))
    factors = run(scale_by_apollo(32), grads)[0][0, 0] / grads[0, 0]
    adam = np.sqrt(128) / np.linalg.norm(grads[0], axis=0)
    assert np.mean(factors) / np.mean(adam) == pytest.approx(0.5, rel=0.05)


def test_the_direction_grows_no_faster_than_the_limiter():
    """A change of sign all but cancels the momentum, which then comes back."""
    signs = np.array([1] + [-1] * (len(SIZES) - 1))[:, None, None]
    growth = {}
    for tx in (APOLLO, UNLIMITED):
        directions, states = run(tx, signs * normal(sizes=np.ones(1)))
        norms = np.linalg.norm(directions, axis=(1, 2))
        np.testing.assert_allclose(states.matrices.norm, norms, rtol=1e-5)
        growth[tx] = np.max(norms[1:] / norms[:-1])
    assert growth[APOLLO] == pytest.approx(1.01, rel=1e-5)
    assert growth[UNLIMITED] > 1.5


def test_projections_keep_norms_on_average():
    draws = jnp.arange(2000)
    project = jax.vmap(_matrices.random_projection, (None, 0, None))
    drawn = project(jax.random.key(0), draws, (RANK, P))
    mean = jnp.einsum("nrp,nrq->pq", drawn, drawn) / len(draws)
    np.testing.assert_allclose(mean, np.eye(P), atol=0.1)


def test_every_leaf_has_its_own_projection():
    grads = normal()
    directions, _ = run(APOLLO, {"a": grads, "b": grads})
    assert not np.allclose(directions["a"][0], directions["b"][0])


def test_zero_gradients_leave_no_mark():
    """Not on the limiter either, which what follows would never outgrow."""
    directions, _ = run(APOLLO, normal(sizes=np.arange(len(SIZES)) > 0))
    assert (directions[0] == 0).all()
    assert np.linalg.norm(directions[1]) > 1


@pytest.mark.parametrize("shape", [(P, Q), (Q, P)])
def test_size_of_the_state(shape):
    for tx, rank in ((APOLLO, RANK), (MINI, 1)):
        sizes = [jnp.size(x) for x in jax.tree.leaves(tx.init(jnp.zeros(shape)))]
        assert sum(sizes) == 2 * rank * Q + 1 + 1  # The last one is the count.


def test_leaves_must_be_matrices():
    for tx in (APOLLO, MINI):
        with pytest.raises(ValueError, match=r"\['bias'\] has shape \(4,\)"):
            tx.init({"bias": jnp.zeros(4)})
