"""What a state holds of one moment of one factored leaf.

Of matrices `(*batch, p, q)`. Arrays are stored on the leaf's own axes, `(*batch, *rows,
r)` for `(*batch, p, r)`, each in a box like the parameter's (`MatrixView.unfuse`).
`sides` says which sides of the matrix an array has, after the batch axes.
"""

from typing import Any, NamedTuple

import jax


class FactorPair(NamedTuple):
    """The factors of `left @ right.T`."""

    sides = (("row", "rank"), ("column", "rank"))
    left: jax.Array  # (*batch, p, r)
    right: jax.Array  # (*batch, q, r)

    @property
    def product(self) -> jax.Array:
        """Of one matrix."""
        return self.left @ self.right.T


class RowColumn(NamedTuple):
    """Root mean squares of the rows and of the columns."""

    sides = (("row",), ("column",))
    row: jax.Array  # (*batch, p)
    column: jax.Array  # (*batch, q)


class RotatedRowColumn(NamedTuple):
    """Root mean squares of rows and columns, and of each direction of a left factor."""

    sides = (("row",), ("column",), ("rank",))
    row: jax.Array  # (*batch, p)
    column: jax.Array  # (*batch, q)
    direction: jax.Array  # (*batch, r)


def is_factors(node: Any) -> bool:
    """Whether it is the factored state of one moment of one leaf."""
    return isinstance(node, (FactorPair, RowColumn, RotatedRowColumn))


def open_boxes(state: Any) -> Any:
    """The arrays of a factored state without their boxes; any other state, itself."""
    return type(state)(*jax.tree.leaves(state)) if is_factors(state) else state
