"""Products, dtypes and random starts of factors."""

import jax
import jax.numpy as jnp


def dot(x, y):
    """A product of factors, in full precision also where matmuls default to less."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def random_columns(seed, q: int, rank: int) -> jax.Array:
    """Standard normal `(q, rank)` float32, the same for every leaf and slice."""
    return jax.random.normal(jax.random.key(seed), (rank, q), jnp.float32).T


def at_least_float32(*dtypes) -> jnp.dtype:
    """Their common dtype with float32, also where implicit promotion is forbidden."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes, jnp.float32)
