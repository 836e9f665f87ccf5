"""What a state holds of one factored moment of one leaf.

The shapes below are those of matrices `(*batch, p, q)`. A state stores the arrays with
the leaf's own axes, `(*batch, *rows, r)` for `(*batch, p, r)`, each in a box like the
parameter's (`MatrixView.unfuse`). `sides` names the axes of each array after the batch
axes.
"""

from typing import Any, NamedTuple

import jax


class FactorPair(NamedTuple):
    """The factors of a moment, `left @ right.T`."""

    sides = (("row", "rank"), ("column", "rank"))
    left: jax.Array  # (*batch, p, r)
    right: jax.Array  # (*batch, q, r)

    @property
    def product(self) -> jax.Array:
        """The moment of one matrix, `(p, q)`."""
        return self.left @ self.right.T


class RowColumn(NamedTuple):
    """Root mean squares of the rows and of the columns of a gradient."""

    sides = (("row",), ("column",))
    row: jax.Array  # (*batch, p)
    column: jax.Array  # (*batch, q)


class RotatedRowColumn(NamedTuple):
    """Root mean squares of rows, columns and directions; see `RotatedRankOne`."""

    sides = (("row",), ("column",), ("rank",))
    row: jax.Array  # (*batch, p)
    column: jax.Array  # (*batch, q)
    direction: jax.Array  # (*batch, r)


def is_factors(node: Any) -> bool:
    """Whether `node` is the state of one factored moment of one leaf."""
    return isinstance(node, (FactorPair, RowColumn, RotatedRowColumn))


def open_boxes(state: Any) -> Any:
    """Returns a factored state without its boxes, and any other state as it is."""
    return type(state)(*jax.tree.leaves(state)) if is_factors(state) else state
