"""The compiled functions of a run: a training step, a held-out batch, diagnostics."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, Sharding

import lorapre_jax as lp
from examples.llama import layout
from examples.llama.config import OptimizerConfig
from examples.llama.data.rows import Batch
from examples.llama.divergence import all_finite
from examples.llama.gradients import LossAndGrads
from examples.llama.optimizers import make_optimizer
from examples.llama.pure import PureLlama


class Skipped(NamedTuple):
    """Counts of steps that were not applied because something was not finite."""

    in_a_row: jax.Array  # () int32, up to the last step
    in_all: jax.Array  # () int32


class TrainState(NamedTuple):
    """Everything that a step changes and a checkpoint holds."""

    params: Any
    opt_state: Any
    step: jax.Array  # () int32, steps done
    skipped: Skipped


def begun(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step."""
    zero, in_a_row, in_all = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(params, tx.init(params), zero, Skipped(in_a_row, in_all))


def init_state(
    model: PureLlama, tx: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    return begun(model.init(key), tx)


def state_from(
    params: Any, tx: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """Returns a new state for ``params``, with dtypes and shardings of ``abstract``."""
    dtypes = jax.tree.map(lambda x: x.dtype, abstract.params)

    def begin(params: Any) -> TrainState:
        params = jax.tree.map(lambda x, dtype: x.astype(dtype), params, dtypes)
        return begun(params, tx)

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(begin, out_shardings=shardings)(params)


def abstract_state(
    model: PureLlama, tx: optax.GradientTransformation, mesh: Mesh | AbstractMesh
) -> TrainState:
    """Returns shapes, dtypes and shardings of the state on ``mesh``."""

    def place(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            shardings,
        )

    shapes = jax.eval_shape(partial(init_state, model, tx), jax.random.key(0))
    params = place(shapes.params, layout.param_shardings(mesh, shapes.params))
    counts = place(shapes, jax.tree.map(lambda _: layout.replicated(mesh), shapes))
    return counts._replace(
        params=params,
        opt_state=place(shapes.opt_state, lp.state_sharding(tx, params)),
    )


def assemble(
    model: PureLlama,
    optimizer: OptimizerConfig,
    steps: int,
    mesh: Mesh | AbstractMesh,
) -> tuple[optax.GradientTransformation, TrainState]:
    """Returns the optimizer of a run of ``steps``, and the abstract state."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = layout.param_shardings(mesh, shapes)
    tx = make_optimizer(optimizer, steps, shardings)
    return tx, abstract_state(model, tx, mesh)


def sum_and_count(
    model: PureLlama, params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Returns the loss in nats summed over the targets that count, and their number."""
    losses = model.losses(params, batch.inputs, batch.targets)
    return jnp.sum(losses * batch.mask), jnp.sum(batch.mask)


def make_train_step(
    loss_and_grads: LossAndGrads,
    tx: optax.GradientTransformation,
    abstract: TrainState,
    logged: Mapping[str, optax.Schedule] | None = None,
    skip_nonfinite: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns ``step(state, batch) -> (state, metrics)``.

    The new state is sharded as ``abstract`` says. The given one is donated: its memory
    becomes that of the new one. Metrics also have the values of schedules to be
    ``logged``, by name.

    With ``skip_nonfinite``, a step whose loss, gradient norm or new state is not finite
    changes nothing but the counts of steps. (``optax.apply_if_finite`` would look at
    the update alone, and apply it after some failures in a row.)
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract)

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, shardings.step))
    def step(
        state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        # The loss must come before the update. With the loss in chunks, the gradients
        # do not need it, and its logits would be in memory during the update.
        loss, grads = jax.lax.optimization_barrier(loss_and_grads(state.params, batch))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "train_loss": loss,
            "grad_norm": optax.tree.norm(optax.tree.cast(grads, "float32")),
            "tokens": jnp.sum(batch.mask),  # that were predicted, without padding
        }
        for name, schedule in (logged or {}).items():
            done = state.step - state.skipped.in_all  # As the optimizer counts.
            metrics[name] = jnp.asarray(schedule(done), jnp.float32)
        new = TrainState(params, opt_state, state.step + 1, state.skipped)
        if skip_nonfinite:
            new = _unless_nonfinite(new, state, metrics)
            metrics["skipped_in_a_row"] = new.skipped.in_a_row
            metrics["skipped_steps"] = new.skipped.in_all
        return new, metrics

    return step


def _unless_nonfinite(
    new: TrainState, old: TrainState, metrics: Mapping[str, jax.Array]
) -> TrainState:
    """Returns ``new``, or ``old`` with one more skipped step."""
    good = all_finite((metrics["train_loss"], metrics["grad_norm"], *new[:2]))
    params, opt_state = jax.tree.map(
        lambda x, y: jnp.where(good, x, y), new[:2], old[:2]
    )
    in_a_row, in_all = old.skipped
    bad = (~good).astype(jnp.int32)
    skipped = Skipped(bad * (in_a_row + 1), in_all + bad)
    return TrainState(params, opt_state, new.step, skipped)


def make_diagnosis(
    loss_and_grads: LossAndGrads, replicated: Sharding
) -> Callable[[TrainState, Batch], dict[str, jax.Array]]:
    """Returns ``diagnose(state, batch) -> numbers``, for the state before a step.

    The gradients are computed once more, so that the training step is the same program
    whether or not anyone looks. Of stacked layers it is the mean, of the condition the
    worst; see ``lp.diagnostics``.
    """
    summaries = {"captured": jnp.mean, "effective_rank": jnp.mean, "condition": jnp.max}

    @partial(jax.jit, out_shardings=replicated)
    def diagnose(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        _, grads = loss_and_grads(state.params, batch)
        return {
            f"diagnostics/{name}/{path}/{moment}": summary(getattr(found, name))
            for path, of_leaf in lp.diagnostics(state.opt_state, grads).items()
            for moment, found in of_leaf.items()
            for name, summary in summaries.items()
        }

    return diagnose


def make_evaluation(
    model: PureLlama,
    batches: Sequence[Batch],
    replicated: Sharding | None = None,
) -> Callable[[Any], float]:
    """Returns ``evaluate(params)``, the exact mean loss over all tokens of ``batches``.

    Sums are added up in float64 and divided once by the number of real tokens;
    averaging the batches' means would give a short last batch too much weight.
    """

    measure = jax.jit(partial(sum_and_count, model), out_shardings=replicated)

    def evaluate(params: Any) -> float:
        # All batches are queued before the first result is waited for.
        queued = [measure(params, batch) for batch in batches]
        total, count = np.asarray(jax.device_get(queued), np.float64).sum(axis=0)
        return float(total / count)

    return evaluate
