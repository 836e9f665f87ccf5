"""The arrays of any optimizer state, each with the parameter that it belongs to."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from lorapre_jax._leaves.plan import FactoredLeaf, LeafPlan, Plan, has_plan
from lorapre_jax._moments.factors import is_factors
from lorapre_jax._trees.matrix_view import MatrixView
from lorapre_jax._trees.paths import named_leaves


class Part(NamedTuple):
    """An array of the state, or the factors of one moment.

    Attributes:
      owner: Path of the parameter that it belongs to; None for a counter and the like.
      view: How that parameter is seen as matrices, for factors; None for any other
        array.
      name: Path in the state.
      node: The array, or the factors.
    """

    owner: str | None
    view: MatrixView | None
    name: str
    node: Any

    def arrays(self) -> Iterator[tuple[str, Any]]:
        """Yields the arrays with their paths in the state."""
        if not is_factors(self.node):
            yield self.name, self.node
            return
        arrays = jax.tree.leaves(self.node)
        for field, array in zip(self.node._fields, arrays, strict=True):
            yield f"{self.name}/{field}", array


def parts(state: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[Part]:
    """Returns the parts of a state, in tree order.

    An array belongs to a parameter if its path ends with the parameter's (as in a tree
    shaped like the parameters), and factors do if the path is their key. If the paths
    of several parameters fit, the longest one of the array's shape is taken.

    Args:
      shapes: Shapes of the parameters, by path.
    """

    def owner(name: str, node: Any) -> str | None:
        keys = name.split("/")
        # The empty suffix names a tree of one array.
        suffixes = ["/".join(keys[i:]) for i in range(len(keys) + 1)]
        fitting = [suffix for suffix in suffixes if suffix in shapes]
        alike = [s for s in fitting if shapes[s] == getattr(node, "shape", None)]
        return next(iter(alike + fitting), None)

    found: list[Part] = []
    for name, node in named_leaves(state, is_leaf=has_plan):
        if not has_plan(node):
            found.append(Part(owner(name, node), None, name, node))
            continue
        plans = {leaf.path: leaf for leaf in node.plan.leaves}
        for inner_name, inner in named_leaves(node, is_leaf=is_factors):
            path = owner(inner_name, inner)
            place = f"{name}/{inner_name}".strip("/")
            view = plans[path].view if path and is_factors(inner) else None
            found.append(Part(path, view, place, inner))
    return found


def plans_by_path(state: Any) -> dict[str, LeafPlan]:
    """Returns the decisions of our transforms by leaf path.

    If several transforms decided on a leaf, one that factors it is taken.
    """
    is_plan = lambda node: isinstance(node, Plan)  # noqa: E731
    plans = filter(is_plan, jax.tree.leaves(state, is_leaf=is_plan))
    leaves = (leaf for plan in plans for leaf in plan.leaves)
    return {leaf.path: leaf for leaf in sorted(leaves, key=_is_factored)}


def _is_factored(leaf: LeafPlan) -> bool:
    return isinstance(leaf, FactoredLeaf)
