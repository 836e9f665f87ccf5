"""What a method of the race is: a rule for the matrices, without a learning rate.

Everything else is the same for all methods: schedule, clipping, and Adam with one
common rate for the embedding, the head and the norms, unless `Method` says otherwise.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax

B1, B2 = 0.9, 0.95
MUON_BETA = 0.95
MUON_RMS = 0.2
"""Root mean square of Muon's update, which is about that of Adam's."""
REFRESH = 100
"""Steps between two projections of the methods that keep one."""
ADAM_RATES = (1e-3, 2e-3, 4e-3)
MUON_RATES = (2.5e-3, 5e-3, 1e-2)
"""With which searches begin."""

Rule = Callable[[int, float], optax.GradientTransformation]
"""From the model's width and b2 to a transform whose updates are to be subtracted."""


@dataclasses.dataclass(frozen=True)
class Method:
    matrices: Rule
    rates: tuple[float, ...]
    """Peak rates of the matrices that the search begins with, in factors of two."""
    embeddings: Rule | None = None
    """The rule for the embedding and the head; None means Adam."""
    dense_factor: float | None = None
    """Ratio of the dense rate to the matrices'; None means the common dense rate."""
    rate_of: str | None = None
    """The method whose best rate it has; None means that its own is searched."""


def adam(width: int, b2: float) -> optax.GradientTransformation:
    del width
    return optax.scale_by_adam(B1, b2)


def stacked(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `inner` to stacks of leaves of one shape, so that it compiles faster."""

    def stack(leaves: Mapping[str, Any]) -> dict[str, Any]:
        shapes: dict[str, list[Any]] = {}
        for path in sorted(leaves):
            name = "x".join(map(str, leaves[path].shape))
            shapes.setdefault(name, []).append(leaves[path])
        return {name: jnp.stack(group) for name, group in shapes.items()}

    def unstack(stacks: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
        slices = {name: iter(stack) for name, stack in stacks.items()}
        return {
            path: next(slices["x".join(map(str, like[path].shape))])
            for path in sorted(like)
        }

    def update(updates, state, params=None):
        del params
        directions: Any
        directions, state = inner.update(stack(updates), state)
        return unstack(directions, updates), state

    return optax.GradientTransformation(
        lambda params: inner.init(stack(params)), update
    )
