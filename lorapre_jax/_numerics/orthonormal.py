"""Orthonormal bases through small Gram matrices.

These are sums over the long side, which a sharded factor can reduce, followed by a
Cholesky factorisation of `(r, r)`.
"""

import jax
import jax.numpy as jnp

from lorapre_jax._numerics.arrays import dot
from lorapre_jax._numerics.norms import normalized


def orthonormal_columns(x: jax.Array, passes: int = 3) -> jax.Array:
    """An orthonormal basis `(n, r)` of the columns of `x: (n, r)`, n >= r.

    Shifted Cholesky QR (Fukaya et al., 2020): each pass divides by the Cholesky factor
    of the Gram matrix, which a shift keeps positive definite under rounding; what the
    shift takes from columns that are orthonormal already is given back. Zero gives
    zero. Directions that only rounding tells from zero give columns of any norm up to
    one, orthogonal to the others but nearly; what they are multiplied with is as small.
    """
    x = normalized(x)
    for _ in range(passes):
        gram = dot(x.T, x)
        shift = rounding(gram)
        inverse = inverse_cholesky(shifted(gram, shift))
        x = jnp.sqrt(1 + shift) * dot(x, inverse.T)
    return x


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
