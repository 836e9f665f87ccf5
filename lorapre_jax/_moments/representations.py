"""Ways to hold ONE matrix, and conversions between them.

A matrix is dense, or a pair of factors, which means `left @ right.T`, or a `RowColumn`
of r and c, which means the outer product of r and `c / rms(c)`. Functions that need
factors only never form a (p, q) array.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lorapre_jax._moments.factors import FactorPair, RotatedRowColumn, RowColumn
from lorapre_jax._moments.row_column import FLOOR
from lorapre_jax._numerics.arrays import dot, sketch_columns
from lorapre_jax._numerics.norms import relative, root_mean_square
from lorapre_jax._numerics.orthonormal import orthonormal_columns

Matrix = jax.Array | FactorPair | RowColumn

_OVERSAMPLING = 8
_POWER_ITERATIONS = 3


def as_dense(x: Matrix) -> jax.Array:
    if isinstance(x, RowColumn):
        x = _outer(x)
    return dot(x.left, x.right.T) if isinstance(x, FactorPair) else x


def as_factors(x: Matrix, rank: int) -> FactorPair:
    """Returns the best pair of that rank, with an orthonormal left factor.

    For a dense `x` it is nearly the best: a randomised SVD (Halko, Martinsson and
    Tropp, 2011, algorithms 4.4 and 5.1).
    """
    if isinstance(x, RowColumn):
        x = _outer(x)
    return _truncated(_sketched(x, rank) if isinstance(x, jax.Array) else x, rank)


def as_row_column(x: Matrix) -> RowColumn:
    """Returns the root mean squares of the rows and columns of `x`."""
    if isinstance(x, RowColumn):
        return x
    if isinstance(x, FactorPair):
        # The rows of U S, and those of V S, have the norms of the product's.
        left, right = _truncated(x, x.left.shape[1])
        rows = left * jnp.linalg.norm(right, axis=0, keepdims=True)
        return RowColumn(
            jnp.linalg.norm(rows, axis=1) / jnp.sqrt(len(right)),
            jnp.linalg.norm(right, axis=1) / jnp.sqrt(len(left)),
        )
    return RowColumn(root_mean_square(x, 1), root_mean_square(x, 0))


def unrotated(x: RotatedRowColumn, left: jax.Array) -> RowColumn:
    """Returns root mean squares of the rows of whole gradients.

    Directions are taken as uncorrelated.
    """
    return RowColumn(
        jnp.hypot(x.row, jnp.linalg.norm(left * x.direction[None], axis=1)), x.column
    )


def rotated(
    whole: RowColumn, pair: FactorPair, known: Any, m: jax.Array | None
) -> RotatedRowColumn:
    """Returns statistics along the left factor of `pair`, from those of whole rows.

    Entries, or the directions of `known`, are taken as uncorrelated. But no direction
    has less than the average that `pair` holds of it, nor a smaller share of the energy
    than in a dense first moment. A direction that has not been found yet has the mean.

    Args:
      whole: Root mean squares of the rows and columns of whole gradients.
      pair: The first moment.
      known: A `RotatedRowColumn` and the left factor that it belongs to; or None.
      m: A dense first moment, `(p, q)`; or None.
    """
    rms = root_mean_square
    if known is None:
        direction = jnp.linalg.norm(pair.left * whole.row[:, None], axis=0)
    else:
        x, left = known
        inside = dot(left.T, pair.left)
        outside = pair.left - dot(left, inside)
        direction = jnp.hypot(
            jnp.linalg.norm(inside * x.direction[:, None], axis=0),
            jnp.linalg.norm(outside * x.row[:, None], axis=0),
        )
    energy = jnp.linalg.norm(whole.row)
    least = rms(pair.right, 0)
    if m is not None:
        part = jnp.linalg.norm(dot(pair.left.T, m), axis=1)
        total = jnp.linalg.norm(m)
        least = jnp.maximum(least, part / jnp.where(total > 0, total, 1) * energy)
    is_found = jnp.any(pair.left != 0, axis=0)
    direction = jnp.where(
        is_found, jnp.maximum(direction, least), energy / jnp.sqrt(len(whole.row))
    )
    # Rows of the residual have the energy of whole rows that no direction has.
    in_directions = jnp.linalg.norm(pair.left * direction[None], axis=1)
    difference = (whole.row - in_directions) * (whole.row + in_directions)
    residual = jnp.hypot(jnp.sqrt(jnp.maximum(difference, 0)), FLOOR * whole.row)
    return RotatedRowColumn(residual, whole.column, direction)


def one_by_one(fn: Any, ndim: int) -> Any:
    """Maps `fn` over matrices with `ndim` leading axes, one after the other.

    Only one matrix is in memory at a time, and batched LAPACK calls may hang on CPUs,
    see `inverse_cholesky`.
    """
    for _ in range(ndim):
        fn = _mapped(fn)
    return fn


def _mapped(fn: Any) -> Any:
    return lambda x: jax.lax.map(fn, x)


def _outer(x: RowColumn) -> FactorPair:
    return FactorPair(x.row[:, None], relative(x.column)[:, None])


def _sketched(x: jax.Array, rank: int) -> FactorPair:
    size = min(rank + _OVERSAMPLING, *x.shape)
    v = sketch_columns(0, (x.shape[1], size), 1.0, x.dtype)
    for _ in range(_POWER_ITERATIONS):
        left = orthonormal_columns(dot(x, v))
        v = orthonormal_columns(dot(x.T, left))
    left = orthonormal_columns(dot(x, v))
    return FactorPair(left, dot(x.T, left))


def _truncated(pair: FactorPair, rank: int) -> FactorPair:
    """Returns the pair of the largest singular triples, padded with zeros."""
    u = orthonormal_columns(pair.left)
    v = orthonormal_columns(pair.right)
    core = dot(dot(u.T, pair.left), dot(pair.right.T, v))
    inner_u, s, inner_vt = jnp.linalg.svd(core)
    left = dot(u, inner_u)[:, :rank]
    right = dot(v, inner_vt.T * s[None])[:, :rank]
    missing = ((0, 0), (0, max(0, rank - right.shape[1])))
    return FactorPair(jnp.pad(left, missing), jnp.pad(right, missing))
