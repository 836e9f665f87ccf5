"""What is known of the state that a conversion starts from."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorapre_jax._leaves.fit import check_all_fit
from lorapre_jax._state.held_moments import holds_moments, moments_in
from lorapre_jax._state.translate import Moment
from lorapre_jax._trees.paths import named_leaves


class OldState(NamedTuple):
    """An optimizer state as a conversion looks things up in it.

    Attributes:
      moments: Every moment of every leaf, by leaf path and order.
      nodes: All nodes of the state by path; those with moments are whole.
    """

    moments: dict[tuple[str, str], Moment]
    nodes: dict[str, Any]

    @property
    def paths(self) -> set[str]:
        """Paths of the leaves that it has moments of."""
        return {path for path, _ in self.moments}

    @property
    def count(self) -> Any:
        """The number of steps taken, the same for all moments."""
        return next(iter(self.moments.values())).count

    @property
    def maxima(self) -> dict[str, Any]:
        """The maxima of AMSGrad, by leaf path."""
        nodes = self.nodes.values()
        states = [x for x in nodes if isinstance(x, optax.ScaleByAmsgradState)]
        return {path: x for node in states for path, x in named_leaves(node.nu_max)}

    def counterpart(self, name: str, fresh: Any) -> Any:
        """Returns the array at the path `name`, where the new state has `fresh`.

        Hyperparameters stay those of the new state.
        """
        keys = name.split("/")
        if "hyperparams" in keys:
            return fresh
        found = self.nodes.get(name)
        if found is None and keys[-1] == "count" and self.moments:
            found = self.count  # The count of a schedule, elsewhere in the chain.
        if found is None or jnp.shape(found) != jnp.shape(fresh):
            instead = "none" if found is None else f"one of shape {jnp.shape(found)}"
            raise ValueError(
                f"The new state has an array '{name}' of shape {jnp.shape(fresh)}, and "
                f"the old state has {instead} there. Convert the states of the chain's "
                "transforms one by one. If the transform is in a wrapper, such as "
                "`optax.MultiSteps`, convert the state inside it and put it into the "
                "wrapper's `init(params)`."
            )
        return found


def read_old_state(state: optax.OptState) -> OldState:
    """Reads a state, whose moments must all have taken the same number of steps."""
    check_all_fit(state)
    # NumPy's arrays, as Flax's `from_bytes` returns them, are on no device.
    state = jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x, state
    )
    nodes = named_leaves(state, is_leaf=holds_moments)
    moments: dict[tuple[str, str], Moment] = {}
    for node in (node for _, node in nodes if holds_moments(node)):
        for moment in moments_in(node).values():
            if (moment.path, moment.order) in moments:
                raise ValueError(
                    f"Leaf '{moment.path}': the old state has two {moment.order} "
                    "moments of it, of which only one could be carried over. Convert "
                    "the states of the chain's transforms one by one."
                )
            moments[moment.path, moment.order] = moment
    _check_counts(moments.values())
    return OldState(moments, dict(nodes))


def _check_counts(moments: Iterable[Moment]) -> None:
    steps: dict[int, str] = {}
    for moment in moments:
        if jnp.shape(moment.count) != ():
            raise ValueError(
                f"Leaf '{moment.path}': the count of the old state has shape "
                f"{jnp.shape(moment.count)}, as if it was made under `vmap`. Convert "
                "the states of such a stack one by one."
            )
        steps[int(moment.count)] = moment.path
    if len(steps) > 1:
        of_each = (f"leaf '{path}' {count}" for count, path in sorted(steps.items()))
        raise ValueError(
            "The transforms of the old state have taken different numbers of steps: "
            f"{', '.join(of_each)}. Convert their states one by one."
        )
