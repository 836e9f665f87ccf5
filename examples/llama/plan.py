"""The plan of a run, from abstract values alone."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import lorapre_jax as lp
from examples.llama import flops, layout
from examples.llama.config import Config, DataConfig, as_groups, flat
from examples.llama.config.recipes import Setting
from examples.llama.optimizers import DEFAULT_RATES
from examples.llama.pure import PureLlama
from examples.llama.steps import TrainState, assemble


def plan(
    config: Config,
    vocab_size: int,
    recipe: Mapping[str, Setting],
    devices: int,
    every_leaf: bool = False,
) -> str:
    """Returns the plan's lines. Nothing is allocated or compiled.

    Raises ``ValueError`` if the mesh cannot shard the rows evenly.

    Args:
      config: The run. With a mesh, it is for that many devices, wherever they are.
      vocab_size: Of its tokenizer.
      recipe: What its defaults are from.
      devices: How many there are where it has no mesh.
      every_leaf: Also how the optimizer keeps each parameter.
    """
    mesh = layout.abstract_mesh(config.mesh, devices)
    # It raises the same error as the run itself.
    layout.by_row(mesh, config.data.batch_size, config.micro_batch_size)
    model = PureLlama(config.model, vocab_size, mesh)
    tx, state = assemble(model, config.optimizer, config.steps, mesh)
    memory = lp.describe(tx, state.params)

    tokens = config.data.batch_size * config.data.seq_len
    work = flops.per_token(config.model, state.params, config.data.seq_len) * tokens
    rate = config.optimizer.learning_rate or DEFAULT_RATES[config.optimizer.name][0]
    factored = sum(math.prod(x.shape) for x in memory.leaves if x.is_factored)
    steps = config.last_step
    weights = sum(math.prod(x.shape) for x in memory.leaves)
    rows = {
        "model": f"{weights:,} parameters in {config.model.param_dtype}, "
        f"{factored / weights:.0%} of them factored; {vocab_size:,} pieces",
        "steps": f"{steps:,} of {tokens:,} tokens, {steps * tokens:,} in "
        f"all ({steps * tokens / weights:.1f} for each parameter)",
        "optimizer": f"{config.optimizer.name}, peak rate {rate:g}, "
        f"{round(config.optimizer.warmup * config.steps):,} steps of rising rate",
        "its state": f"{memory.total_bytes:,} bytes, {memory.ratio:.3f} of AdamW's",
        "work": f"{work:.3g} FLOPs a step, {work * steps:.3g} in all",
        "devices": f"{mesh.size}: "
        + ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
    }
    micro = config.micro_batch_size or config.data.batch_size
    memory_rows = _per_device(model, state, mesh, config.data, micro)
    lines = [f"{name:<12}{text}" for name, text in rows.items()]
    lines += ["", "on each device, in bytes"]
    lines += [f"  {name:<38}{size:>18,}" for name, size in memory_rows.items()]
    lines += [
        *layout.exceptions(mesh, state.params),
        *_recipe_lines(as_groups(config), recipe),
    ]
    if every_leaf:
        lines += ["", str(memory)]
    return "\n".join(lines)


def _per_device(
    model: PureLlama, state: TrainState, mesh: Any, data: DataConfig, micro: int
) -> dict[str, int]:
    """Returns bytes on each device, for batches in parts of ``micro`` rows."""

    def nbytes(tree: Any, dtype: Any = None) -> int:
        return sum(
            math.prod(x.sharding.shard_shape(x.shape))
            * jnp.dtype(dtype or x.dtype).itemsize
            for x in jax.tree.leaves(tree)
        )

    parts = layout.row_parts(mesh)
    kept = _kept_of_a_row(model, state.params, data.seq_len, parts)
    rows = {
        "parameters": nbytes(state.params),
        "gradients": nbytes(state.params),
        "optimizer state": nbytes(state.opt_state),
        f"activations of {-(-micro // parts)} rows, about": -(-micro // parts) * kept,
    }
    if micro < data.batch_size:
        rows["sums of gradients, float32"] = nbytes(state.params, jnp.float32)
    return rows | {"total, without the update's temporaries": sum(rows.values())}


def _kept_of_a_row(model: PureLlama, params: Any, seq_len: int, parts: int) -> int:
    """Returns the bytes that the backward pass needs for one more row."""

    def residuals(params: Any, tokens: Any) -> list[jax.Array]:
        loss = lambda params: model.losses(params, tokens, tokens).mean()  # noqa: E731
        _, backward = jax.vjp(loss, params)
        return jax.tree.leaves(backward)

    def nbytes(rows: int) -> int:
        tokens = jax.ShapeDtypeStruct((rows, seq_len), jnp.int32)
        found = jax.eval_shape(residuals, params, tokens)
        return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in found)

    # Copies of the parameters, which do not grow with the rows, cancel.
    return (nbytes(2 * parts) - nbytes(parts)) // parts


def _recipe_lines(
    settings: Mapping[str, Any], recipe: Mapping[str, Setting]
) -> list[str]:
    if not recipe:
        return []
    lines = ["", "the recipe, and where it is from"]
    fields = flat(settings)
    for name, (value, source) in recipe.items():
        here = fields[name]
        note = source if here == value else f"instead of {value} ({source})"
        lines.append(f"  {name:<26}{here!s:<16}{note}")
    return lines
