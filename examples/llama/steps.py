"""The two compiled functions of a run: one training step, one held-out batch."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Sharding

from examples.llama.data import HeldOutBatch
from examples.llama.model import PureLlama


class TrainState(NamedTuple):
    """Everything that a step changes and a checkpoint holds."""

    params: Any
    opt_state: Any
    step: jax.Array  # () int32, updates done


def init_state(
    model: PureLlama, tx: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    params = model.init(key)
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))


def token_losses(model: PureLlama, params: Any, inputs: Any, targets: Any) -> jax.Array:
    """Cross-entropy in nats of each target, (b, s) float32; tokens are (b, s) int32."""
    logits = model.apply(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def make_train_step(
    model: PureLlama, tx: optax.GradientTransformation, replicated: Sharding
) -> Callable[[TrainState, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """``step(state, rows) -> (state, metrics)`` for rows (b, s + 1) int32.

    The given state is donated: its memory becomes that of the new one.
    """

    def mean_loss(params: Any, rows: jax.Array) -> jax.Array:
        return token_losses(model, params, rows[:, :-1], rows[:, 1:]).mean()

    @partial(jax.jit, donate_argnums=0, out_shardings=replicated)
    def step(
        state: TrainState, rows: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, grads = jax.value_and_grad(mean_loss)(state.params, rows)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"train_loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(params, opt_state, state.step + 1), metrics

    return step


def make_evaluation(
    model: PureLlama, batches: Sequence[HeldOutBatch]
) -> Callable[[Any], float]:
    """``evaluate(params)``: the exact mean loss in nats over all tokens of ``batches``.

    Sums are added up in float64 and divided once by the number of real tokens;
    averaging the batches' means would give a short last batch too much weight.
    """

    @jax.jit
    def sum_and_count(params: Any, batch: HeldOutBatch) -> tuple[jax.Array, jax.Array]:
        losses = token_losses(model, params, batch.inputs, batch.targets)
        return jnp.sum(losses * batch.mask), jnp.sum(batch.mask)

    def evaluate(params: Any) -> float:
        # All batches are queued before the first result is waited for.
        queued = [sum_and_count(params, batch) for batch in batches]
        total, count = np.asarray(jax.device_get(queued), np.float64).sum(axis=0)
        return float(total / count)

    return evaluate
