"""APOLLO: the gradient itself, scaled as Adam scales its random projection.

Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance" (2024), arXiv 2412.05270.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.baselines import _matrices
from benchmarks.baselines.fira import limit_growth, scaling_factor


class MatrixState(NamedTuple):
    """`2 r q + 1` numbers; Table 1 counts a seed besides, here the same for all."""

    mu: jax.Array  # (r, q)
    nu: jax.Array  # (r, q)
    norm: jax.Array  # Of the last direction.


class ApolloState(NamedTuple):
    count: jax.Array
    matrices: optax.Params  # A `MatrixState` at every matrix.


def scale_by_apollo(
    rank, b1=0.9, b2=0.999, eps=1e-8, update_proj_gap=200, limiter=1.01, seed=0
) -> optax.GradientTransformation:
    """Algorithm 1 of the paper, without rate and weight decay: one factor a column.

    Column j of the gradient takes the factor that Adam gave column j of its Gaussian
    projection (eq. 5). That is drawn anew every `update_proj_gap` steps, with Adam's
    moments left as they are. The direction's norm grows by no more than the factor
    `limiter` a step (eq. 4). Where p > q, the columns are rows.
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
    """APOLLO-Mini (section 4.2): rank one, and one factor for all of a matrix.

    The factor shrinks with the root of the rank (eq. 9). `scale`, the paper's alpha,
    makes up for that: `sqrt(128)` there, for all sizes.
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
