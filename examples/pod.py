"""Trains on a mesh, saves, and continues on a smaller mesh, at another rank, in AdamW.

    JAX_NUM_CPU_DEVICES=8 python -m examples.pod    # eight devices on any machine

On a pod, what comes before the checkpoint and what comes after it are two runs, each on
all of its own devices. Each host calls `jax.distributed.initialize()` first, and the
folder is one that all hosts reach.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lorapre_jax as lp

WIDTH, BATCH = 512, 64
LAYOUT = {"up": P("fsdp", "tensor"), "down": P("tensor", "fsdp")}


def init(key: jax.Array) -> Any:
    up, down = jax.random.normal(key, (2, WIDTH, WIDTH)) / WIDTH**0.5
    return {"up": up, "down": down}


def loss_fn(params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean((x - jnp.tanh(x @ params["up"]) @ params["down"]) ** 2)


def make_mesh(devices: int) -> Mesh:
    auto = (AxisType.Auto, AxisType.Auto)
    shape, names = (devices // 2, 2), ("fsdp", "tensor")
    return jax.make_mesh(shape, names, auto, devices=jax.devices()[:devices])


def layout(mesh: Mesh) -> Any:
    return {name: NamedSharding(mesh, spec) for name, spec in LAYOUT.items()}


def train(
    title: str, tx: optax.GradientTransformation, params: Any, state: Any, steps: int
) -> tuple[Any, Any]:
    """Parameters and state after `steps` steps, sharded as before."""
    mesh = params["up"].sharding.mesh
    where = jax.tree.map(lambda x: x.sharding, (params, state))

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*where, None))
    def step(params, state, x):
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for key in jax.random.split(jax.random.key(1), steps):
        x = jax.random.normal(key, (BATCH, WIDTH))
        x = jax.device_put(x, NamedSharding(mesh, P("fsdp")))
        params, state, loss = step(params, state, x)
    print(f"{title:14} on {mesh.size} devices: loss {loss:.3f}")
    return params, state


def save(folder: Path, params: Any, state: Any) -> None:
    record = lp.state_record(state)  # rank, axes and methods, which no array tells
    tree = {"params": params, "state": state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree, custom_metadata=record, force=True)


def restore(folder: Path, tx: optax.GradientTransformation, mesh: Mesh) -> Any:
    """Parameters and state of `tx`, on whatever mesh there is now."""

    def placed(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    shapes = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(placed, shapes, layout(mesh))
    state = jax.eval_shape(tx.init, params)
    state = jax.tree.map(placed, state, lp.state_sharding(tx, params))
    with ocp.StandardCheckpointer() as checkpointer:
        # Raises if the state was saved at another rank, or with other matrices.
        lp.check_state_record(checkpointer.metadata(folder).custom_metadata, state)
        saved = checkpointer.restore(folder, {"params": params, "state": state})
    return saved["params"], saved["state"]


def main(folder: Path = Path("runs/pod"), steps: int = 50) -> tuple[Any, Any]:
    folder, devices = folder.absolute(), jax.device_count()
    if devices % 4:
        raise ValueError(
            f"This example divides its devices by four, and there are {devices}. "
            "On a CPU, set JAX_NUM_CPU_DEVICES=8."
        )
    tx = lp.lorapre_adamw(1e-3, rank=16)
    params = jax.jit(init, out_shardings=layout(make_mesh(devices)))(jax.random.key(0))
    places = lp.state_sharding(tx, params)  # of every array of the state
    state = jax.jit(tx.init, out_shardings=places)(params)
    lp.check_state_sharding(tx, params, state)
    print(lp.describe(tx, params, state))
    params, state = train("rank 16", tx, params, state, steps)

    save(folder, params, state)
    half = make_mesh(devices // 2)
    params, state = restore(folder, tx, half)
    params, state = train("rank 16", tx, params, state, steps)

    smaller = lp.lorapre_adamw(1e-3, rank=8)
    state = lp.convert_state(state, smaller, params)  # the best truncation
    params, state = train("rank 8", smaller, params, state, steps)

    adamw = optax.adamw(1e-3, b1=0.9, b2=0.95)
    state = lp.convert_state(state, adamw, params, b1=0.9, b2=0.95)
    return train("AdamW", adamw, params, state, steps)


if __name__ == "__main__":
    main()
