"""SOAP against its equations in float64, and where it must be Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trajectories import SIZES, P, Q, normal, run

from benchmarks.baselines.soap import scale_by_soap

GAP = 3
SOAP = scale_by_soap(precondition_frequency=GAP)


def oracle(grads, left, right, b1=0.95, b2=0.95, eps=1e-8):
    """The directions, and whether sorting changed the order of some columns.

    The first bases are given, since the eigenvectors of a null space are not unique.
    The first moment is kept outside of the bases.
    """
    of_left = (1 - b2) * grads[0] @ grads[0].T
    of_right = (1 - b2) * grads[0].T @ grads[0]
    mu, nu = np.zeros_like(grads[0]), np.zeros_like(grads[0])
    directions, was_sorted = [mu], False
    for t, g in enumerate(grads[1:], 1):
        mu = b1 * mu + (1 - b1) * g
        nu = b2 * nu + (1 - b2) * (left.T @ g @ right) ** 2
        mu_hat, nu_hat = mu / (1 - b1**t), nu / (1 - b2**t)
        adam = left.T @ mu_hat @ right / (np.sqrt(nu_hat) + eps)
        directions.append(left @ adam @ right.T)
        of_left = b2 * of_left + (1 - b2) * g @ g.T
        of_right = b2 * of_right + (1 - b2) * g.T @ g
        if t % GAP == 0:
            rows = np.argsort(-np.diag(left.T @ of_left @ left))
            columns = np.argsort(-np.diag(right.T @ of_right @ right))
            was_sorted |= all((np.diff(order) < 0).any() for order in (rows, columns))
            nu = nu[np.ix_(rows, columns)]
            left = np.linalg.qr(of_left @ left[:, rows])[0]
            right = np.linalg.qr(of_right @ right[:, columns])[0]
    return np.stack(directions), was_sorted


@pytest.mark.parametrize("shape", [(P, Q), (Q, P)])
def test_follows_its_equations(shape):
    grads = normal(shape)
    directions, states = run(SOAP, grads)
    left, right = (np.asarray(x[0], np.float64) for x in states.matrices.bases)
    expected, was_sorted = oracle(grads, left, right)
    assert was_sorted
    np.testing.assert_allclose(directions, expected, rtol=1e-3, atol=1e-3)


def test_the_first_bases_are_eigenvectors_by_descending_eigenvalue():
    g = normal()[0]
    _, states = run(SOAP, normal())
    for basis, square in zip(states.matrices.bases, (g @ g.T, g.T @ g), strict=True):
        eigenvalues = np.linalg.eigvalsh(square)[::-1]
        first = np.asarray(basis[0], np.float64)
        np.testing.assert_allclose(first.T @ first, np.eye(len(square)), atol=1e-5)
        np.testing.assert_allclose(
            first.T @ square @ first, np.diag(eigenvalues), atol=1e-4
        )


def test_is_adam_in_the_basis_of_the_entries():
    """Such are the eigenvectors if the first gradient is diagonal."""
    grads = normal((P, P))
    grads[0] = np.diag(np.arange(P) + 1.0)
    directions, _ = run(scale_by_soap(precondition_frequency=len(grads)), grads)
    adam, _ = run(optax.scale_by_adam(0.95, 0.95), grads[1:])
    np.testing.assert_allclose(directions[1:], adam, rtol=1e-4, atol=1e-5)
    assert (directions[0] == 0).all()


def test_turns_with_the_gradients():
    """Adam does not."""
    grads, rng = normal((P, P)), np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.normal(size=(P, P)))[0] for _ in range(2))
    for tx, turns in ((SOAP, True), (optax.scale_by_adam(), False)):
        turned, _ = run(tx, left @ grads @ right)
        expected = left @ run(tx, grads)[0] @ right
        assert np.allclose(turned, expected, rtol=1e-2, atol=1e-2) == turns


def test_the_bases_change_every_ten_directions_by_default():
    steps = 22
    _, states = run(scale_by_soap(), normal(sizes=np.ones(steps)))
    for basis in states.matrices.bases:
        changed = (basis[1:] != basis[:-1]).any(axis=(1, 2))
        np.testing.assert_array_equal(changed, np.arange(1, steps) % 10 == 0)


def test_the_bases_come_to_be_eigenvectors():
    """Of a factor that only grows, from the basis of the entries."""
    u, _, vt = np.linalg.svd(normal((P, P))[0])
    g = u * 2.0 ** -np.arange(P) @ vt
    _, states = run(
        scale_by_soap(precondition_frequency=1), np.stack([0 * g, *[g] * 15])
    )
    for basis, square in zip(states.matrices.bases, (g @ g.T, g.T @ g), strict=True):
        inside = basis.transpose(0, 2, 1) @ square @ basis
        eigenvalues = np.diag(4.0 ** -np.arange(P))
        assert np.abs(inside[0] - eigenvalues).max() > 0.1
        np.testing.assert_allclose(inside[-1], eigenvalues, atol=1e-4)


def test_zero_gradients_stay_zero():
    directions, _ = run(SOAP, normal(sizes=np.zeros_like(SIZES)))
    assert (directions == 0).all()


@pytest.mark.parametrize("shape", [(P, Q), (Q, P)])
def test_size_of_the_state(shape):
    sizes = [jnp.size(x) for x in jax.tree.leaves(SOAP.init(jnp.zeros(shape)))]
    assert sum(sizes) == 2 * (P * P + Q * Q + P * Q) + 1  # The last one is the count.


def test_leaves_must_be_matrices():
    with pytest.raises(ValueError, match=r"\['bias'\] has shape \(4,\)"):
        SOAP.init({"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)})
