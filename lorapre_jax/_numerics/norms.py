"""Norms and roots that neither under- nor overflow inside, with derivatives at zero.

Arrays are divided by their largest magnitude before they are squared, so that no square
exceeds one. Entries below 1e-10 of the largest count for less than they are.
"""

import functools

import jax
import jax.numpy as jnp


def largest(*arrays):
    """Returns the largest magnitude in the arrays, or one if all are zero.

    It is a constant to derivatives. What is computed at this scale and scaled back does
    not depend on the scale, and the derivative of a maximum is NaN where the compiler
    rounds the array in two ways.
    """
    found = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x)) for x in arrays])
    return jax.lax.stop_gradient(jnp.where(found > 0, found, 1))


def inverse_root(x):
    """Returns `1 / sqrt(x)` of a sum of squares, finite at zero with its derivative."""
    return jax.lax.rsqrt(x + jnp.finfo(x.dtype).eps ** 3)


def root(x):
    """Returns `sqrt(x)` with a derivative of zero at zero, so that updates have one."""
    is_zero = x == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, x)))


def relative(x):
    """Divides `x` by its root mean square; zero stays zero."""
    x = x / largest(x)
    return x * inverse_root(jnp.mean(jnp.square(x)))


def root_mean_square(x, axis=None):
    scale = largest(x)
    return scale * root(jnp.mean(jnp.square(x / scale), axis))


def frobenius_norm(*arrays: jax.Array) -> jax.Array:
    """Returns the norm of all arrays together."""
    scale = largest(*arrays)
    return scale * root(sum(jnp.sum(jnp.square(x / scale)) for x in arrays))


def divide_by_norm(
    x: jax.Array, norm: jax.Array, eps: jax.typing.ArrayLike
) -> jax.Array:
    """Returns `x / (norm + eps)`, or zero if both are zero."""
    norm = norm + jnp.asarray(eps, x.dtype)
    return x / jnp.where(norm > 0, norm, 1)
