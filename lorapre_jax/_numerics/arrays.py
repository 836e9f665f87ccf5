"""Products, dtypes and random starts of factors."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def dot(x, y):
    """Multiplies factors in full precision, also if the default of matmuls is lower."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def random_columns(seed, q: int, rank: int) -> jax.Array:
    """Returns normal numbers `(q, rank)`, float32, that only the arguments decide."""
    return jax.random.normal(jax.random.key(seed), (rank, q), jnp.float32).T


def sketch_columns(seed, shape: tuple[int, ...], norm: float, dtype) -> jax.Array:
    """Returns uniform numbers `(q, rank)` of nearly this Frobenius norm.

    Only the arguments decide them. They mix the bits of a counter, since JAX's normal
    numbers take a hundred times as many operations, which every leaf would compile.
    """
    size = math.prod(shape)
    counter = jax.lax.iota(jnp.uint32, size).reshape(shape)
    bits = counter + _GOLDEN * jnp.asarray(seed).astype(jnp.uint32)
    for shift, factor in _MIXER:
        bits = (bits ^ (bits >> shift)) * factor
    odd = bits | 1  # None is zero, so that no entry of a gradient is overlooked.
    signed = jax.lax.bitcast_convert_type(odd, jnp.int32).astype(dtype)
    return signed * (2.0**-31 * norm * (3 / size) ** 0.5)


# The last steps of Austin Appleby's MurmurHash3, and the odd number nearest to 2^32
# divided by the golden ratio, which tells nearby seeds apart.
_MIXER = ((16, np.uint32(0x85EBCA6B)), (13, np.uint32(0xC2B2AE35)))
_GOLDEN = np.uint32(0x9E3779B9)


def at_least_float32(*dtypes) -> jnp.dtype:
    """Returns their common dtype with float32, also if promotion is set to strict."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes, jnp.float32)
