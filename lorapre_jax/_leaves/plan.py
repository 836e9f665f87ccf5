"""What was decided for each leaf: once, at `init`. The state carries it."""

import contextlib
import dataclasses
import sys
from typing import Any, Self

import jax

from lorapre_jax._leaves import checks
from lorapre_jax._trees.matrix_view import MatrixView


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafPlan:
    """What was decided for one leaf, which is a `DenseLeaf` or a `FactoredLeaf`.

    Attributes:
      path: Keys joined by slashes.
      shape, dtype: Shape and dtype of the parameter.
      methods: How each of the transform's moments is kept; empty for a leaf without
        elements.
      view: Its matrices; None if it is not seen as any.
      batch_shards: Over how many devices the first batch axis is known to be sharded.
        It is not part of the decision: plans compare equal however their leaves are
        sharded.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    methods: tuple[Any, ...]
    view: MatrixView | None
    batch_shards: int = dataclasses.field(default=1, compare=False)

    def stacked(self, count: int) -> Self:
        """Returns the decision for so many such leaves, stacked along a new axis."""
        return dataclasses.replace(
            self,
            shape=(count, *self.shape),
            view=self.view and self.view.stacked(count),
            batch_shards=1,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseLeaf(LeafPlan):
    """Every moment is an array like the parameter.

    Attributes:
      why: Why it is dense.
      mend: What to write so that it is factored; empty without advice.
    """

    why: str
    mend: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactoredLeaf(LeafPlan):
    """At least one moment is factored.

    Attributes:
      rank: Rank of the factors.
    """

    view: MatrixView
    rank: int

    def factors_type(self, index: int) -> Any:
        """Returns the class of a moment's state; None if that moment is dense."""
        return self.methods[index].factors_type


Leaf = DenseLeaf | FactoredLeaf


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """The decisions for a tree, as a pytree node without leaves."""

    leaves: tuple[Leaf, ...]

    def __hash__(self):
        # jit hashes the node at every call, and types and paths tell most plans apart.
        return hash(tuple((type(leaf), leaf.path) for leaf in self.leaves))

    def __repr__(self):
        # It is part of the repr of every state, and of JAX's errors about states.
        factored = sum(isinstance(leaf, FactoredLeaf) for leaf in self.leaves)
        return f"Plan({len(self.leaves)} leaves, {factored} factored)"

    def by_path(self, leaves: list[tuple[str, Any]]) -> dict[str, Leaf]:
        """Returns the decisions, and checks that `leaves` are those decided on."""
        plans = {leaf.path: leaf for leaf in self.leaves}
        for path, leaf in leaves:
            checks.check_floating(path, leaf)
        shapes = {path: leaf.shape for path, leaf in leaves}
        for path in sorted(plans.keys() ^ shapes.keys()):
            raise ValueError(
                f"Leaf '{path}' is in the {'state' if path in plans else 'updates'} "
                "only. Initialise the optimizer state with the same tree."
            )
        for path, leaf in plans.items():
            if leaf.shape != shapes[path]:
                raise ValueError(
                    f"Leaf '{path}': the update has shape {shapes[path]}, but the "
                    f"optimizer state was initialised for {leaf.shape}."
                )
        return plans


def let_flax_serialize() -> None:
    """Tells Flax, if it is loaded, that a plan has nothing to serialize.

    Flax's `to_bytes` and `from_bytes` know only the types that were registered. A state
    that is read back has the plan of the state that it is read into.
    """
    serialization = sys.modules.get("flax.serialization")
    if serialization is not None:
        with contextlib.suppress(ValueError):  # It is registered already.
            serialization.register_serialization_state(
                Plan, lambda plan: {}, lambda plan, nothing: plan
            )


def has_plan(node: Any) -> bool:
    """Whether `node` is the state of one of our transforms."""
    return isinstance(getattr(node, "plan", None), Plan)
