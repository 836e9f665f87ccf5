"""MLorc-AdamW: both moments are kept as randomised singular value decompositions.

Shen et al., "MLorc: Momentum Low-rank Compression for Memory Efficient Large Language
Model Adaptation" (2025), arXiv 2506.01897.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.baselines import _matrices


class Factors(NamedTuple):
    """The matrix `u @ diag(s) @ vt`: `r (p + q + 1)` numbers."""

    u: jax.Array  # (p, r)
    s: jax.Array  # (r,)
    vt: jax.Array  # (r, q)

    def product(self) -> jax.Array:
        return (self.u * self.s) @ self.vt


class Moments(NamedTuple):
    mu: Factors
    nu: Factors


class MLorcState(NamedTuple):
    count: jax.Array
    moments: optax.Params  # A `Moments` at every matrix.


def scale_by_mlorc(
    rank, b1=0.9, b2=0.999, eps=1e-8, oversampling=0, seed=0
) -> optax.GradientTransformation:
    """The MLorc-AdamW algorithm, without its rate and weight decay.

    A step computes both moments from their factors, lifts the negative entries of the
    second one (`lift_negatives`), and updates both with the full gradient as Adam does.
    The direction comes from these uncompressed moments. The state is the randomised SVD
    of each, of rank `rank`, from a fresh sketch of `rank + oversampling` columns.
    """

    def init_fn(params):
        _matrices.check_matrices(params)

        def init_one(x):
            (p, q), r = x.shape, min(rank, *x.shape)
            shapes = (p, r), r, (r, q)
            return Moments(*(Factors(*map(jnp.zeros, shapes)) for _ in range(2)))

        return MLorcState(jnp.zeros([], jnp.int32), jax.tree.map(init_one, params))

    def update_fn(updates, state, params=None):
        del params
        count = state.count + 1

        def update_one(g, moments, sketches):
            mu, nu = (factors.product() for factors in moments)
            direction, mu, nu = _matrices.adam_direction(
                g, mu, lift_negatives(nu), count, b1, b2, eps
            )
            mu = randomized_svd(mu, sketches[0], rank)
            nu = randomized_svd(nu, sketches[1], rank)
            return direction, Moments(mu, nu)

        sketches = draw_sketches(seed, count, updates, rank + oversampling)
        direction, moments = _matrices.map_matrices(
            update_one, updates, state.moments, sketches
        )
        return direction, MLorcState(count, moments)

    return optax.GradientTransformation(init_fn, update_fn)


def lift_negatives(nu):
    """Replaces each negative entry by the mean magnitude of all negative entries."""
    negative = nu < 0
    magnitude = -jnp.sum(jnp.where(negative, nu, 0)) / jnp.maximum(jnp.sum(negative), 1)
    return jnp.where(negative, magnitude, nu)


def randomized_svd(a, sketch, rank) -> Factors:
    """Returns the truncated SVD of `a` in the range of `a @ sketch` (Halko et al.)."""
    basis, _ = jnp.linalg.qr(a @ sketch)
    u, s, vt = jnp.linalg.svd(basis.T @ a, full_matrices=False)
    return Factors((basis @ u)[:, :rank], s[:rank], vt[:rank])


def draw_sketches(seed, count, tree, columns):
    """Draws two standard normal matrices for each of `tree`, new ones at each step."""
    key = jax.random.fold_in(jax.random.key(seed), count)

    def draw(x, key):
        return jax.random.normal(key, (2, x.shape[1], min(columns, *x.shape)))

    return jax.tree.map(draw, tree, optax.tree.split_key_like(key, tree))
