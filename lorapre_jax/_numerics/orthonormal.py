"""Orthonormal bases through small Gram matrices.

A Gram matrix is a sum over the long side, which a sharded factor can reduce. All else
is products of `(r, r)` matrices.
"""

import jax
import jax.numpy as jnp

from lorapre_jax._numerics.arrays import dot
from lorapre_jax._numerics.norms import inverse_root, largest


def orthonormal_columns(x: jax.Array) -> jax.Array:
    """Returns an orthonormal basis `(n, r)` of the columns of `x: (n, r)`, n >= r.

    It is that of Gram and Schmidt: column k is the part of column k of `x` that is
    orthogonal to the columns before it, at norm one. Zero gives zero. A direction that
    only rounding tells from zero gives a column of any norm up to one, which is nearly
    orthogonal to the others, or zero.
    """
    return gram_schmidt(x / largest(x))


def gram_schmidt(x: jax.Array) -> jax.Array:
    """Does what `orthonormal_columns` does if no square in `x` under- or overflows."""
    x = x * inverse_root(_columns_sum(jnp.square(x)))
    row, column = (
        jax.lax.broadcasted_iota(jnp.int32, (x.shape[1],) * 2, axis) for axis in (0, 1)
    )
    upper, eye = (row < column).astype(x.dtype), (row == column).astype(x.dtype)
    x = jax.lax.fori_loop(
        0, _PASSES, lambda _, x: dot(x, _triangular(x, upper, eye)), x
    )
    # A column that is not orthogonal to those before it would count them twice.
    overlap = _columns_sum(jnp.square(upper * dot(x.T, x)))
    return jnp.where(overlap > _OVERLAP, 0, x)


# A pass tells columns apart as far as the rounding of its Gram matrix lets it. So many
# are enough for columns with a condition of 1e5, such as those of the first gradients
# at full rank. Later columns change little from step to step.
_PASSES, _STEPS = 5, 4
_OVERLAP = 1e-4


def _triangular(x, upper, eye):
    """Returns an upper triangular T such that `x T` is nearly orthonormal.

    Columns of `x` have norm one at most; `upper` is one above the diagonal, `eye` on
    it. There are products alone here, since a factorisation would be a chain of r small
    steps. Each step subtracts from every column at once its components along the
    columns before it. These need not be orthogonal yet, so the components have the
    weight that leaves the smallest norm. Then the column is scaled to norm one. Thus no
    column ever grows, the first k columns are done after k steps at most, and small
    errors are squared by a step.
    """
    info, gram = jnp.finfo(x.dtype), dot(x.T, x)
    # Keeps the Gram matrix positive definite under rounding.
    shift = 8 * float(info.eps) * len(gram)

    def scales(gram):
        diagonal = _columns_sum(gram * eye)  # A gather would need copies.
        return jax.lax.rsqrt(jnp.maximum(diagonal, shift))

    def step(_, carry):
        gram, total = carry
        scale = scales(gram)
        gram, total = gram * scale * scale.T, total * scale
        before = upper * gram
        image = dot(gram, before)
        slope, curvature = _columns_sum(before * before), _columns_sum(before * image)
        # Of columns of norm one no curvature is less than the slope squared.
        curvature = jnp.maximum(curvature, jnp.square(slope))
        weight = slope / (curvature + info.eps**2)
        factor = eye - weight * before
        return dot(factor.T, gram - weight * image), dot(total, factor)

    # Under `shard_map`, what a loop begins with varies over the mesh as its results do.
    total = jnp.zeros_like(gram) + eye
    gram, total = jax.lax.fori_loop(0, _STEPS, step, (gram + shift * eye, total))
    # What the shift took from columns that are orthonormal already is given back.
    return (1 + shift) ** 0.5 * total * scales(gram)


def _columns_sum(x):
    """Returns the sums of the columns, `(1, r)`."""
    return jnp.sum(x, axis=0, keepdims=True)


@jax.jit  # So that op-by-op use compiles the loop once.
def inverse_cholesky(gram: jax.Array) -> jax.Array:
    """Returns `L^-1` of `gram = L L^T`, `(r, r)`.

    With this small inverse the long side, which may be sharded, needs a matmul and no
    triangular solve. On CPUs it is plain JAX: batched LAPACK calls of jaxlib wait for
    the threads that they run on, and a program with several may hang.
    """
    return jax.lax.platform_dependent(gram, cpu=_by_elimination, default=_by_lapack)


def _by_elimination(gram):
    """Scales and subtracts rows of `[gram | I]` until it is `[L^T | L^-1]`."""
    size = gram.shape[0]

    def eliminate(j, rows):
        pivot = rows[j] / jnp.sqrt(rows[j, j])
        below = jnp.where(jnp.arange(size) > j, pivot[:size], 0)
        return (rows - below[:, None] * pivot[None]).at[j].set(pivot)

    rows = jnp.concatenate([gram, jnp.eye(size, dtype=gram.dtype)], axis=1)
    return jax.lax.fori_loop(0, size, eliminate, rows)[:, size:]


def _by_lapack(gram):
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    lower = jnp.linalg.cholesky(gram)
    return jax.scipy.linalg.solve_triangular(lower, identity, lower=True)


def shifted(gram, shift):
    return gram + shift * jnp.eye(gram.shape[0], dtype=gram.dtype)


def rounding(gram):
    """Returns what rounding may take from a Gram matrix's eigenvalues; never zero."""
    info = jnp.finfo(gram.dtype)
    return 8 * info.eps * jnp.trace(gram) + info.tiny
