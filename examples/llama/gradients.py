"""The loss that is minimised and its gradient, of a batch at once or in parts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from examples.llama import layout
from examples.llama.data.rows import Batch
from examples.llama.pure import PureLlama

LossAndGrads = Callable[[Any, Batch], tuple[jax.Array, Any]]


def make_loss_and_grads(
    model: PureLlama, micro_batch_size: int | None = None, z_loss: float = 0.0
) -> LossAndGrads:
    """Returns ``loss_and_grads(params, batch)``, means over targets that count.

    The gradient includes the penalty of ``z_loss``; the loss that is returned does not.

    With a ``micro_batch_size`` only so many rows, over all devices, have their
    activations in memory at once; the sums over the parts are float32, and each target
    weighs the same in whatever part it is. Gradients have the parameters' dtypes.
    """

    def loss(params: Any, part: Batch, count: jax.Array) -> Any:
        found = model.penalised_losses(params, part.inputs, part.targets, z_loss)
        penalised, plain = (jnp.sum(losses * part.mask) / count for losses in found)
        return penalised, plain

    def parts_of(params: Any, part: Batch, count: jax.Array) -> tuple[jax.Array, Any]:
        (_, plain), grads = jax.value_and_grad(loss, has_aux=True)(params, part, count)
        return plain, grads

    def loss_and_grads(params: Any, batch: Batch) -> tuple[jax.Array, Any]:
        count = jnp.maximum(jnp.sum(batch.mask), 1)  # None may, in a batch of one row.
        rows = batch.inputs.shape[0]
        micro_rows = micro_batch_size or rows
        if micro_rows == rows:
            return parts_of(params, batch, count)

        def add(sums: Any, part: Batch) -> tuple[Any, None]:
            found = parts_of(params, part, count)
            return jax.tree.map(lambda s, x: s + x.astype(s.dtype), sums, found), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
        with layout.use(model.mesh):
            parts = jax.tree.map(lambda x: _divide(x, micro_rows), batch)
        start = (jnp.zeros((), jnp.float32), zeros)
        (total, grads), _ = jax.lax.scan(add, start, parts)
        return total, jax.tree.map(lambda x, p: x.astype(p.dtype), grads, params)

    return loss_and_grads


def _divide(x: jax.Array, rows: int) -> jax.Array:
    """Splits (b, s) into (b / m, m, s), with rows of every device in each part."""
    parts = x.reshape(rows, -1, *x.shape[1:]).swapaxes(0, 1)
    return layout.constrain(parts, None, "batch", None)
