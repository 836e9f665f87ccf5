"""Llama in Flax NNX: RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Kernels are (in, out), and nothing has a bias. Shapes use

    b batch   s sequence   d width   f ffn_width   h query heads   k kv heads
    e head_dim = d / h     v vocabulary            l layers

and the parameter tree is

    embed/embedding                       (v, d)
    layers/attention/{q,o}/kernel         (l, d, d)
    layers/attention/{k,v}/kernel         (l, d, k e)
    layers/mlp/{gate,up}/kernel           (l, d, f)
    layers/mlp/down/kernel                (l, f, d)
    layers/{attention_norm,mlp_norm}/scale  (l, d)
    norm/scale                            (d,)
    head/kernel                           (d, v)   unless ``tie_embeddings``

With ``scan_layers=False`` the leading axis becomes ``layers/<i>/``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from examples.llama import layout
from examples.llama.cache import Cache, KeysValues
from examples.llama.config import ModelConfig

Tables = tuple[jax.Array, jax.Array]

_REMAT_POLICIES = {
    "all": jax.checkpoint_policies.nothing_saveable,
    "all but products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
_init = nnx.initializers.normal(stddev=0.02)


class Linear(nnx.Linear):
    """``x @ kernel``, as one product of two matrices.

    Over (b, s, d) the gradient of the kernel would contract two axes, for which XLA's
    CPU compiler copies both sides first: a quarter of the step of a small model.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _linear(fan_in: int, fan_out: int, config: ModelConfig, rngs: nnx.Rngs) -> Linear:
    return Linear(
        fan_in,
        fan_out,
        use_bias=False,
        dtype=config.compute_dtype,
        param_dtype=config.param_dtype,
        kernel_init=_init,
        rngs=rngs,
    )


def _by_row(x: jax.Array) -> jax.Array:
    """Returns (b, s, d) sharded by rows only."""
    return layout.constrain(x, "batch", None, None)


class RMSNorm(nnx.Module):
    """``x / rms(x) * scale``, computed in float32, returned in ``x``'s dtype."""

    def __init__(self, config: ModelConfig):
        self.scale = nnx.Param(jnp.ones(config.width, config.param_dtype))
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(mean_square + self.eps) * self.scale[...]
        return y.astype(x.dtype)


def rotary_tables(positions: jax.Array, head_dim: int, base: float) -> Tables:
    """Cosines and sines at ``positions`` (..., s), each (..., s, 1, e/2) float32."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions[..., None, None] * base**-exponents
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, tables: Tables) -> jax.Array:
    """Rotates feature pairs (i, i + e/2) of ``x`` (b, s, h, e) by their position."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Place(NamedTuple):
    """The positions of the current tokens, the same for all layers."""

    tables: Tables
    slot: Any = None  # () int32, of the first of them in a cache
    visible: Any = None  # (b, 1, s, t) bool, the slots they look at


