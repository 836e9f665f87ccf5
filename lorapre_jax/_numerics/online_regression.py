"""The low-rank moving average of ONE matrix: the heart of the library.

An exponential moving average `m <- b m + (1-b) T` is a gradient step of size `1-b` on
`|m - T|^2 / 2`: an online linear regression of the target `T` (LoRA-Pre, arXiv
2602.24283, section 3). With `m = B A`, `B: (p, r)`, `A: (r, q)`, a step moves the two
factors instead. The code holds `left = B` and `right = A^T: (q, r)`, both tall.

An orthonormal B moves by one step of subspace iteration from where it was, towards the
leading eigenvectors of one of two matrices:

    subspace    X X^T, with X = b B A + (1-b) T: the leading directions of the average.
                B' = orth(X X^T B). This is the idea of PowerSGD and Dion, but it starts
                from the left factor, and so it finds whichever of rows and columns
                lasts while the other changes. If r = min(p, q), B' B'^T X is X itself.
    covariance  C = b B diag(values) B^T + (1-b) T T^T: the leading directions of the
                targets, one by one. B' = orth(C B). It is an average that is kept as
                thin factors too, as a second moment of the columns.

    project     Then A' = B'^T X.

The paper's step needs no orthonormal factor:

    jacobi      B' = (1 - eta) B + eta T A^+,  A' = (1 - eta) A + eta B^+ T,
                1 - eta = sqrt(b), A^+ = A^T (A A^T + damping)^-1,
                B^+ = (B^T B + damping)^-1 B^T (Theorem 3.1).

Every inverse and every basis goes through `(r, r)` Gram matrices: sums over p or q,
which a sharded factor can reduce.
"""

import jax
import jax.numpy as jnp

from lorapre_jax._numerics.arrays import dot, sketch_columns
from lorapre_jax._numerics.norms import inverse_root, largest
from lorapre_jax._numerics.orthonormal import (
    gram_schmidt,
    inverse_cholesky,
    rounding,
    shifted,
)

Factors = tuple[jax.Array, jax.Array]

# Norm of the random directions in a sketch whose norm is about one: enough to bring
# back a direction that vanished and to keep the sketch well-conditioned in float32, too
# little to disturb the others.
_NOISE = 1e-3
_DAMPING = 1e-6  # Of `jacobi` (Appendix C.1).


def subspace(left, right, target, decay, seed) -> jax.Array:
    """Returns B', `(p, r)`, of the average's leading directions.

    Columns of `left` are orthonormal or zero. The sketch is `X^T B` at norm one plus a
    little noise, which alone is left if B is zero.
    """
    weight, old = 1 - decay, decay * right
    # One scale for X, so that no square of what follows under- or overflows.
    scale = largest(target, old)
    columns = (old + weight * (target.T @ left)) / scale  # X^T B
    # An orthonormal basis of them would differ by a triangular factor, which changes
    # nothing: `gram_schmidt` takes columns in order.
    v = columns * inverse_root(jnp.sum(jnp.square(columns)))
    v += _noise(seed, v)
    return gram_schmidt((left @ (old.T @ v) + weight * (target @ v)) / scale)


def covariance(left, rms, target, decay, seed) -> jax.Array:
    """Returns B', `(p, r)`, of the targets' leading directions, the strongest first.

    Columns of `left` are orthonormal or zero; `rms` are the root mean squares of the
    targets along them, `(r,)`. The sketch is `T^T B` plus a little noise, which alone
    is left if B is zero.
    """
    # One scale for T, so that no square of what follows under- or overflows.
    scale = largest(target, rms)
    values = target.shape[1] * jnp.square(rms / scale)
    columns = target.T @ left
    v = (columns + largest(target) * _noise(seed, columns)) / scale
    return gram_schmidt(decay * left * values + (1 - decay) / scale * (target @ v))


def _noise(seed, columns):
    # The same in all leaves of a shape, but an array that they shared would have one
    # sharding, which the compiler would carry over to their factors.
    return sketch_columns(seed, columns.shape, _NOISE, columns.dtype)


def project(left, right, new, target, decay) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns A'^T; `T^T B'`, both `(q, r)`; and what B' misses of B, `(p, r)`."""
    components = target.T @ new
    overlap = dot(new.T, left)
    moved = dot(decay * right, overlap.T) + (1 - decay) * components
    return moved, components, left - dot(new, overlap)


def jacobi(left, right, target, decay) -> Factors:
    eta = 1 - jnp.sqrt(decay)
    new = (1 - eta) * left + eta * _times_pinv(target, right)
    return new, (1 - eta) * right + eta * _times_pinv(target.T, left)


def _times_pinv(target, right) -> jax.Array:
    """Returns `T A^T (A A^T + damping I)^-1`, shapes `(p, q), (q, r) -> (p, r)`."""
    gram = dot(right.T, right)
    inverse = inverse_cholesky(shifted(gram, _DAMPING + rounding(gram)))
    return dot(dot(target @ right, inverse.T), inverse)
