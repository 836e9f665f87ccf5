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
    head/kernel                           (d, v)

With ``scan_layers=False`` the leading axis becomes ``layers/<i>/``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from examples.llama import layout
from examples.llama.config import ModelConfig

Params = dict[str, Any]

NORM_EPS = 1e-6
ROPE_BASE = 1e4
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
    """(b, s, d), divided by its rows alone."""
    return layout.constrain(x, "batch", None, None)


class RMSNorm(nnx.Module):
    """``x / rms(x) * scale``, computed in float32, returned in ``x``'s dtype."""

    def __init__(self, config: ModelConfig):
        self.scale = nnx.Param(jnp.ones(config.width, config.param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(mean_square + NORM_EPS) * self.scale[...]
        return y.astype(x.dtype)


def rotary_tables(seq_len: int, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles, each (s, 1, e/2) float32."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    positions = jnp.arange(seq_len, dtype=jnp.float32)
    angles = positions[:, None, None] * ROPE_BASE**-exponents
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn feature pairs (i, i + e/2) of ``x`` (b, s, h, e) by their position."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention; query head i reads kv head i // (h / k)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d = config.width
        self.head_dim = config.head_dim
        self.q = _linear(d, d, config, rngs)
        self.k = _linear(d, config.kv_heads * config.head_dim, config, rngs)
        self.v = _linear(d, config.kv_heads * config.head_dim, config, rngs)
        self.o = _linear(d, d, config, rngs)

    def __call__(self, x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
        def heads(y: jax.Array) -> jax.Array:
            y = y.reshape(*y.shape[:-1], -1, self.head_dim)
            return layout.constrain(y, "batch", None, "heads", None)

        q = rotate(heads(self.q(x)), tables)
        k = rotate(heads(self.k(x)), tables)
        mixed = jax.nn.dot_product_attention(q, k, heads(self.v(x)), is_causal=True)
        return self.o(mixed.reshape(x.shape))


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

    def __call__(self, x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
        x = _by_row(x + self.attention(self.attention_norm(x), tables))
        return _by_row(x + self.mlp(self.mlp_norm(x)))


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
        self.head = _linear(d, vocab_size, config, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.logits(self.features(tokens))

    def features(self, tokens: jax.Array) -> jax.Array:
        """(b, s) int32 to what the head reads, (b, s, d)."""
        tables = rotary_tables(tokens.shape[-1], self.config.head_dim)
        x = _by_row(self.embed(tokens))
        return self.norm(self._through_layers(x, tables))

    def logits(self, features: jax.Array) -> jax.Array:
        """(b, s, d) to (b, s, v) float32."""
        logits = layout.constrain(self.head(features), "batch", None, "vocab")
        return logits.astype(jnp.float32)

    def _through_layers(
        self, x: jax.Array, tables: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        def through(x: jax.Array, block: Block) -> jax.Array:
            return block(x, tables)

        if self.config.remat != "nothing":
            policy = _REMAT_POLICIES[self.config.remat]
            # Under scan the loop itself keeps XLA from undoing it.
            through = nnx.remat(
                through, policy=policy, prevent_cse=not self.config.scan_layers
            )
        if self.config.scan_layers:
            in_axes = (nnx.Carry, 0)
            return nnx.scan(through, in_axes=in_axes, out_axes=nnx.Carry)(
                x, self.layers
            )
        for block in self.layers:
            x = through(x, block)
        return x


class PureLlama:
    """The model as pure functions over a plain nested dict of arrays.

    On a ``mesh`` they are for tracing alone, and divide activations as ``layout`` says.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        mesh: Mesh | AbstractMesh | None = None,
    ):
        self.mesh = mesh
        self._loss_chunk = config.loss_chunk
        self._make = lambda rngs: Llama(config, vocab_size, rngs=rngs)
        abstract = nnx.eval_shape(lambda: self._make(nnx.Rngs(params=0)))
        self._graph = nnx.graphdef(abstract)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters; ``jax.eval_shape`` of it gives shapes alone."""
        return nnx.to_pure_dict(nnx.state(self._make(nnx.Rngs(params=key))))

    def apply(self, params: Params, tokens: jax.Array) -> jax.Array:
        """Logits (b, s, v) float32 of ``tokens`` (b, s)."""
        with layout.use(self.mesh):
            return nnx.merge(self._graph, params)(tokens)

    def losses(
        self, params: Params, inputs: Any, targets: Any, z_loss: float = 0.0
    ) -> jax.Array:
        """Cross-entropy in nats of each target, (b, s) float32; tokens (b, s) int32.

        To it comes ``z_loss`` times the squared log of the softmax's denominator, which
        keeps that near one (PaLM, arXiv 2204.02311, section 5). Only ``loss_chunk``
        positions of each row have their logits in memory at once; the backward pass
        computes them again.
        """
        with layout.use(self.mesh):
            model = nnx.merge(self._graph, params)
            return self._losses(model, inputs, targets, z_loss)

    def _losses(
        self, model: Llama, inputs: Any, targets: Any, z_loss: float
    ) -> jax.Array:
        features = model.features(inputs)

        def losses(part: tuple[jax.Array, jax.Array]) -> jax.Array:
            features, targets = part
            logits = model.logits(features)
            found = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            if not z_loss:
                return found
            return found + z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1))

        batch, length = inputs.shape
        chunk = min(self._loss_chunk or length, length)
        if chunk == length:
            return losses((features, targets))
        parts = jax.tree.map(
            lambda x: x.reshape(batch, -1, chunk, *x.shape[2:]).swapaxes(0, 1),
            (features, targets),
        )
        found = jax.lax.map(jax.checkpoint(losses), parts)
        return found.swapaxes(0, 1).reshape(batch, length)
