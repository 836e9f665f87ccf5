"""SOAP: Adam in the eigenbases of Shampoo's two factors.

Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam" (2024), arXiv
2409.11321.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.baselines import _matrices


class Sides(NamedTuple):
    """A square matrix for each side of a matrix."""

    left: jax.Array  # (p, p)
    right: jax.Array  # (q, q)


class MatrixState(NamedTuple):
    """`2 (p^2 + q^2 + p q)` numbers."""

    factors: Sides  # Averages of `g @ g.T` and of `g.T @ g`.
    bases: Sides  # Columns are approximate eigenvectors of the factors.
    mu: jax.Array  # In the bases, (p, q).
    nu: jax.Array  # In the bases, (p, q).


class SoapState(NamedTuple):
    count: jax.Array
    matrices: optax.Params  # A `MatrixState` for every matrix.


def scale_by_soap(
    b1=0.95, b2=0.95, eps=1e-8, precondition_frequency=10
) -> optax.GradientTransformation:
    """SOAP as in the authors' code, without rate and weight decay.

    The first gradient only starts the factors, whose eigenvectors are the first bases;
    its direction is zero. Every later direction is Adam's in the bases, which do not
    know of its gradient yet. The factors have the decay rate `b2` and are updated after
    each direction. The bases are updated after every `precondition_frequency`-th one,
    by a power iteration and a QR decomposition. Before it the code sorts their columns
    by the eigenvalues that these estimate, and entries of `nu` move with the columns.
    They are not rotated, while `mu` is rotated into the new bases.

    Both sides are rotated; the code leaves out sides of more than 10,000. Unlike in
    the code, `eps` is added to the bias-corrected root, as in all baselines here.
    """

    def init_fn(params):
        _matrices.check_matrices(params)

        def init_one(x):
            factors, bases = (
                Sides(*(jnp.zeros((n, n)) for n in x.shape)) for _ in range(2)
            )
            mu, nu = jnp.zeros(x.shape), jnp.zeros(x.shape)
            return MatrixState(factors, bases, mu, nu)

        return SoapState(jnp.zeros([], jnp.int32), jax.tree.map(init_one, params))

    def update_fn(updates, state, params=None):
        del params
        # The first gradient has no direction, so this one's is the `count`-th.
        count = state.count

        def update_one(g, matrix):
            factors = Sides(
                b2 * matrix.factors.left + (1 - b2) * (g @ g.T),
                b2 * matrix.factors.right + (1 - b2) * (g.T @ g),
            )

            def start(matrix):
                bases = Sides(*map(eigenvectors, factors))
                return jnp.zeros_like(g), matrix._replace(factors=factors, bases=bases)

            def step(matrix):
                adam, mu, nu = _matrices.adam_direction(
                    rotate(g, matrix.bases), matrix.mu, matrix.nu, count, b1, b2, eps
                )
                direction = rotate_back(adam, matrix.bases)
                due = count % precondition_frequency == 0
                matrix = MatrixState(factors, matrix.bases, mu, nu)
                return direction, jax.lax.cond(due, refresh, lambda old: old, matrix)

            return jax.lax.cond(count == 0, start, step, matrix)

        direction, new = _matrices.map_matrices(update_one, updates, state.matrices)
        return direction, SoapState(count + 1, new)

    return optax.GradientTransformation(init_fn, update_fn)


def rotate(x, bases):
    return bases.left.T @ x @ bases.right


def rotate_back(x, bases):
    return bases.left @ x @ bases.right.T


def eigenvectors(factor):
    """Returns the eigenvectors, those of the largest eigenvalues first."""
    return jnp.linalg.eigh(factor).eigenvectors[:, ::-1]


def refresh(matrix) -> MatrixState:
    """Returns the state with new bases."""
    (left, rows), (right, columns) = map(power_iteration, matrix.factors, matrix.bases)
    bases = Sides(left, right)
    mu = rotate(rotate_back(matrix.mu, matrix.bases), bases)
    nu = matrix.nu[rows][:, columns]
    return MatrixState(matrix.factors, bases, mu, nu)


def power_iteration(factor, basis):
    """Returns the new basis, and the order of the old columns that it came from."""
    image = factor @ basis
    estimates = jnp.sum(basis * image, axis=0)  # Of eigenvalues.
    order = jnp.argsort(estimates, descending=True)
    return jnp.linalg.qr(image[:, order])[0], order
