"""Products, dtypes and random starts of factors."""

import jax
import jax.numpy as jnp


def dot(x, y):
    """Multiplies factors in full precision, also if the default of matmuls is lower."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def random_columns(seed, q: int, rank: int) -> jax.Array:
    """Returns normal numbers `(q, rank)`, float32, that only the arguments decide."""
    return jax.random.normal(jax.random.key(seed), (rank, q), jnp.float32).T


def at_least_float32(*dtypes) -> jnp.dtype:
    """Returns their common dtype with float32, also if promotion is set to strict."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes, jnp.float32)
