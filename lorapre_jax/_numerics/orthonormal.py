"""Orthonormal bases through small Gram matrices.

These are sums over the long side, which a sharded factor can reduce; all else are
products of `(r, r)`.
"""

import jax
import jax.numpy as jnp

from lorapre_jax._numerics.arrays import dot
from lorapre_jax._numerics.norms import unit_columns


def orthonormal_columns(x: jax.Array) -> jax.Array:
    """An orthonormal basis `(n, r)` of the columns of `x: (n, r)`, n >= r.

    That of Gram and Schmidt: column k is what column k of `x` has beside the columns
    before it, at norm one. Zero gives zero. Directions that only rounding tells from
    zero give columns of any norm up to one, orthogonal to the others but nearly; what
    they are multiplied with is as small.
    """
    x = unit_columns(x)
    x = jax.lax.fori_loop(0, _PASSES, lambda _, x: dot(x, _triangular(x)), x)
    # What would still be counted twice is left out.
    overlap = jnp.sum(jnp.square(jnp.triu(dot(x.T, x), 1)), axis=0)
    return jnp.where(overlap < _OVERLAP, x, 0)


# A pass tells columns apart as far as the rounding of its Gram matrix lets it. These
# are enough for columns with a condition of 1e5, such as those of the first gradients at
# full rank; later ones change little from step to step.
_PASSES, _STEPS = 5, 4
_OVERLAP = 1e-4


def _triangular(x):
    """Upper triangular T with `x T` nearly orthonormal, for columns of norm at most 1.

    By products alone, for a factorisation is a chain of r small steps. Each step takes
    from every column at once what it has along those before it, with the weight that
    leaves the least of it (they need not be orthogonal yet), and scales it to norm one.
    So none ever grows; the first k are done after k steps at most; and what is small is
    squared by a step.
    """
    info, rank = jnp.finfo(x.dtype), x.shape[1]
    gram, eye = dot(x.T, x), jnp.eye(rank, dtype=x.dtype)
    # Keeps the Gram matrix positive definite under rounding.
    shift = 8 * info.eps * rank

    def scales(gram):
        diagonal = jnp.sum(gram * eye, axis=0)  # No gather, which takes copies.
        return jax.lax.rsqrt(jnp.maximum(diagonal, shift))

    def step(_, carry):
        gram, total = carry
        scale = scales(gram)
        gram, total = gram * scale * scale[:, None], total * scale
        before = jnp.triu(gram, 1)
        along = dot(gram, before)
        slope, curvature = jnp.sum(before * before, 0), jnp.sum(before * along, 0)
        # Of columns of norm one no curvature is less than the slope squared.
        curvature = jnp.maximum(curvature, jnp.square(slope))
        weight = slope / (curvature + info.eps**2)
        factor = eye - weight * before
        return dot(factor.T, gram - weight * along), dot(total, factor)

    # Under `shard_map`, what a loop begins with varies over the mesh as its results do.
    total = jnp.zeros_like(gram) + eye
    gram, total = jax.lax.fori_loop(0, _STEPS, step, (gram + shift * eye, total))
    # What the shift took from columns that are orthonormal already is given back.
    return jnp.sqrt(1 + shift) * total * scales(gram)


@jax.jit  # So that op-by-op use compiles the loop once.
def inverse_cholesky(gram: jax.Array) -> jax.Array:
    """`L^-1` of `gram = L L^T`, `(r, r)`.

    With this small inverse the long side, which may be sharded, sees a matmul and no
    triangular solve. On CPUs it is plain JAX: batched LAPACK calls of jaxlib
    wait for the threads that they run on, and a program with several may hang.
    """
    return jax.lax.platform_dependent(gram, cpu=_by_elimination, default=_by_lapack)


def _by_elimination(gram):
    """Rows of `[gram | I]` are scaled and subtracted until it is `[L^T | L^-1]`."""
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
    """What rounding alone may take from a Gram matrix's eigenvalues; never zero."""
    info = jnp.finfo(gram.dtype)
    return 8 * info.eps * jnp.trace(gram) + info.tiny
