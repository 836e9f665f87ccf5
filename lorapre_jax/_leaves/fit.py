"""Whether a state holds what its plan says; checked wherever a state is read."""

from collections.abc import Iterator
from typing import Any

import jax

from lorapre_jax._leaves.plan import LeafPlan, Plan, has_plan
from lorapre_jax._moments.factors import is_factors
from lorapre_jax._trees.boxes import unboxed
from lorapre_jax._trees.paths import named_leaves

Shape = tuple[int, ...]

_MOMENTS = {"mu": 0, "nu": 1, "momentum": 0, "ema": 0}
"""Fields of our states that hold a moment, with its index among a leaf's methods."""


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
    for field, index in _MOMENTS.items():
        if not hasattr(state, field):
            continue
        dense = dict(named_leaves(getattr(state, field)))
        factors = getattr(state, f"{field}_factors")
        for leaf in state.plan.leaves:
            if not leaf.methods:
                continue
            is_dense = leaf.kind_of(index) is None
            where = field if is_dense else f"{field}_factors"
            node = (dense if is_dense else factors).get(leaf.path)
            for name, array, shape in _arrays(leaf, index, node):
                _check(leaf, index, f"{where}/{name}", array, (*stack, *shape))


def check_all_fit(state: Any) -> None:
    """Checks each of our states in any optimizer state, or in a stack of them."""
    for node in filter(has_plan, jax.tree.leaves(state, is_leaf=has_plan)):
        check_fits(node, stacked=True)


def _arrays(leaf: LeafPlan, index: int, node: Any) -> Iterator[tuple[str, Any, Shape]]:
    """Yields the arrays of one moment by name, with their shapes by the plan."""
    kind, view = leaf.kind_of(index), leaf.view
    if kind is None:
        yield leaf.path, node, leaf.shape
        return
    assert view is not None
    assert leaf.rank is not None
    for name, sides in zip(kind._fields, kind.sides, strict=True):
        array = getattr(node, name, None) if is_factors(node) else node
        shape = view.factor_shape(sides, leaf.rank)
        yield f"{leaf.path}/{name}", next(iter(jax.tree.leaves(array)), None), shape


def _check(leaf: LeafPlan, index: int, place: str, array: Any, shape: Shape) -> None:
    found = getattr(array, "shape", shape)
    if array is not None and tuple(found) == shape:
        return
    has = "is missing" if array is None else f"has shape {tuple(found)}"
    rank = "" if leaf.kind_of(index) is None else f" at rank {leaf.rank}"
    raise ValueError(
        f"Leaf '{leaf.path}': `{place}` {has} in the optimizer state, whose plan says "
        f"{shape} for {leaf.methods[index]!r}{rank}. Its arrays are not those that "
        "this plan was made for. Restore them into the state of the transform that "
        "saved them, `saved_tx.init(params)`, then carry it over to this one: "
        "lorapre_jax.convert_state(state, tx, params)."
    )
