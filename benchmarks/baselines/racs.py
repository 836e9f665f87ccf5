"""RACS: stochastic gradient descent with one scale for each row and each column.

Gong et al., "Towards Efficient Optimizer Design for LLM via Structured Fisher
Approximation with a Low-Rank Extension" (2025), arXiv 2502.07752.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.baselines import _matrices
from benchmarks.baselines.fira import limit_growth


class MatrixState(NamedTuple):
    """`p + q + 1` numbers (Table 1)."""

    rows: jax.Array  # The paper's q, (p,).
    columns: jax.Array  # The paper's s, (q,).
    norm: jax.Array  # Of the last direction, before `scale`.


class RacsState(NamedTuple):
    matrices: optax.Params  # A `MatrixState` for every matrix.


def scale_by_racs(
    b=0.9, scale=0.05, limiter=1.01, iterations=5
) -> optax.GradientTransformation:
    """Algorithm 1 of the paper, without its rate lambda.

    Averages of the scales of rows and columns divide the gradient, by their roots. They
    start from zero without a bias correction, so the first direction is `1 / (1 - b)`
    times too long. The norm grows by a factor of `limiter` per step at most. `scale` is
    the paper's alpha, 0.05 up to 350M parameters. The paper's matrices have the smaller
    side first, so tall ones are transposed.
    """

    def init_fn(params):
        _matrices.check_matrices(params)

        def init_one(x):
            p, q = _matrices.wide_shape(x)
            return MatrixState(jnp.zeros(p), jnp.zeros(q), jnp.zeros([]))

        return RacsState(jax.tree.map(init_one, params))

    def update_fn(updates, state, params=None):
        del params

        @_matrices.oriented
        def update_one(g, matrix):
            rows, columns = two_sided_scales(jnp.square(g), iterations)
            rows = b * matrix.rows + (1 - b) * rows
            columns = b * matrix.columns + (1 - b) * columns
            direction = inverse_root(rows)[:, None] * g * inverse_root(columns)
            direction, norm = limit_growth(direction, matrix.norm, limiter)
            return scale * direction, MatrixState(rows, columns, norm)

        direction, new = _matrices.map_matrices(update_one, updates, state.matrices)
        return direction, RacsState(new)

    return optax.GradientTransformation(init_fn, update_fn)


def two_sided_scales(squares, iterations):
    """Returns scales of rows and columns whose outer product is nearest to `squares`.

    The fixed-point iteration of eq. 16, with one sample for the mean, starts from rows
    of ones. The scales of rows do not depend on the size of `squares`, and those of
    columns are proportional to it. So the size is left out of the iteration, whose
    products of four gradients would underflow.
    """
    size = jnp.mean(squares)
    unit = squares / jnp.where(size > 0, size, 1)
    rows, columns = (jnp.ones(n) for n in squares.shape)
    for _ in range(iterations):
        columns = over_square(unit.T @ rows, rows)
        rows = over_square(unit @ columns, columns)
    return rows, size * columns


def over_square(x, y):
    """Returns `x` over the squared norm of `y`, or `x` if that is zero."""
    square = jnp.sum(jnp.square(y))
    return x / jnp.where(square > 0, square, 1)


def inverse_root(x):
    """Returns one over the root of `x`, and zero where `x` is, as in a zero row."""
    return jnp.where(x > 0, jax.lax.rsqrt(x), 0)
