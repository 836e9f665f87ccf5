"""LDAdam: Adam in a subspace that moves in every step, and its moments with it.

Robert et al., "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics"
(2024), arXiv 2410.16103.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.baselines import _matrices


class MatrixState(NamedTuple):
    """`p r + 2 r q` numbers, and `p q` more with error feedback.

    The authors' code keeps the error in the buffer of the gradient between two steps.
    """

    projector: jax.Array  # Orthonormal columns, (p, r).
    mu: jax.Array  # (r, q)
    nu: jax.Array  # (r, q)
    error: jax.Array | None  # Of all compressions so far, (p, q).


class LDAdamState(NamedTuple):
    count: jax.Array
    matrices: optax.Params  # A `MatrixState` for every matrix.


def scale_by_ldadam(
    rank, b1=0.908, b2=0.99, eps=1e-8, rho=0.908, error_feedback=True
) -> optax.GradientTransformation:
    """The paper's algorithm, without rate and weight decay.

    The projector is that of the first gradient's leading singular vectors, and then
    takes one step of power iteration per update, on a mix of the last momentum, with
    weight `rho`, and the gradient. The moments are carried over to the new subspace
    (`transfer`). What the projections of gradient and momentum lose is added to the
    next gradient, unless `error_feedback` is False, a variant of the paper.

    The smaller side of a matrix is projected, and the output side of a square one, as
    in the authors' code. They store matrices as (out, in), so kernels (in, out) are
    transposed first.
    """

    def init_fn(params):
        _matrices.check_matrices(params)

        def init_one(x):
            p, q = _matrices.wide_shape(x)
            r = min(rank, p)
            error = jnp.zeros((p, q)) if error_feedback else None
            mu, nu = jnp.zeros((r, q)), jnp.zeros((r, q))
            return MatrixState(jnp.zeros((p, r)), mu, nu, error)

        return LDAdamState(jnp.zeros([], jnp.int32), jax.tree.map(init_one, params))

    def update_fn(updates, state, params=None):
        del params
        count, first = state.count + 1, state.count == 0

        @_matrices.oriented
        def update_one(g, matrix):
            old, mu, nu, error = matrix
            if error_feedback:
                g = g + error
            # Before the first step the moments are zero, whatever the correction.
            t = jnp.maximum(state.count, 1).astype(g.dtype)
            bias1, bias2 = 1 - b1**t, 1 - b2**t

            momentum = old @ mu
            mix = rho * momentum / bias1 + (1 - rho) * g
            projector = _matrices.projector_of(g, power_iteration(mix, old), first)
            mu, nu = transfer(mu, nu, projector.T @ old, bias1, bias2)

            low = projector.T @ g
            if error_feedback:
                lost = momentum - projector @ mu
                error = g - projector @ low + b1 / (1 - b1) * lost
            adam, mu, nu = _matrices.adam_direction(low, mu, nu, count, b1, b2, eps)
            return projector @ adam, MatrixState(projector, mu, nu, error)

        def update_kernel(kernel, matrix):
            direction, matrix = update_one(kernel.T, matrix)
            return direction.T, matrix

        direction, new = _matrices.map_matrices(update_kernel, updates, state.matrices)
        return direction, LDAdamState(count, new)

    return optax.GradientTransformation(init_fn, update_fn)


def power_iteration(x, start):
    """Returns an orthonormal basis of `x @ x.T @ start`."""
    return jnp.linalg.qr(x @ (x.T @ start))[0]


def transfer(mu, nu, change, bias1, bias2):
    """Returns the moments in new coordinates, `change` times the old ones.

    The second moment is a variance plus a squared mean, both without bias. The mean is
    known in the new coordinates. The variance is estimated as if the old coordinates
    were uncorrelated. The estimate can be negative, so the paper takes magnitudes.
    """
    mean = mu / bias1
    variance = nu / bias2 - jnp.square(mean)
    moved = change @ mean
    estimate = jnp.square(change) @ variance + jnp.square(moved)
    return bias1 * moved, bias2 * jnp.abs(estimate)
