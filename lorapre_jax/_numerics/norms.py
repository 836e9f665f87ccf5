"""Norms and roots free of inner under- and overflow, and with derivatives at zero.

Squares are taken of arrays over their largest entry, so none exceeds one.
"""

import functools

import jax
import jax.numpy as jnp


def largest(*arrays):
    """The largest magnitude in any of them; one where all are zero."""
    found = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x)) for x in arrays])
    return jnp.where(found > 0, found, 1)


def inverse_root(x):
    """`1 / sqrt(x)` of sums of such squares; finite at zero, as its derivative is."""
    return jax.lax.rsqrt(x + jnp.finfo(x.dtype).eps ** 3)


def root(x):
    """`sqrt(x)`, but of derivative zero at zero, so that updates have one."""
    is_zero = x == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, x)))


def normalized(x):
    """`x` at Frobenius norm one; zero stays zero."""
    x = x / largest(x)
    return x * inverse_root(jnp.sum(jnp.square(x)))


def unit_columns(x):
    """Each column at norm one; zero stays zero."""
    x = x / largest(x)
    return x * inverse_root(jnp.sum(jnp.square(x), axis=0))


def relative(x):
    """`x` over its root mean square; zero stays zero."""
    x = x / largest(x)
    return x * inverse_root(jnp.mean(jnp.square(x)))


def root_mean_square(x, axis=None):
    scale = largest(x)
    return scale * root(jnp.mean(jnp.square(x / scale), axis))


def hypot(x, y):
    """`sqrt(x^2 + y^2)`."""
    scale = largest(x, y)
    return scale * root(jnp.square(x / scale) + jnp.square(y / scale))


def frobenius_norm(x: jax.Array) -> jax.Array:
    return root_mean_square(x) * jnp.sqrt(jnp.asarray(x.size, x.dtype))


def divide_by_norm(
    x: jax.Array, norm: jax.Array, eps: jax.typing.ArrayLike
) -> jax.Array:
    """`x / (norm + eps)`, zero where that is no number."""
    norm = norm + jnp.asarray(eps, x.dtype)
    return x / jnp.where(norm > 0, norm, 1)
