"""Trains a small Flax model with low-rank moments, saves it, and continues from there.

Run it with `python -m examples.quickstart`; it writes into `runs/quickstart`.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx

import lorapre_jax as lp


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(256, 1024, rngs=rngs)
        self.down = nnx.Linear(1024, 256, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x)))


def create() -> tuple[MLP, nnx.Optimizer]:
    model = MLP(nnx.Rngs(0))
    tx = optax.chain(optax.clip_by_global_norm(1.0), lp.lorapre_adamw(2e-3, rank=32))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def train_step(model: MLP, optimizer: nnx.Optimizer, x: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - x) ** 2))(model)
    optimizer.update(model, grads)
    return loss


def main(folder: Path = Path("runs/quickstart"), steps: int = 100) -> None:
    model, optimizer = create()
    print(lp.describe(optimizer.tx, nnx.state(model, nnx.Param)))
    data = jax.random.normal(jax.random.key(0), (steps, 64, 256))
    for x in data:
        loss = train_step(model, optimizer, x)
    print(f"loss after {steps} steps: {loss:.4f}")

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), nnx.state((model, optimizer)), force=True)
        checkpointer.wait_until_finished()
        graph, shapes = nnx.split(nnx.eval_shape(create))  # allocates nothing
        saved = checkpointer.restore(folder.absolute(), shapes)
    model, optimizer = nnx.merge(graph, saved)
    for x in data:
        loss = train_step(model, optimizer, x)
    print(f"loss after {steps} more, from {folder}: {loss:.4f}")


if __name__ == "__main__":
    main()
