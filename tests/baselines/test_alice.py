"""Alice and Alice-0 against their equations in float64, and their switching."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trajectories import SIZES, P, Q, defaults, normal, run

from benchmarks.baselines import alice
from benchmarks.baselines.alice import scale_by_alice

RANK, GAP, LEADING = 3, 3, 2
B1, B2, SCALE = 0.9, 0.9, 0.3


def tx(rank=RANK, **options):
    options = {"update_proj_gap": GAP, "leading": LEADING} | options
    return scale_by_alice(rank, **options)


ALICE = tx()
UNLIMITED = tx(limiter=np.inf)


def switched(covariance, old, given):
    """Algorithm 2. The drawn columns are those of `given`, which must be admissible.

    Eigenvectors are found here; only their signs are those of `given`.
    """
    basis = np.linalg.qr(covariance @ old)[0]
    vectors = np.linalg.eigh(basis.T @ covariance @ basis)[1]
    found = basis @ vectors[:, ::-1]
    drawn = given[:, LEADING:]
    np.testing.assert_allclose(drawn.T @ found, 0, atol=1e-4)
    np.testing.assert_allclose(drawn.T @ drawn, np.eye(RANK - LEADING), atol=1e-5)
    kept = found[:, :LEADING]
    signs = np.sign(np.sum(kept * given[:, :LEADING], axis=0))
    return np.concatenate([kept * signs, drawn], axis=1)


def oracle(grads, projectors, b3=0.999, eps=1e-8, compensation=0.4, limiter=1.01):
    """Algorithms 3 and 4, and the steps at which the limiter acted."""
    u, tracked = np.eye(P, RANK), np.zeros((RANK, RANK))
    mu, nu = np.zeros((RANK, Q)), np.zeros((RANK, Q))
    p, before, directions, limited = np.zeros(Q), 0.0, [], []
    for t, g in enumerate(grads, 1):
        if t == 1 or t % GAP == 0:
            covariance = b3 * u @ tracked @ u.T + (1 - b3) * g @ g.T
            u = switched(covariance, u, projectors[t - 1])
        sigma = u.T @ g
        tracked = b3 * tracked + (1 - b3) * sigma @ sigma.T
        mu, nu = B1 * mu + (1 - B1) * sigma, B2 * nu + (1 - B2) * sigma**2
        p = B1 * p + (1 - B1) * (np.sum(g**2, axis=0) - np.sum(sigma**2, axis=0))
        c = np.sqrt(P - RANK) * (g - u @ sigma) @ np.diag(1 / (np.sqrt(p) + eps))
        limited.append(bool(before > 0 and np.linalg.norm(c) > limiter * before))
        if limited[-1]:
            c *= limiter * before / np.linalg.norm(c)
        before = np.linalg.norm(c)
        omega = mu / (np.sqrt(nu) + eps)
        directions.append(SCALE * (u @ omega + compensation * c))
    return np.stack(directions), limited


@pytest.mark.parametrize("b3", [0.999, 0.5, 0], ids=["alice", "quick", "alice_0"])
@pytest.mark.parametrize("tall", [False, True])
def test_follows_its_equations(tall, b3):
    grads = normal()
    given = grads.transpose(0, 2, 1) if tall else grads
    directions, states = run(tx(b3=b3), given)
    expected, limited = oracle(grads, states.matrices.projector, b3)
    assert any(limited[1:])
    assert not all(limited[1:])
    expected = expected.transpose(0, 2, 1) if tall else expected
    np.testing.assert_allclose(directions, expected, rtol=1e-3, atol=1e-4)


def test_full_rank_is_adam_in_the_basis_of_the_projector():
    """Up to Adam's bias corrections. There is nothing to compensate."""
    grads = normal()
    directions, states = run(tx(P, update_proj_gap=100, compensation=1e3), grads)
    basis = states.matrices.projector[0]
    rotated, _ = run(optax.scale_by_adam(B1, B2), basis.T @ grads)
    steps = np.arange(1, len(grads) + 1)[:, None, None]
    corrections = np.sqrt(1 - B2**steps) / (1 - B1**steps)
    expected = SCALE * basis @ (rotated / corrections)
    np.testing.assert_allclose(directions, expected, rtol=1e-3, atol=1e-4)