class Attention(nnx.Module):
    """Causal self-attention; query head i reads kv head i // (h / k).

    Given keys and values of earlier tokens, it also returns them with the new ones.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d = config.width
        self.head_dim = config.head_dim
        self.q = _linear(d, d, config, rngs)
        self.k = _linear(d, config.kv_heads * config.head_dim, config, rngs)
        self.v = _linear(d, config.kv_heads * config.head_dim, config, rngs)
        self.o = _linear(d, d, config, rngs)

    def __call__(
        self, x: jax.Array, place: Place, kept: KeysValues | None
    ) -> tuple[jax.Array, KeysValues | None]:
        def heads(y: jax.Array) -> jax.Array:
            y = y.reshape(*y.shape[:-1], -1, self.head_dim)
            return layout.constrain(y, "batch", None, "heads", None)

        q = rotate(heads(self.q(x)), place.tables)
        k = rotate(heads(self.k(x)), place.tables)
        v = heads(self.v(x))
        if kept is None:
            mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        else:
            kept = kept.with_new(k, v, place.slot)
            mixed = jax.nn.dot_product_attention(q, *kept, mask=place.visible)
        return self.o(mixed.reshape(x.shape)), kept


class MLP(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, f = config.width, config.ffn_width
        self.gate = _linear(d, f, config, rngs)
        self.up = _linear(d, f, config, rngs)
        self.down = _linear(f, d, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nnx.silu(self.gate(x)) * self.up(x)
        return self.down(layout.constrain(hidden, "batch", None, "ffn"))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream (b, s, d)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x: jax.Array, place: Place, kept: KeysValues | None
    ) -> tuple[jax.Array, KeysValues | None]:
        mixed, kept = self.attention(self.attention_norm(x), place, kept)
        x = _by_row(x + mixed)
        return _by_row(x + self.mlp(self.mlp_norm(x))), kept


class Llama(nnx.Module):
    """Token ids (b, s) int32 to logits (b, s, v) float32."""

    def __init__(self, config: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs):
        d = config.width
        self.config = config
        self.embed = nnx.Embed(
            vocab_size,
            d,
            dtype=config.compute_dtype,
            param_dtype=config.param_dtype,
            embedding_init=_init,
            rngs=rngs,
        )
        self.layers: Any  # one stacked Block, or a list of them
        if config.scan_layers:
            make_stack = nnx.vmap(lambda rngs: Block(config, rngs=rngs))
            self.layers = make_stack(rngs.split(config.num_layers))
        else:
            blocks = [Block(config, rngs=rngs) for _ in range(config.num_layers)]
            self.layers = nnx.List(blocks)
        self.norm = RMSNorm(config)
        if not config.tie_embeddings:
            self.head = _linear(d, vocab_size, config, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.logits(self.features(tokens))

    def features(self, tokens: jax.Array) -> jax.Array:
        """Returns the head's inputs, (b, s, d), for tokens (b, s) int32."""
        positions = jnp.arange(tokens.shape[-1], dtype=jnp.float32)
        x, _ = self._through_layers(tokens, Place(self._tables(positions)), None)
        return self.norm(x)

    def logits(self, features: jax.Array) -> jax.Array:
        """Returns logits (b, s, v) float32 for features (b, s, d)."""
        head = self._tied_head if self.config.tie_embeddings else self.head
        logits = layout.constrain(head(features), "batch", None, "vocab")
        return logits.astype(jnp.float32)

    def extend(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Returns logits (b, v) after ``tokens`` (b, s), which follow the cache's.

        The cache must have enough free slots.
        """
        count = tokens.shape[-1]
        tables = self._tables(cache.positions(count))
        place = Place(tables, cache.filled, cache.visible(count))
        x, kept = self._through_layers(tokens, place, cache.layers)
        logits = self.logits(self.norm(x[:, -1:]))[:, 0]
        return logits, Cache(kept, cache.begin, cache.filled + count)

    def _tables(self, positions: jax.Array) -> Tables:
        return rotary_tables(positions, self.config.head_dim, self.config.rope_base)

    def _tied_head(self, features: jax.Array) -> jax.Array:
        """Computes one product of two matrices, like ``Linear``."""
        logits = self.embed.attend(features.reshape(-1, features.shape[-1]))
        return logits.reshape(*features.shape[:-1], -1)

    def _through_layers(
        self, tokens: jax.Array, place: Place, kept: Any
    ) -> tuple[jax.Array, Any]:
        """Returns features (b, s, d) before the last norm, and the cache's layers."""

        def through(x: jax.Array, block: Block, kept: KeysValues | None):
            return block(x, place, kept)

        if self.config.remat != "nothing":
            policy = _REMAT_POLICIES[self.config.remat]
            # Under scan the loop itself keeps XLA from undoing it.
            through = nnx.remat(
                through, policy=policy, prevent_cse=not self.config.scan_layers
            )
        x = _by_row(self.embed(tokens))
        if self.config.scan_layers:
            axes = {"in_axes": (nnx.Carry, 0, 0), "out_axes": (nnx.Carry, 0)}
            return nnx.scan(through, **axes)(x, self.layers, kept)
        kept = [None] * len(self.layers) if kept is None else list(kept)
        for i, block in enumerate(self.layers):
            x, kept[i] = through(x, block, kept[i])
        return x, kept
