"""The low-rank moving average of ONE matrix: the heart of the library.

An exponential moving average `m <- b m + (1-b) T` is a gradient step of size `1-b` on
`|m - T|^2 / 2`: an online linear regression of the target `T` (LoRA-Pre, arXiv
2602.24283, section 3). With `m = B A`, `B: (p, r)`, `A: (r, q)`, a step moves the two
factors instead. The code holds `left = B` and `right = A^T: (q, r)`, both tall. There
are two such steps:

    subspace    One step of subspace iteration on X X^T, with X = b B A + (1-b) T:
                B' = orth(X X^T B), A' = B'^T X.
                This is the idea of PowerSGD and Dion, but it starts from the left
                factor, and so it finds whichever of rows and columns lasts while the
                other changes. B' A' is the projection of X on the columns of X X^T B.
                If r = min(p, q), this is X itself.
    jacobi      B' = (1 - eta) B + eta T A^+,  A' = (1 - eta) A + eta B^+ T,
                1 - eta = sqrt(b), A^+ = A^T (A A^T + damping)^-1,
                B^+ = (B^T B + damping)^-1 B^T (Theorem 3.1).

Every inverse and every basis goes through `(r, r)` Gram matrices: sums over p or q,
which a sharded factor can reduce.
"""

import jax
import jax.numpy as jnp

from lorapre_jax._numerics.arrays import dot
from lorapre_jax._numerics.norms import inverse_root, largest
from lorapre_jax._numerics.orthonormal import (
    gram_schmidt,
    inverse_cholesky,
    rounding,
    shifted,
)

Factors = tuple[jax.Array, jax.Array]

_DAMPING = 1e-6  # Of `jacobi` (Appendix C.1).


def subspace(left, right, target, decay, noise) -> tuple[Factors, jax.Array, jax.Array]:
    """Returns the new factors; `T^T B'`, `(q, r)`; and what B' misses of B, `(p, r)`.

    Columns of `left` are orthonormal or zero. The sketch is `X^T B` at norm one plus
    the `noise`, small and random `(q, r)`, which alone is left if B is zero.
    """
    weight, old = 1 - decay, decay * right
    # One scale for X, so that no square of what follows under- or overflows.
    scale = largest(target, old)
    columns = (old + weight * (target.T @ left)) / scale  # X^T B
    # An orthonormal basis of them would differ by a triangular factor, which changes
    # nothing: `gram_schmidt` takes columns in order.
    v = columns * inverse_root(jnp.sum(jnp.square(columns))) + noise
    y = (left @ (old.T @ v) + weight * (target @ v)) / scale  # X V
    new = gram_schmidt(y)
    components = target.T @ new
    overlap = dot(new.T, left)
    moved = dot(old, overlap.T) + weight * components
    return (new, moved), components, left - dot(new, overlap)


def jacobi(left, right, target, decay) -> Factors:
    eta = 1 - jnp.sqrt(decay)
    new = (1 - eta) * left + eta * _times_pinv(target, right)
    return new, (1 - eta) * right + eta * _times_pinv(target.T, left)


def _times_pinv(target, right) -> jax.Array:
    """Returns `T A^T (A A^T + damping I)^-1`, shapes `(p, q), (q, r) -> (p, r)`."""
    gram = dot(right.T, right)
    inverse = inverse_cholesky(shifted(gram, _DAMPING + rounding(gram)))
    return dot(dot(target @ right, inverse.T), inverse)