def test_the_leading_columns_of_a_low_rank_gradient_span_it():
    rng = np.random.default_rng(1)
    g = rng.normal(size=(P, LEADING)) @ rng.normal(size=(LEADING, Q))
    _, states = run(ALICE, g[None])
    kept = states.matrices.projector[0][:, :LEADING]
    np.testing.assert_allclose(kept @ (kept.T @ g), g, atol=1e-4)


def test_the_other_columns_are_drawn_by_key():
    g = normal(shape=(12, 16))[0]
    covariance = jnp.asarray(g @ g.T, jnp.float32)
    one, other = (
        alice.switch(covariance, jnp.eye(12, 6), LEADING, jax.random.key(seed))
        for seed in (0, 1)
    )
    np.testing.assert_array_equal(one[:, :LEADING], other[:, :LEADING])
    assert not np.allclose(one[:, LEADING:], other[:, LEADING:])


def test_each_leaf_switch_and_seed_has_its_own_key(monkeypatch):
    def noise(covariance, old, leading, key):
        del covariance, leading
        return jax.random.normal(key, old.shape)

    monkeypatch.setattr(alice, "switch", noise)
    grads, drawn = normal(), []
    for seed in (0, 1):
        _, states = run(tx(seed=seed), {"a": grads, "b": grads})
        for matrix in states.matrices.values():
            drawn += [matrix.projector[t - 1].ravel() for t in (1, GAP, 2 * GAP)]
    assert np.max(np.abs(np.corrcoef(drawn) - np.eye(len(drawn)))) < 0.9


def test_no_more_columns_are_drawn_than_the_complement_has():
    _, states = run(tx(5, leading=1), normal())
    projectors = states.matrices.projector
    assert projectors.shape == (len(SIZES), P, 5)
    products = projectors.transpose(0, 2, 1) @ projectors
    np.testing.assert_allclose(
        products, np.broadcast_to(np.eye(5), products.shape), atol=1e-5
    )


def test_the_projector_changes_first_and_at_multiples_of_the_gap_only():
    _, states = run(ALICE, normal())
    projectors = states.matrices.projector
    changed = (projectors[1:] != projectors[:-1]).any(axis=(1, 2))
    np.testing.assert_array_equal(changed, np.arange(2, len(SIZES) + 1) % GAP == 0)
    assert (projectors[0] != np.eye(P, RANK)).any()


def test_the_compensation_grows_no_faster_than_the_limiter():
    growth = {}
    for one in (ALICE, UNLIMITED):
        directions, states = run(one, normal())
        u = states.matrices.projector
        parts = directions - u @ (u.transpose(0, 2, 1) @ directions)
        norms = np.linalg.norm(parts, axis=(1, 2))
        expected = SCALE * 0.4 * states.matrices.norm
        np.testing.assert_allclose(norms, expected, rtol=1e-4)
        growth[one] = np.max(norms[1:] / norms[:-1])
    assert growth[ALICE] == pytest.approx(1.01, rel=1e-3)
    assert growth[UNLIMITED] > 1.5


def test_zero_gradients_leave_no_mark():
    """Not on the limiter either, which what follows would never outgrow."""
    directions, states = run(ALICE, normal(sizes=np.arange(len(SIZES)) > 0))
    assert (directions[0] == 0).all()
    assert states.matrices.norm[1] > 1
    assert np.isfinite(directions).all()


@pytest.mark.parametrize("shape", [(P, Q), (Q, P)])
@pytest.mark.parametrize("b3", [0.999, 0])
def test_size_of_the_state(shape, b3):
    leaves = jax.tree.leaves(tx(b3=b3).init(jnp.zeros(shape)))
    numbers = P * RANK + 2 * RANK * Q + Q + 1 + (RANK**2 if b3 else 0)
    # The last one is the count.
    assert sum(jnp.size(leaf) for leaf in leaves) == numbers + 1


def test_defaults_are_the_published_ones():
    assert defaults(scale_by_alice) == {
        "b1": 0.9,
        "b2": 0.9,
        "b3": 0.999,
        "eps": 1e-8,
        "update_proj_gap": 200,
        "leading": 40,
        "scale": 0.3,
        "compensation": 0.4,
        "limiter": 1.01,
        "seed": 0,
    }


def test_leaves_must_be_matrices():
    with pytest.raises(ValueError, match=r"\['bias'\] has shape \(4,\)"):
        ALICE.init({"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)})
