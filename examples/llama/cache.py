"""The cache of keys and values, with which a new token costs one pass.

Rows of different lengths fill the same slots together: a shorter row begins in a later
slot, and slots before its beginning are never attended to. Shapes are as in ``model``,
with t slots.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from examples.llama import layout
from examples.llama.config import ModelConfig


class KeysValues(NamedTuple):
    """Keys and values of one layer, (b, t, k, e) each; keys are already rotated."""

    keys: jax.Array
    values: jax.Array

    def with_new(
        self, keys: jax.Array, values: jax.Array, slot: jax.Array
    ) -> "KeysValues":
        """Returns them with new ones, (b, s, k, e), in the slots from ``slot`` on."""
        new = KeysValues(keys, values)
        put = jax.lax.dynamic_update_slice_in_dim
        return jax.tree.map(lambda old, part: put(old, part, slot, 1), self, new)


class Cache(NamedTuple):
    """Keys and values of all layers: stacked or a list, as the parameters are."""

    layers: Any  # KeysValues
    begin: jax.Array  # (b,) int32, slot of each row's first token
    filled: jax.Array  # () int32, slots in use

    @staticmethod
    def empty(config: ModelConfig, begin: jax.Array, slots: int) -> "Cache":
        """Returns an empty cache for rows that begin in the slots ``begin`` (b,)."""
        shape = (len(begin), slots, config.kv_heads, config.head_dim)
        axes = ("batch", None, "heads", None)

        def zeros(*layers: int) -> jax.Array:
            x = jnp.zeros((*layers, *shape), config.compute_dtype)
            return layout.constrain(x, *("layers",) * len(layers), *axes)

        count = config.num_layers
        layers: Any = [KeysValues(zeros(), zeros()) for _ in range(count)]
        if config.scan_layers:
            layers = KeysValues(zeros(count), zeros(count))
        return Cache(layers, begin, jnp.zeros((), jnp.int32))

    def positions(self, count: int) -> jax.Array:
        """Returns (b, count) float32: positions in their rows of the next tokens."""
        slots = self.filled + jnp.arange(count)
        return (slots - self.begin[:, None]).astype(jnp.float32)

    def visible(self, count: int) -> jax.Array:
        """Returns (b, 1, count, t) bool: the slots that each new token attends to."""
        slots = jnp.arange(jax.tree.leaves(self.layers)[0].shape[-3])
        causal = slots <= self.filled + jnp.arange(count)[:, None]
        return (causal & (slots >= self.begin[:, None, None]))[:, None]
