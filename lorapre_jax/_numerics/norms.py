"""Norms and roots free of inner under- and overflow, and with derivatives at zero."""

import jax
import jax.numpy as jnp


def normalized(x):
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


def relative(x):
    """`x` over its root mean square; zero stays zero."""
    total = root_mean_square(x)
    return x / jnp.where(total > 0, total, 1)


def divide_by_norm(
    x: jax.Array, norm: jax.Array, eps: jax.typing.ArrayLike
) -> jax.Array:
    """`x / (norm + eps)`, zero where that is no number."""
    norm = norm + jnp.asarray(eps, x.dtype)
    return x / jnp.where(norm > 0, norm, 1)


def frobenius_norm(x: jax.Array) -> jax.Array:
    """Free of inner under- and overflow."""
    return root_mean_square(x) * jnp.sqrt(jnp.asarray(x.size, x.dtype))
