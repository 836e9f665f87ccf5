"""Fira: GaLore's Adam, with the residual of its projection at Adam's scale.

Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
Constraint?" (2024), arXiv 2410.01623.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.baselines import _matrices


class MatrixState(NamedTuple):
    """`p r + 2 r q + 1` numbers (Table 2)."""

    projector: jax.Array  # Leading left singular vectors of a gradient, (p, r).
    mu: jax.Array  # (r, q)
    nu: jax.Array  # (r, q)
    norm: jax.Array  # Of the residual's part of the last direction.


class FiraState(NamedTuple):
    count: jax.Array
    matrices: optax.Params  # A `MatrixState` for every matrix.


def scale_by_fira(
    rank, b1=0.9, b2=0.999, eps=1e-8, update_proj_gap=200, limiter=1.01
) -> optax.GradientTransformation:
    """Algorithm 1 of the paper, without its rates eta and alpha.

    The projector is that of the gradient at every `update_proj_gap`-th step (eq. 7).
    Each column of the residual `G - P R` is multiplied by the factor by which Adam
    scales that column of the projected gradient `R` (eq. 11). The norm of the
    residual's part grows by a factor of `limiter` per step at most (eq. 12).
    """

    def init_fn(params):
        _matrices.check_matrices(params)

        def init_one(x):
            p, q = _matrices.wide_shape(x)
            r = min(rank, p)
            mu, nu = jnp.zeros((r, q)), jnp.zeros((r, q))
            return MatrixState(jnp.zeros((p, r)), mu, nu, jnp.zeros([]))

        return FiraState(jnp.zeros([], jnp.int32), jax.tree.map(init_one, params))

    def update_fn(updates, state, params=None):
        del params
        count, due = state.count + 1, state.count % update_proj_gap == 0

        @_matrices.oriented
        def update_one(g, matrix):
            projector = _matrices.projector_of(g, matrix.projector, due)
            low = projector.T @ g
            adam, mu, nu = _matrices.adam_direction(
                low, matrix.mu, matrix.nu, count, b1, b2, eps
            )
            factor = scaling_factor(adam, low, eps, axis=0)
            residual = factor * (g - projector @ low)
            residual, norm = limit_growth(residual, matrix.norm, limiter)
            return projector @ adam + residual, MatrixState(projector, mu, nu, norm)

        direction, new = _matrices.map_matrices(update_one, updates, state.matrices)
        return direction, FiraState(count, new)

    return optax.GradientTransformation(init_fn, update_fn)


def scaling_factor(adapted, g, eps, axis=None):
    """Returns how the optimizer scaled the norm of `g`, over an axis or all entries."""
    return jnp.linalg.norm(adapted, axis=axis) / (jnp.linalg.norm(g, axis=axis) + eps)


def limit_growth(update, before, limiter):
    """Limits the norm of `update` to `limiter` times `before`; returns that norm too.

    There is no limit if `before` is zero, as at the first step. Otherwise an update
    that starts from zero would stay zero.
    """
    norm = jnp.linalg.norm(update)
    limited = jnp.where(before > 0, jnp.minimum(norm, limiter * before), norm)
    return update * (limited / jnp.where(norm > 0, norm, 1)), limited
