"""LDAdam against its equations in float64, and where it must be Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trajectories import SIZES, P, Q, normal, run

from benchmarks.baselines.ldadam import scale_by_ldadam, transfer

RANK = 2
B1 = 0.908  # The published one.
FED = scale_by_ldadam(RANK)
UNFED = scale_by_ldadam(RANK, error_feedback=False)


def momentum_of(states):
    return states.matrices.projector @ states.matrices.mu


def oracle(grads, feedback, b1=B1, b2=0.99, eps=1e-8, rho=0.908):
    """The directions for a matrix whose left side is projected.

    The constants are the published ones. Singular vectors and bases are found here;
    nothing depends on their signs.
    """
    shape = grads[0].shape
    m, v = np.zeros((RANK, shape[1])), np.zeros((RANK, shape[1]))
    u, e = np.zeros((shape[0], RANK)), np.zeros(shape)
    for t, g in enumerate(grads):
        a, old = g + e, u
        if t == 0:
            u = np.linalg.svd(a)[0][:, :RANK]
            moved = m
        else:
            m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
            b = rho * old @ m_hat + (1 - rho) * a
            u = np.linalg.qr(b @ b.T @ old)[0]
            c = u.T @ old
            moved = c @ m
            v = (1 - b2**t) * np.abs(c**2 @ (v_hat - m_hat**2) + (c @ m_hat) ** 2)
        low = u.T @ a
        if feedback:
            e = a - u @ low + b1 / (1 - b1) * (old @ m - u @ moved)
        m, v = b1 * moved + (1 - b1) * low, b2 * v + (1 - b2) * low**2
        m_hat, v_hat = m / (1 - b1 ** (t + 1)), v / (1 - b2 ** (t + 1))
        yield u @ (m_hat / (np.sqrt(v_hat) + eps))


@pytest.mark.parametrize("tx", [FED, UNFED], ids=["feedback", "none"])
@pytest.mark.parametrize("shape", [(P, Q), (Q, P), (P, P)])
def test_follows_its_equations(tx, shape):
    """On the smaller side, and on the output side of a square kernel (in, out)."""
    grads = normal(shape=shape)
    directions, _ = run(tx, grads)
    if shape[0] >= shape[1]:
        grads, directions = (x.transpose(0, 2, 1) for x in (grads, directions))
    expected = list(oracle(grads, tx is FED))
    np.testing.assert_allclose(directions, expected, rtol=1e-3, atol=1e-3)


def test_takes_other_constants():
    grads, constants = normal(), (0.8, 0.95, 1e-2, 0.5)
    directions, _ = run(scale_by_ldadam(RANK, *constants), grads)
    expected = list(oracle(grads, True, *constants))
    np.testing.assert_allclose(directions, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, Q), (Q, 1)])
def test_is_adam_for_vectors(shape):
    """All there is to choose is a sign."""
    grads = normal(shape=shape)
    directions, _ = run(FED, grads)
    adam, _ = run(optax.scale_by_adam(B1, 0.99), grads)
    np.testing.assert_allclose(directions, adam, rtol=1e-3, atol=1e-5)


def test_full_rank_has_the_momentum_of_adam_and_no_error():
    grads = normal()
    _, states = run(scale_by_ldadam(P), grads)
    adam = run(optax.scale_by_adam(B1), grads)[1]
    np.testing.assert_allclose(momentum_of(states), adam.mu, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(states.matrices.error, 0, atol=1e-4)


def test_what_compression_loses_comes_back():
    """Each step, momentum and error together take in the whole gradient."""
    grads = normal()
    _, states = run(FED, grads)
    momentum, error = momentum_of(states), states.matrices.error
    taken = momentum[1:] + (1 - B1) * error[1:]
    given = B1 * momentum[:-1] + (1 - B1) * (grads[1:] + error[:-1])
    np.testing.assert_allclose(taken, given, rtol=1e-3, atol=1e-4)
    assert np.abs(error).max() > 1


def test_the_subspace_follows_the_gradients():
    """The start is orthogonal to what then comes, apart from a trace."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(P, P)))[0]
    coefficients = rng.normal(size=(100, P, Q))
    coefficients[:1, RANK : 2 * RANK] *= 1e-2
    coefficients[1:, :RANK] *= 1e-2
    coefficients[:, 2 * RANK :] *= 1e-3
    _, states = run(UNFED, basis @ coefficients)
    projector = states.matrices.projector
    np.testing.assert_allclose(
        projector.transpose(0, 2, 1) @ projector,
        np.broadcast_to(np.eye(RANK), (100, RANK, RANK)),
        atol=1e-5,
    )
    for step, seen in ((0, basis[:, :RANK]), (-1, basis[:, RANK : 2 * RANK])):
        assert np.linalg.norm(seen.T @ projector[step]) ** 2 > 0.99 * RANK


def test_moments_of_independent_coordinates_are_transferred_exactly():
    """Those of a Gaussian sample, to a rotated basis."""
    rng = np.random.default_rng(0)
    change = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    mean, deviation = np.array([1.0, -2.0, 0.5]), np.array([0.1, 1.0, 3.0])
    sample = mean + deviation * rng.normal(size=(200_000, 3))
    moments = [(c * (sample**k).mean(axis=0))[:, None] for k, c in ((1, 0.5), (2, 0.2))]
    mu, nu = transfer(*map(jnp.float32, (*moments, change, 0.5, 0.2)))
    turned = sample @ change.T
    np.testing.assert_allclose(mu[:, 0], 0.5 * turned.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(nu[:, 0], 0.2 * (turned**2).mean(axis=0), rtol=2e-2)


def test_a_negative_estimate_becomes_its_magnitude():
    """Averages of unlike length can have a squared mean above the mean square."""
    change = np.array([[0.8, 0.6], [-0.6, 0.8]])
    mean, square = np.array([[1.0], [1.0]]), np.array([[0.25], [0.25]])
    estimate = change**2 @ (square - mean**2) + (change @ mean) ** 2
    assert estimate.min() < 0 < estimate.max()
    nu = transfer(*map(jnp.float32, (mean, square, change, 1.0, 1.0)))[1]
    np.testing.assert_allclose(nu, np.abs(estimate), rtol=1e-5)


@pytest.mark.parametrize("tx", [FED, UNFED], ids=["feedback", "none"])
def test_zero_gradients_leave_no_mark(tx):
    directions, _ = run(tx, normal(sizes=np.arange(len(SIZES)) > 2))
    assert (directions[:3] == 0).all()
    assert np.linalg.norm(directions[3]) > 1


@pytest.mark.parametrize("shape", [(P, Q), (Q, P)])
def test_size_of_the_state(shape):
    for tx, error in ((FED, P * Q), (UNFED, 0)):
        sizes = [jnp.size(x) for x in jax.tree.leaves(tx.init(jnp.zeros(shape)))]
        assert sum(sizes) == P * RANK + 2 * RANK * Q + error + 1  # The count.


def test_leaves_must_be_matrices():
    with pytest.raises(ValueError, match=r"\['bias'\] has shape \(4,\)"):
        FED.init({"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)})
