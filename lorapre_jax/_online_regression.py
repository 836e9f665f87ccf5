"""The low-rank moving average of ONE matrix: the heart of the library.

An exponential moving average `M <- b M + (1-b) T` is a gradient step of size `1-b` on
`|M - T|^2 / 2`: an online linear regression of the target `T` (LoRA-Pre, arXiv
2602.24283, section 3). With `M = B A`, `B: (p, r)`, `A: (r, q)`, a step moves the two
factors instead. Code holds `left = B` and `right = A^T: (q, r)`, both tall. There are
two such steps:

    subspace    one step of subspace iteration on X X^T, X = b B A + (1-b) T:
                V = orth((B^T X)^T), B' = orth(X V), A' = B'^T X
                (the idea of PowerSGD and Dion, but from the left factor: whichever
                of rows and columns lasts while the other changes is found). B' A' is
                the projection of X on the columns of X V, hence X itself where
                r = min(p, q).
    jacobi      B' = (1-y) B + y T A^+,  A' = (1-y) A + y B^+ T,  1-y = sqrt(b)
                (Theorem 3.1; A^+ = A^T (A A^T + d)^-1, B^+ = (B^T B + d)^-1 B^T)

Every inverse and every basis goes through `(r, r)` Gram matrices: sums over p or q,
which a sharded factor can reduce, followed by a small Cholesky factorisation.
"""

import jax
import jax.numpy as jnp

Factors = tuple[jax.Array, jax.Array]

# Share of random directions in the basis that `subspace` sketches with: enough to
# bring back a direction that died out and to keep the basis well-conditioned in
# float32, too little to disturb the living ones.
_NOISE = 1e-3

_DAMPING = 1e-6  # Of `jacobi`, d above (Appendix C.1).


def subspace(left, right, target, decay, noise) -> tuple[Factors, jax.Array]:
    """The new factors, and `T^T B'`, `(q, r)`.

    `left` is zero, or orthonormal as far as it has been found; the sketch of a zero
    one is all `noise`, normal (q, r).
    """
    columns = decay * right + (1 - decay) * (target.T @ left)  # X^T B
    directions = _normalized(columns) + _NOISE * _normalized(noise)
    v = orthonormal_columns(directions)
    y = decay * (left @ dot(right.T, v)) + (1 - decay) * (target @ v)  # X V
    new = orthonormal_columns(y)
    along = target.T @ new
    return (new, decay * dot(right, dot(left.T, new)) + (1 - decay) * along), along


def jacobi(left, right, target, decay) -> Factors:
    y = 1 - jnp.sqrt(decay)
    new = (1 - y) * left + y * _times_pinv(target, right)
    return new, (1 - y) * right + y * _times_pinv(target.T, left)


def orthonormal_columns(x: jax.Array, passes: int = 3) -> jax.Array:
    """An orthonormal basis `(n, r)` of the columns of `x: (n, r)`, n >= r.

    Shifted Cholesky QR (Fukaya et al., 2020): each pass divides by the Cholesky factor
    of the Gram matrix, which a shift keeps positive definite under rounding; what the
    shift takes from columns that are orthonormal already is given back. Zero gives
    zero. Directions that only rounding tells from zero give columns of any norm up to
    one, orthogonal to the others but nearly; what they are multiplied with is as small.
    """
    x = _normalized(x)
    for _ in range(passes):
        gram = dot(x.T, x)
        shift = _rounding(gram)
        inverse = inverse_cholesky(_shifted(gram, shift))
        x = jnp.sqrt(1 + shift) * dot(x, inverse.T)
    return x


def _times_pinv(target, right) -> jax.Array:
    """`T A^T (A A^T + d I)^-1`, shapes `(p, q), (q, r) -> (p, r)`."""
    gram = dot(right.T, right)
    inverse = inverse_cholesky(_shifted(gram, _DAMPING + _rounding(gram)))
    return dot(dot(target @ right, inverse.T), inverse)


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


def _shifted(gram, shift):
    return gram + shift * jnp.eye(gram.shape[0], dtype=gram.dtype)


def _rounding(gram):
    """What rounding alone may take from a Gram matrix's eigenvalues; never zero."""
    info = jnp.finfo(gram.dtype)
    return 8 * info.eps * jnp.trace(gram) + info.tiny


def _normalized(x):
    """`x` at Frobenius norm one, free of inner under- and overflow; zero stays zero."""
    x = x / _scale(x)
    norm = root(jnp.sum(jnp.square(x)))
    return x / jnp.where(norm > 0, norm, 1)


def root_mean_square(x, axis=None):
    """`sqrt(mean(x^2))`, free of inner under- and overflow."""
    scale = _scale(x)
    return scale * root(jnp.mean(jnp.square(x / scale), axis))


def root(x):
    """`sqrt(x)`, but of derivative zero at zero, so that updates have one."""
    is_zero = x == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, x)))


def hypot(x, y):
    """`sqrt(x^2 + y^2)`, likewise."""
    is_zero = (x == 0) & (y == 0)
    return jnp.where(is_zero, 0, jnp.hypot(jnp.where(is_zero, 1, x), y))


def _scale(x):
    largest = jnp.max(jnp.abs(x))
    return jnp.where(largest > 0, largest, 1)


def dot(x, y):
    """A product of factors, in full precision also where matmuls default to less."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
