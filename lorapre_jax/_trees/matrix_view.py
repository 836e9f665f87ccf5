"""A leaf of any shape seen as a batch of matrices, `(*batch, p, q)`.

A view is made from a shape alone, so it works for arrays, tracers and
`jax.ShapeDtypeStruct`s. It is hashable, so it can be in a static pytree node.
"""

import dataclasses
import math
import numbers
from collections.abc import Iterable
from typing import Any

import jax
import optax.contrib


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """Which axes of a leaf form its matrix, for `x @ W` with inputs as rows.

    All other axes are batch axes (stacked layers, experts): every slice along them is a
    matrix of its own, and nothing mixes across slices.
    `optax.contrib.MuonDimensionNumbers(reduction_axis, output_axis)` means the same and
    is accepted wherever a `MatrixAxes` is.

    Attributes:
      rows: The reduction (input) axis or axes. Several are fused in the given order.
        Negative numbers count from the end. If one of several is sharded, name it
        first: behind another one, the gradient is gathered along it.
      columns: The output axis or axes, likewise.

    Raises:
      TypeError: An axis is not an int.
      ValueError: A side names no axis, or both name the same one.

    Examples:
      A stacked attention projection with an axis of heads, whose second axis is its
      input:

      >>> import jax
      >>> import lorapre_jax as lp
      >>> shape = (2, 256, 8, 32)  # (layers, embed, heads, head_dim)
      >>> params = {"q": jax.ShapeDtypeStruct(shape, "float32")}
      >>> axes = lp.MatrixAxes(rows=1, columns=(2, 3))
      >>> tx = lp.lorapre_adamw(2e-3, rank=32, matrices=axes)
      >>> leaf = lp.describe(tx, params).leaves[0]
      >>> print(leaf.batch_shape, leaf.p, leaf.q)
      (2,) 256 256

    See also:
      `select_matrices`, `optax.contrib.MuonDimensionNumbers`; :doc:`choosing leaves and
      rank </choosing>`.
    """

    rows: int | tuple[int, ...] = -2
    columns: int | tuple[int, ...] = -1

    def __post_init__(self):
        for name in ("rows", "columns"):
            axes = getattr(self, name)
            is_one = not isinstance(axes, Iterable)
            several = (axes,) if is_one else tuple(axes)
            for axis in several:
                if not isinstance(axis, numbers.Integral) or isinstance(axis, bool):
                    raise TypeError(f"MatrixAxes.{name} takes ints, got {axis!r}.")
            if not several:
                raise ValueError(f"MatrixAxes.{name} must name at least one axis.")
            several = tuple(map(int, several))
            object.__setattr__(self, name, several[0] if is_one else several)
        if len(set(self.named)) != len(self.named):
            raise ValueError(f"{self} names an axis twice: rows and columns differ.")

    @property
    def named(self) -> tuple[int, ...]:
        """The axes of rows and columns."""
        return _as_tuple(self.rows) + _as_tuple(self.columns)


AxesLike = MatrixAxes | optax.contrib.MuonDimensionNumbers


