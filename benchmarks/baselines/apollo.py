"""APOLLO: scales the gradient by the factors that Adam has for a random projection.

Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance" (2024), arXiv 2412.05270.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.baselines import _matrices
from benchmarks.baselines.fira import limit_growth, scaling_factor


class MatrixState(NamedTuple):
    """`2 r q + 1` numbers. Table 1 also counts a seed, which here is one for all."""

    mu: jax.Array  # (r, q)
    nu: jax.Array  # (r, q)
    norm: jax.Array  # Of the last direction.


class ApolloState(NamedTuple):
    count: jax.Array
    matrices: optax.Params  # A `MatrixState` for every matrix.


def scale_by_apollo(
    rank, b1=0.9, b2=0.999, eps=1e-8, update_proj_gap=200, limiter=1.01, seed=0
) -> optax.GradientTransformation:
    """Algorithm 1 of the paper without learning rate and weight decay.

    Column j of the gradient is multiplied by the factor by which Adam scales column j
    of its Gaussian projection (eq. 5). The projection is drawn anew every
    `update_proj_gap` steps, and Adam's moments stay as they are. The norm of the
    direction grows by a factor of `limiter` per step at most (eq. 4). If p > q, the
    factors are those of rows.
    """
    return _scale_by_apollo(rank, b1, b2, eps, update_proj_gap, limiter, seed, 0, 1.0)


def scale_by_apollo_mini(
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    update_proj_gap=200,
    limiter=1.01,
    seed=0,
    scale=128**0.5,
) -> optax.GradientTransformation:
    """APOLLO-Mini (section 4.2): rank one, and one factor for each matrix.

    The factor shrinks with the root of the rank (eq. 9). `scale`, the paper's alpha,
    compensates for that; it is `sqrt(128)` in the paper for all sizes.
    """
    return _scale_by_apollo(1, b1, b2, eps, update_proj_gap, limiter, seed, None, scale)


def _scale_by_apollo(rank, b1, b2, eps, update_proj_gap, limiter, seed, axis, scale):
    def init_fn(params):
        _matrices.check_matrices(params)

        def init_one(x):
            p, q = _matrices.wide_shape(x)
            r = min(rank, p)
            return MatrixState(jnp.zeros((r, q)), jnp.zeros((r, q)), jnp.zeros([]))

        return ApolloState(jnp.zeros([], jnp.int32), jax.tree.map(init_one, params))

    def update_fn(updates, state, params=None):
        del params
        count = state.count + 1
        draw = state.count // update_proj_gap

        @_matrices.oriented
        def update_one(g, matrix, key):
            shape = len(matrix.mu), len(g)
            low = _matrices.random_projection(key, draw, shape) @ g
            adam, mu, nu = _matrices.adam_direction(
                low, matrix.mu, matrix.nu, count, b1, b2, eps
            )
            direction = scale * scaling_factor(adam, low, eps, axis) * g
            direction, norm = limit_growth(direction, matrix.norm, limiter)
            return direction, MatrixState(mu, nu, norm)

        keys = optax.tree.split_key_like(jax.random.key(seed), updates)
        direction, new = _matrices.map_matrices(
            update_one, updates, state.matrices, keys
        )
        return direction, ApolloState(count, new)

    return optax.GradientTransformation(init_fn, update_fn)
