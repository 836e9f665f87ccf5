"""DCT-AdamW: Adam on the rows of the gradient's cosine transform that matter most.

Modoranu et al., "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language
Models" (2025), arXiv 2505.17967; "FFT-based Dynamic Subspace Selection ..." since v3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.baselines import _matrices


class Moments(NamedTuple):
    """Moments for the r chosen columns of the basis: `2 r q` numbers and r indices."""

    indices: jax.Array  # (r,)
    mu: jax.Array  # (r, q)
    nu: jax.Array  # (r, q)


class DctAdamState(NamedTuple):
    count: jax.Array
    moments: optax.Params  # A `Moments` for every matrix.


def scale_by_dct_adam(
    rank, b1=0.9, b2=0.999, eps=1e-8, update_gap=1, norm=1
) -> optax.GradientTransformation:
    """The DCT-AdamW algorithm, without rate, weight decay and error feedback.

    Every `update_gap` steps, `rank` columns of the basis are chosen: those whose rows
    of `basis.T @ gradient` have the largest norm, of order 1 (as in the authors' code)
    or 2 (the least error of the projection). The error feedback is optional in the
    paper and needs a buffer of the size of the gradient in 8 bits. It is not
    implemented, so the part of a gradient outside of the chosen columns is lost.
    """

    def init_fn(params):
        _matrices.check_matrices(params)

        def init_one(x):
            p, q = _matrices.wide_shape(x)
            r = min(rank, p)
            mu, nu = jnp.zeros((r, q)), jnp.zeros((r, q))
            return Moments(jnp.arange(r, dtype=jnp.int32), mu, nu)

        return DctAdamState(jnp.zeros([], jnp.int32), jax.tree.map(init_one, params))

    def update_fn(updates, state, params=None):
        del params
        count = state.count + 1
        sizes = {min(g.shape) for g in jax.tree.leaves(updates)}
        bases = {p: dct_matrix(p) for p in sizes}

        @_matrices.oriented
        def update_one(g, moments):
            basis = bases[len(g)]

            def choose(moments):
                rows = basis.T @ g
                norms = jnp.linalg.norm(rows, norm, axis=1)
                indices = jax.lax.top_k(norms, len(moments.indices))[1]
                return rows[indices], rotate(moments, indices)

            def keep(moments):
                return basis[:, moments.indices].T @ g, moments

            low, (indices, mu, nu) = jax.lax.cond(
                state.count % update_gap == 0, choose, keep, moments
            )
            low, mu, nu = _matrices.adam_direction(low, mu, nu, count, b1, b2, eps)
            return basis[:, indices] @ low, Moments(indices, mu, nu)

        direction, moments = _matrices.map_matrices(update_one, updates, state.moments)
        return direction, DctAdamState(count, moments)

    return optax.GradientTransformation(init_fn, update_fn)


def dct_matrix(n):
    """The orthogonal DCT-III matrix, `sqrt(2/n) cos(i (2j+1) pi / 2n)`, row 0 / sqrt 2.

    All layers of that size share one, which is recomputed in every step, not stored.
    """
    i, j = jnp.arange(n)[:, None], jnp.arange(n)
    angle = (i * (2 * j + 1) % (4 * n)) * (jnp.pi / (2 * n))
    return jnp.sqrt(jnp.where(i > 0, 2, 1) / n) * jnp.cos(angle)


def rotate(moments, indices) -> Moments:
    """Returns the moments in the basis of the columns `indices`.

    Since the basis is orthogonal, the paper's rotation `Q_new.T @ Q_old` has a one for
    each column that stays chosen, and zeros elsewhere. So these columns keep their
    rows, and new columns start from zero. The paper also takes magnitudes after
    rotating `nu`, which changes nothing.
    """
    same = indices[:, None] == moments.indices
    stays, source = same.any(axis=1, keepdims=True), same.argmax(axis=1)
    mu, nu = (jnp.where(stays, m[source], 0) for m in (moments.mu, moments.nu))
    return Moments(indices, mu, nu)