def as_matrix_axes(axes: AxesLike, where: str = "matrices") -> MatrixAxes:
    """Returns `axes` as a `MatrixAxes`. Errors name `where` they were given."""
    if isinstance(axes, optax.contrib.MuonDimensionNumbers):
        rows, columns = axes
        return MatrixAxes(
            rows if isinstance(rows, int) else tuple(rows),
            columns if isinstance(columns, int) else tuple(columns),
        )
    if not isinstance(axes, MatrixAxes):
        raise TypeError(
            f"{where}: {axes!r} is not a MatrixAxes; write, for example, "
            "MatrixAxes(rows=0, columns=1)."
        )
    return axes


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """The two reshapes between a leaf and its matrices.

    Attributes:
      shape: The leaf's shape.
      batch_axes, row_axes, column_axes: A partition of the leaf's axes.
    """

    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]
    row_axes: tuple[int, ...]
    column_axes: tuple[int, ...]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self._sizes(self.batch_axes)

    @property
    def p(self) -> int:
        return math.prod(self._sizes(self.row_axes))

    @property
    def q(self) -> int:
        return math.prod(self._sizes(self.column_axes))

    def stacked(self, count: int) -> "MatrixView":
        """Returns the view of so many such leaves, stacked along a new first axis."""
        batch, rows, columns = (
            tuple(axis + 1 for axis in axes)
            for axes in (self.batch_axes, self.row_axes, self.column_axes)
        )
        return MatrixView((count, *self.shape), (0, *batch), rows, columns)

    def to_matrix(self, leaf: jax.Array) -> jax.Array:
        """Reshapes an array of `shape` to `(*batch, p, q)`."""
        return leaf.transpose(self._order).reshape(*self.batch_shape, self.p, self.q)

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """Reshapes an array `(*batch, p, q)` to `shape`."""
        order = self._order
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return matrix.reshape(self._sizes(order)).transpose(inverse)

    def factor_axes(self, sides: tuple[str, ...]) -> tuple[int | None, ...]:
        """Returns the leaf's axis that each axis of a factor is, or None for the rank.

        A factor is stored with the leaf's own axes, so that their names and shardings
        hold for it as they are: `(*batch, *rows, r)` for the sides `("row", "rank")`.
        """
        axes = {"row": self.row_axes, "column": self.column_axes, "rank": (None,)}
        return self.batch_axes + tuple(axis for side in sides for axis in axes[side])

    def factor_shape(self, sides: tuple[str, ...], rank: int) -> tuple[int, ...]:
        """Returns the shape of a factor with these sides as it is stored."""
        axes = self.factor_axes(sides)
        return tuple(rank if axis is None else self.shape[axis] for axis in axes)

    def fuse(self, state: Any) -> Any:
        """Reshapes a factored state from the leaf's axes to `(*batch, p, r)`, say."""

        def shape(x, sides) -> tuple[int, ...]:
            sizes = {"row": self.p, "column": self.q, "rank": x.shape[-1]}
            return self.batch_shape + tuple(sizes[side] for side in sides)

        kind = type(state)
        shapes = map(shape, state, kind.sides)
        return kind(*(x.reshape(to) for x, to in zip(state, shapes, strict=True)))

    def unfuse(self, state: Any) -> Any:
        """Reshapes a factored state back to the leaf's axes, the inverse of `fuse`."""
        kind = type(state)
        arrays = zip(state, kind.sides, strict=True)
        return kind(
            *(x.reshape(self.factor_shape(sides, x.shape[-1])) for x, sides in arrays)
        )

    @property
    def _order(self) -> tuple[int, ...]:
        return self.batch_axes + self.row_axes + self.column_axes

    def _sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)


def matrix_view(shape: tuple[int, ...], axes: MatrixAxes, path: str) -> MatrixView:
    """Returns the view of a leaf of that shape. Errors name the leaf's path."""
    rows = _normalized(axes.rows, shape, path)
    columns = _normalized(axes.columns, shape, path)
    named = rows + columns
    if len(set(named)) != len(named):
        raise ValueError(
            f"Leaf '{path}' of shape {shape}: {axes} names an axis twice. Rows and "
            "columns must be different axes."
        )
    batch = tuple(axis for axis in range(len(shape)) if axis not in named)
    return MatrixView(shape, batch, rows, columns)


def _normalized(axes, shape: tuple[int, ...], path: str) -> tuple[int, ...]:
    ndim = len(shape)
    for axis in _as_tuple(axes):
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"Leaf '{path}' of shape {shape} has no axis {axis}. Name axes that it "
                "has in `MatrixAxes`, or exclude the leaf from `matrices=`."
            )
    return tuple(axis % ndim for axis in _as_tuple(axes))


def _as_tuple(axes: int | tuple[int, ...]) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else axes
