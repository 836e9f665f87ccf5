"""The model as pure functions of its parameters, and its loss."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from examples.llama import layout
from examples.llama.cache import Cache
from examples.llama.config import ModelConfig
from examples.llama.model import Llama

Params = dict[str, Any]


class PureLlama:
    """The model as pure functions over a plain nested dict of arrays.

    On a ``mesh`` they must be traced, and shard activations as ``layout`` says.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        mesh: Mesh | AbstractMesh | None = None,
    ):
        self.vocab_size, self.mesh = vocab_size, mesh
        self._config = config
        self._make = lambda rngs: Llama(config, vocab_size, rngs=rngs)
        abstract = nnx.eval_shape(lambda: self._make(nnx.Rngs(params=0)))
        self._graph = nnx.graphdef(abstract)

    def init(self, key: jax.Array) -> Params:
        """Returns fresh parameters, or their shapes under ``jax.eval_shape``."""
        return nnx.to_pure_dict(nnx.state(self._make(nnx.Rngs(params=key))))

    def apply(self, params: Params, tokens: jax.Array) -> jax.Array:
        """Returns logits (b, s, v) float32 of ``tokens`` (b, s)."""
        with layout.use(self.mesh):
            return nnx.merge(self._graph, params)(tokens)

    def empty_cache(self, begin: jax.Array, slots: int) -> Cache:
        """Returns a cache for rows that begin in slots ``begin`` (b,)."""
        with layout.use(self.mesh):
            return Cache.empty(self._config, begin, slots)

    def extend(
        self, params: Params, tokens: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Returns logits (b, v) after ``tokens`` (b, s), which follow the cache's."""
        with layout.use(self.mesh):
            return nnx.merge(self._graph, params).extend(tokens, cache)

    def losses(self, params: Params, inputs: Any, targets: Any) -> jax.Array:
        """Returns the cross-entropy in nats of each target, (b, s) float32.

        The logits of only ``loss_chunk`` positions of each row are in memory at once;
        the backward pass computes them again.
        """
        return self.penalised_losses(params, inputs, targets, 0.0)[0]

    def penalised_losses(
        self, params: Params, inputs: Any, targets: Any, z_loss: float
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the losses with and without ``z_loss`` times a penalty.

        The penalty is the squared log of the softmax's denominator, which it keeps near
        one (PaLM, arXiv 2204.02311, section 5).
        """
        with layout.use(self.mesh):
            model = nnx.merge(self._graph, params)
            found = self._losses(model, inputs, targets, z_loss)
        return found if z_loss else (found, found)

    def _losses(self, model: Llama, inputs: Any, targets: Any, z_loss: float) -> Any:
        features = model.features(inputs)

        def losses(part: tuple[jax.Array, jax.Array]) -> Any:
            features, targets = part
            logits = model.logits(features)
            found = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            if not z_loss:
                return found
            log_z = jax.nn.logsumexp(logits, axis=-1)
            return found + z_loss * jnp.square(log_z), found

        batch, length = inputs.shape
        chunk = min(self._config.loss_chunk or length, length)
        if chunk == length:
            return losses((features, targets))
        parts = jax.tree.map(
            lambda x: x.reshape(batch, -1, chunk, *x.shape[2:]).swapaxes(0, 1),
            (features, targets),
        )
        found = jax.lax.map(jax.checkpoint(losses), parts)
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, length), found)
