"""Dion: orthonormal updates of low rank, from a power iteration with error feedback.

Ahn et al., "Dion: Distributed Orthonormalized Updates" (2025), arXiv 2504.05295.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.baselines import _matrices


class MatrixState(NamedTuple):
    """`p q + p r` numbers, where p is the smaller side."""

    momentum: jax.Array  # With what low-rank updates left of gradients, (p, q).
    basis: jax.Array  # Columns of norm one after the first step, (p, r).


class DionState(NamedTuple):
    matrices: optax.Params  # A `MatrixState` for every matrix.


def scale_by_dion(
    rank, mu=0.95, eps=1e-8, consistent_rms=None, seed=0
) -> optax.GradientTransformation:
    """The algorithm of the paper, without rate and weight decay.

    One power iteration from the last basis gives the momentum's low-rank part. The
    momentum forgets a share `1 - mu` of this part only, so that what the update does
    not contain stays (error feedback). The update is the product of the two factors: an
    orthonormal one of the larger side, as in the authors' code, and one of the smaller
    side with columns of norm one, the next basis. The first basis is Gaussian.

    `consistent_rms=None` scales the update by `sqrt(q / p)`: the root of outputs per
    input, for matrices that have a column for every output. A number scales it such
    that this is its root mean square for any shape and rank, as for other Muons.
    """

    def init_fn(params):
        _matrices.check_matrices(params)

        def init_one(x, key):
            p, q = _matrices.wide_shape(x)
            basis = jax.random.normal(key, (p, min(rank, p)))
            return MatrixState(jnp.zeros((p, q)), basis)

        keys = optax.tree.split_key_like(jax.random.key(seed), params)
        return DionState(jax.tree.map(init_one, params, keys))

    def update_fn(updates, state, params=None):
        del params

        @_matrices.oriented
        def orthonormal(g, matrix):
            momentum = matrix.momentum + g
            # There is nothing to decompose if all gradients so far were zero.
            some = jnp.any(momentum != 0)
            factor, _ = jnp.linalg.qr(momentum.T @ matrix.basis)
            factor = jnp.where(some, factor, 0)
            image = jnp.where(some, momentum @ factor, matrix.basis)
            momentum -= (1 - mu) * (image @ factor.T)
            basis = image / (jnp.linalg.norm(image, axis=0) + eps)
            return basis @ factor.T, MatrixState(momentum, basis)

        def update_one(g, matrix):
            direction, matrix = orthonormal(g, matrix)
            r = matrix.basis.shape[1]
            return shape_scale(g.shape, r, consistent_rms) * direction, matrix

        direction, new = _matrices.map_matrices(update_one, updates, state.matrices)
        return direction, DionState(new)

    return optax.GradientTransformation(init_fn, update_fn)


def shape_scale(shape, rank, consistent_rms) -> float:
    p, q = shape
    if consistent_rms is None:
        return (q / p) ** 0.5
    return consistent_rms * (p * q / rank) ** 0.5  # Unscaled, the norm is sqrt(rank).
