"""GaLore against its equations in float64."""

import numpy as np
import optax
import pytest
from trajectories import P, Q, normal, run

from benchmarks.baselines.galore import scale_by_galore

RANK, GAP = 2, 3


def oracle(grads, projectors, b1=0.9, b2=0.999, eps=1e-8):
    """Singular vectors are found here; only their signs are those of `projectors`."""
    mu, nu, directions = np.zeros((RANK, Q)), np.zeros((RANK, Q)), []
    for t, g in enumerate(grads):
        if t % GAP == 0:
            u = np.linalg.svd(g)[0][:, :RANK]
            u = u * np.sign(np.sum(u * projectors[t], axis=0))
        r = u.T @ g
        mu, nu = b1 * mu + (1 - b1) * r, b2 * nu + (1 - b2) * r**2
        mu_hat, nu_hat = mu / (1 - b1 ** (t + 1)), nu / (1 - b2 ** (t + 1))
        directions.append(u @ (mu_hat / (np.sqrt(nu_hat) + eps)))
    return np.stack(directions)


@pytest.mark.parametrize("tall", [False, True])
def test_follows_its_equations_on_the_smaller_side(tall):
    grads = normal()
    given = grads.transpose(0, 2, 1) if tall else grads
    directions, states = run(scale_by_galore(RANK, update_proj_gap=GAP), given)
    matrices = states.matrices
    assert matrices.projector.shape == (len(grads), P, RANK)
    expected = oracle(grads, matrices.projector)
    expected = expected.transpose(0, 2, 1) if tall else expected
    np.testing.assert_allclose(directions, expected, rtol=1e-3, atol=1e-4)


def test_a_square_matrix_moves_as_in_optax():
    """There is no smaller side to differ about."""
    grads = normal()[:, :, :P]
    dims = optax.contrib.GaLoreDimensionNumbers(reduction_axis=0, output_axis=1)
    theirs = optax.contrib.galore(
        -1.0, RANK, update_proj_gap=GAP, weight_dimension_numbers=dims
    )
    expected, _ = run(theirs, grads)
    directions, _ = run(scale_by_galore(RANK, update_proj_gap=GAP), grads)
    np.testing.assert_allclose(directions, expected, rtol=1e-4, atol=1e-5)
