"""Whether a state holds what its plan says; checked wherever a state is read."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from lorapre_jax._leaves.moments import StoredMoment, stored_moments
from lorapre_jax._leaves.plan import FactoredLeaf, LeafPlan, Plan, has_plan
from lorapre_jax._moments.factors import is_factors
from lorapre_jax._trees.boxes import unboxed
from lorapre_jax._trees.paths import named_leaves

Shape = tuple[int, ...]


def check_fits(state: Any, stacked: bool = False) -> None:
    """Raises an error unless the arrays of one of our states fit its plan.

    A plan is not an array: what restores arrays into a state of another rank (Flax's
    `from_bytes`, `jax.tree.unflatten`) leaves that state's plan with them. Only shapes
    are read, so under jit the check costs nothing after the trace. What has no shape
    passes, such as shardings in place of the arrays.

    Args:
      stacked: Whether it may be several states, stacked as `jax.vmap(tx.init)` returns
        them; the leading axes are then those of the count.

    Raises:
      ValueError: An array has another shape. The message names the first leaf that
        differs, and both shapes.
    """
    if not isinstance(state.plan, Plan):  # It was made for optax's placeholder.
        return
    stack = getattr(unboxed(state.count), "shape", ()) if stacked else ()
    for moment in stored_moments(state):
        dense = dict(named_leaves(moment.dense))
        for leaf in state.plan.leaves:
            if leaf.methods:
                for name, array, shape in _arrays(leaf, moment, dense):
                    _check(leaf, moment.index, name, array, (*stack, *shape))


def check_all_fit(state: Any) -> None:
    """Checks each of our states in any optimizer state, or in a stack of them."""
    for node in filter(has_plan, jax.tree.leaves(state, is_leaf=has_plan)):
        check_fits(node, stacked=True)


def _arrays(
    leaf: LeafPlan, moment: StoredMoment, dense: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Shape]]:
    """Yields the arrays of one moment by place, with their shapes by the plan."""
    if not isinstance(leaf, FactoredLeaf) or leaf.factors_type(moment.index) is None:
        yield f"{moment.name}/{leaf.path}", dense.get(leaf.path), leaf.shape
        return
    kind = leaf.factors_type(moment.index)
    node = moment.factors.get(leaf.path)
    for name, sides in zip(kind._fields, kind.sides, strict=True):
        array = getattr(node, name, None) if is_factors(node) else node
        place = f"{moment.name}_factors/{leaf.path}/{name}"
        shape = leaf.view.factor_shape(sides, leaf.rank)
        yield place, next(iter(jax.tree.leaves(array)), None), shape


def _check(leaf: LeafPlan, index: int, place: str, array: Any, shape: Shape) -> None:
    found = getattr(array, "shape", shape)
    if array is not None and tuple(found) == shape:
        return
    has = "is missing" if array is None else f"has shape {tuple(found)}"
    rank = f" at rank {leaf.rank}" if isinstance(leaf, FactoredLeaf) else ""
    raise ValueError(
        f"Leaf '{leaf.path}': `{place}` {has} in the optimizer state, whose plan says "
        f"{shape} for {leaf.methods[index]!r}{rank}. Its arrays are not those that "
        "this plan was made for. Restore them into the state of the transform that "
        "saved them, `saved_tx.init(params)`, then carry it over to this one: "
        "lorapre_jax.convert_state(state, tx, params)."
    )
