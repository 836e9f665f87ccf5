"""The moments that a state holds: how they are allocated, and in which fields."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorapre_jax._leaves.plan import FactoredLeaf, Plan
from lorapre_jax._numerics.arrays import at_least_float32
from lorapre_jax._trees.boxes import boxed_like, is_box, refilled, unboxed
from lorapre_jax._trees.paths import is_masked, named_nodes
from lorapre_jax._trees.sharding import known_sharding, like_parameter


class StoredMoment(NamedTuple):
    """One of the moments that a state of ours holds.

    Attributes:
      name: The state's field for dense moments, a tree like the parameters. The field
        for factored moments is called `{name}_factors`.
      order: "first" or "second".
      index: Its index among the methods of a leaf.
      dense: The tree of dense moments.
      factors: The factored moments, by leaf path.
    """

    name: str
    order: str
    index: int
    dense: Any
    factors: Mapping[str, Any]


def stored_moments(state: Any) -> list[StoredMoment]:
    """Returns the moments that a state's class declares, `(("mu", "first"), ...)`."""
    return [
        StoredMoment(
            name, order, i, getattr(state, name), getattr(state, f"{name}_factors")
        )
        for i, (name, order) in enumerate(state.moments)
    ]


def replace_moment(
    state: Any, name: str, dense: Any, factors: Mapping[str, Any]
) -> Any:
    """Returns the state with another tree and, if it has any, other factors."""
    state = state._replace(**{name: dense})
    return state._replace(**{f"{name}_factors": factors}) if factors else state


def init_moment(plan, params, index: int, factor_dtype, seed) -> tuple[Any, Any]:
    """Returns the zero state of moment `index`: a dense tree, and factors by path.

    The tree is shaped like `params`, with `optax.MaskedNode` in place of the array, or
    of the box that it is in, if the moment is factored. Dense moments are float32 at
    least. With optax's placeholder for parameters, the tree is the placeholder, and the
    factors are an array that belongs to no parameter: `tree_map_params` then leaves
    them to its `transform_non_params`.
    """
    if not isinstance(plan, Plan):
        return params, jnp.zeros([])
    plans = {leaf.path: leaf for leaf in plan.leaves}
    dense, factors = [], {}
    for path, node in named_nodes(params):
        leaf, param = plans.get(path), unboxed(node)
        if leaf is None or not leaf.methods:
            dense.append(node if param is None else optax.MaskedNode())
        elif isinstance(leaf, FactoredLeaf) and leaf.factors_type(index) is not None:
            dense.append(optax.MaskedNode())
            factors[path] = _init_factors(leaf, index, node, factor_dtype, seed)
        else:
            dtype, sharding = at_least_float32(param.dtype), known_sharding(param)
            zeros = jnp.zeros(leaf.shape, dtype, device=sharding)
            dense.append(refilled(node, zeros))
    return jax.tree.unflatten(_structure(params), dense), factors


def _init_factors(leaf: FactoredLeaf, index: int, node: Any, dtype, seed) -> Any:
    """Returns factors sharded like the parameter, each in a box like it."""
    view, method = leaf.view, leaf.methods[index]

    def init() -> Any:
        sizes = view.batch_shape, view.p, view.q, leaf.rank
        return view.unfuse(method.init(*sizes, jnp.dtype(dtype), seed))

    state = like_parameter(init, unboxed(node), view)
    kind = type(state)
    axes = map(view.factor_axes, kind.sides)
    try:
        boxes = [boxed_like(node, x, a) for x, a in zip(state, axes, strict=True)]
    except TypeError as error:
        raise TypeError(f"Leaf '{leaf.path}': {error}") from error
    return kind(*boxes)


def _structure(params: Any) -> Any:
    """Returns the structure with one leaf for each node of `named_nodes`."""
    stop = lambda x: x is None or is_masked(x) or is_box(x)  # noqa: E731
    return jax.tree.structure(params, is_leaf=stop)
