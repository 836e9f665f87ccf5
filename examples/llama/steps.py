"""The compiled functions of a run: a training step, a held-out batch, diagnostics."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Sharding

import lorapre_jax as lp
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


def mean_loss(model: PureLlama, params: Any, rows: jax.Array) -> jax.Array:
    """What is minimised, of rows (b, s + 1) int32."""
    return token_losses(model, params, rows[:, :-1], rows[:, 1:]).mean()


def make_train_step(
    model: PureLlama, tx: optax.GradientTransformation, replicated: Sharding
) -> Callable[[TrainState, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """``step(state, rows) -> (state, metrics)`` for rows (b, s + 1) int32.

    The given state is donated: its memory becomes that of the new one.
    """

    loss_of = partial(mean_loss, model)

    @partial(jax.jit, donate_argnums=0, out_shardings=replicated)
    def step(
        state: TrainState, rows: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, grads = jax.value_and_grad(loss_of)(state.params, rows)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"train_loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(params, opt_state, state.step + 1), metrics

    return step


def make_diagnosis(
    model: PureLlama, replicated: Sharding
) -> Callable[[TrainState, jax.Array], dict[str, jax.Array]]:
    """``diagnose(state, rows) -> numbers``, from the state that a step starts from.

    The gradients are computed once more, so that the training step is the same program
    whether or not anyone looks. Of stacked layers it is the mean, of the condition the
    worst; see ``lp.diagnostics``.
    """
    summaries = {"captured": jnp.mean, "effective_rank": jnp.mean, "condition": jnp.max}

    @partial(jax.jit, out_shardings=replicated)
    def diagnose(state: TrainState, rows: jax.Array) -> dict[str, jax.Array]:
        grads = jax.grad(partial(mean_loss, model))(state.params, rows)
        return {
            f"diagnostics/{name}/{path}/{moment}": summary(getattr(found, name))
            for path, of_leaf in lp.diagnostics(state.opt_state, grads).items()
            for moment, found in of_leaf.items()
            for name, summary in summaries.items()
        }

    return diagnose


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
