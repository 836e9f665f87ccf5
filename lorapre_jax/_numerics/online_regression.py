"""The low-rank moving average of ONE matrix: the heart of the library.

An exponential moving average `M <- b M + (1-b) T` is a gradient step of size `1-b` on
`|M - T|^2 / 2`: an online linear regression of the target `T` (LoRA-Pre, arXiv
2602.24283, section 3). With `M = B A`, `B: (p, r)`, `A: (r, q)`, a step moves the two
factors instead. Code holds `left = B` and `right = A^T: (q, r)`, both tall. There are
two such steps:

    subspace    one step of subspace iteration on X X^T, X = b B A + (1-b) T:
                B' = orth(X X^T B), A' = B'^T X
                (the idea of PowerSGD and Dion, but from the left factor: whichever
                of rows and columns lasts while the other changes is found). B' A' is
                the projection of X on the columns of X X^T B, hence X itself
                where r = min(p, q).
    jacobi      B' = (1-y) B + y T A^+,  A' = (1-y) A + y B^+ T,  1-y = sqrt(b)
                (Theorem 3.1; A^+ = A^T (A A^T + d)^-1, B^+ = (B^T B + d)^-1 B^T)

Every inverse and every basis goes through `(r, r)` Gram matrices: sums over p or q,
which a sharded factor can reduce.
"""

import jax
import jax.numpy as jnp

from lorapre_jax._numerics.arrays import dot
from lorapre_jax._numerics.norms import normalized
from lorapre_jax._numerics.orthonormal import (
    inverse_cholesky,
    orthonormal_columns,
    rounding,
    shifted,
)

Factors = tuple[jax.Array, jax.Array]

# Share of random directions in what `subspace` sketches with: enough to bring back a
# direction that died out and to keep the sketch well-conditioned in float32, too little
# to disturb the living ones.
_NOISE = 1e-3

_DAMPING = 1e-6  # Of `jacobi`, d above (Appendix C.1).


def subspace(left, right, target, decay, noise) -> tuple[Factors, jax.Array]:
    """The new factors, and `T^T B'`, `(q, r)`.

    `left` is zero, or orthonormal as far as it has been found; the sketch of a zero
    one is all `noise`, normal (q, r).
    """
    columns = decay * right + (1 - decay) * (target.T @ left)  # X^T B
    # No basis of these: it would differ by a triangular factor, which changes none of
    # the columns of `orthonormal_columns`.
    v = normalized(columns) + _NOISE * normalized(noise)
    y = decay * (left @ dot(right.T, v)) + (1 - decay) * (target @ v)  # X V
    new = orthonormal_columns(y)
    along = target.T @ new
    return (new, decay * dot(right, dot(left.T, new)) + (1 - decay) * along), along


def jacobi(left, right, target, decay) -> Factors:
    y = 1 - jnp.sqrt(decay)
    new = (1 - y) * left + y * _times_pinv(target, right)
    return new, (1 - y) * right + y * _times_pinv(target.T, left)


def _times_pinv(target, right) -> jax.Array:
    """`T A^T (A A^T + d I)^-1`, shapes `(p, q), (q, r) -> (p, r)`."""
    gram = dot(right.T, right)
    inverse = inverse_cholesky(shifted(gram, _DAMPING + rounding(gram)))
    return dot(dot(target @ right, inverse.T), inverse)
