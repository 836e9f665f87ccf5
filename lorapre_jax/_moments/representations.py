"""Representations of ONE matrix, turned into one another: dense, factors, row x column.

A pair of factors means `left @ right.T`; a `RowColumn` of r and c, the outer product of
r and `c / rms(r)`. What only needs factors never forms a (p, q) array.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lorapre_jax._moments.factors import FactorPair, RotatedRowColumn, RowColumn
from lorapre_jax._moments.methods import FLOOR
from lorapre_jax._numerics.arrays import dot, random_columns
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
    """The best pair of that rank, its left factor orthonormal; of a dense `x` nearly.

    Randomised SVD (Halko, Martinsson and Tropp, 2011, algorithms 4.4 and 5.1).
    """
    if isinstance(x, RowColumn):
        x = _outer(x)
    return _truncated(_sketched(x, rank) if isinstance(x, jax.Array) else x, rank)


def as_row_column(x: Matrix) -> RowColumn:
    """Root mean squares of the rows and columns of `x`."""
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
    """Root mean squares of whole rows; directions are taken as uncorrelated."""
    return RowColumn(
        jnp.hypot(x.row, jnp.linalg.norm(left * x.direction[None], axis=1)), x.column
    )


def rotated(
    whole: RowColumn, pair: FactorPair, known: Any, m: jax.Array | None
) -> RotatedRowColumn:
    """Along the left factor of `pair`, a first moment, from whole rows.

    Entries, or the directions of `known`, are taken as uncorrelated. But no direction
    has less than the average that `pair` holds of it, nor less of the energy than of
    that of a dense first moment `m: (p, q)`; one not found yet has the mean.

    Args:
      known: A `RotatedRowColumn` and the left factor that it is along; or None.
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
    along = jnp.linalg.norm(pair.left * direction[None], axis=1)
    rest = jnp.sqrt(jnp.maximum((whole.row - along) * (whole.row + along), 0))
    return RotatedRowColumn(jnp.hypot(rest, FLOOR * whole.row), whole.column, direction)


def one_by_one(fn: Any, ndim: int) -> Any:
    """`fn` on every matrix of `ndim` leading axes, one after the other.

    One matrix in memory at a time; and batched LAPACK calls may hang on CPUs, see
    `inverse_cholesky`.
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
    v = random_columns(0, x.shape[1], size).astype(x.dtype)
    for _ in range(_POWER_ITERATIONS):
        left = orthonormal_columns(dot(x, v))
        v = orthonormal_columns(dot(x.T, left))
    left = orthonormal_columns(dot(x, v))
    return FactorPair(left, dot(x.T, left))


def _truncated(pair: FactorPair, rank: int) -> FactorPair:
    """Rank r' <= r: the largest singular triples; else padded with zeros."""
    u = orthonormal_columns(pair.left)
    v = orthonormal_columns(pair.right)
    core = dot(dot(u.T, pair.left), dot(pair.right.T, v))
    inner_u, s, inner_vt = jnp.linalg.svd(core)
    left = dot(u, inner_u)[:, :rank]
    right = dot(v, inner_vt.T * s[None])[:, :rank]
    missing = ((0, 0), (0, max(0, rank - right.shape[1])))
    return FactorPair(jnp.pad(left, missing), jnp.pad(right, missing))
