"""The conditions under which methods race: the plain one, and harder ones."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

SPIKE_EVERY = 100
LOW_RANK = 8


@dataclasses.dataclass(frozen=True)
class Condition:
    b2: float = 0.95
    rate_factor: float = 1.0
    """All learning rates are multiplied by it."""
    spike: float = 1.0
    """Every 100th gradient is multiplied by it."""
    param_dtype: str = "float32"
    low_rank: bool = False
    """Whether the rows of the matrices' gradients are projected on one 8-D space."""
    loss_scale: float = 1.0
    rows: int | None = None
    """Rows of a batch; None means those of the scale."""
    clip_norm: float | None = 1.0

    def alter(self, grads: dict[str, jax.Array], step: jax.Array):
        """Returns the gradients that the rules see."""
        if self.low_rank:
            grads = {path: _project(path, g) for path, g in grads.items()}
        if self.spike != 1.0:
            hit = step % SPIKE_EVERY == SPIKE_EVERY - 1
            factor = jnp.where(hit, self.spike, 1.0)
            grads = jax.tree.map(lambda g: (factor * g).astype(g.dtype), grads)
        if self.clip_norm is not None:
            clip = optax.clip_by_global_norm(self.clip_norm)
            clipped: Any = clip.update(grads, optax.EmptyState())[0]
            return clipped
        return grads


def _project(path: str, g: jax.Array) -> jax.Array:
    if not path.startswith("layers/") or g.ndim != 2:
        return g
    noise = jax.random.normal(jax.random.key(0), (g.shape[1], LOW_RANK), g.dtype)
    basis, _ = jnp.linalg.qr(noise)
    return (g @ basis) @ basis.T


CONDITIONS = {
    "plain": Condition(),
    "b2=0.999": Condition(b2=0.999),
    "rate x3": Condition(rate_factor=3),
    "rate x10": Condition(rate_factor=10),
    "spikes of 1e3": Condition(spike=1e3, clip_norm=None),
    "bfloat16 parameters": Condition(param_dtype="bfloat16"),
    "gradients of rank 8": Condition(low_rank=True),
    "gradients of rank 8, rate x3": Condition(low_rank=True, rate_factor=3),
    "loss x1e-6": Condition(loss_scale=1e-6, clip_norm=None),
    "loss x1e6": Condition(loss_scale=1e6, clip_norm=None),
    "no clipping": Condition(clip_norm=None),
    "one row": Condition(rows=1),
}
