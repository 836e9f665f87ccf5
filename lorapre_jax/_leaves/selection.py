"""Which leaves are matrices, and along which axes: the values of `matrices=`."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import optax
import optax.contrib

from lorapre_jax._leaves.roles import Role
from lorapre_jax._trees.matrix_view import (
    AxesLike,
    MatrixAxes,
    as_matrix_axes,
    matrix_view,
)
from lorapre_jax._trees.paths import compiled, is_masked, named_leaves

Pattern = re.Pattern[str]


@dataclasses.dataclass(frozen=True)
class MatrixSelection:
    """A selection of leaves, made by `select_matrices`."""

    include: tuple[Pattern, ...] | None
    exclude: tuple[Pattern, ...]
    axes: MatrixAxes | tuple[tuple[Pattern, MatrixAxes], ...] | None
    extend_default: bool = False


Matrices = MatrixSelection | AxesLike | None | Any  # Any: a tree of AxesLike and None.


def select_matrices(
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    axes: AxesLike | Mapping[str, AxesLike] | None = None,
    *,
    extend_default: bool = False,
) -> MatrixSelection:
    """Selects the leaves to factor by regular expressions on their paths.

    A path is a leaf's keys joined by slashes, such as `layers/0/attention/q/kernel`,
    for any kind of tree (nnx state, Linen or Haiku parameters, plain containers). A
    pattern may match anywhere in the path (`re.search`); anchor it with `^` and `$` if
    that is too much.

    Args:
      include: Patterns of the leaves to select. None: if `axes` is one `MatrixAxes`,
        every leaf that has these axes; otherwise every leaf with two axes and every
        leaf that a pattern of `axes` matches.
      exclude: Patterns of leaves that are not selected, whatever else matches them.
      axes: The matrix axes of the selected leaves, or a mapping from patterns to axes.
        A selected leaf that no pattern matches must have exactly two axes. None: the
        last two axes of every leaf that `include` selects, `MatrixAxes()`.
      extend_default: Whether leaves that no pattern of `axes` matches are selected as
        by `matrices=None`. Patterns of `axes` then add to the default, and `exclude`
        takes from it. Not with `include`.

    Returns:
      A frozen, hashable value, not a callable, for the `matrices=` of a transform.

    Raises:
      TypeError: A pattern is not a string, or axes are not `MatrixAxes`.
      ValueError: A pattern is not a regular expression, or `extend_default` is given
        with `include` or with one `MatrixAxes`. At `init`: a pattern matches no leaf,
        two patterns of `axes` give one leaf different axes, or a selected leaf does not
        have the axes. The message names the pattern and the leaf.

    Examples:
      >>> import jax
      >>> import lorapre_jax as lp
      >>> shapes = {"q": (256, 8, 32), "up": (256, 1024), "down": (1024, 256)}
      >>> params = {k: jax.ShapeDtypeStruct(s, "float32") for k, s in shapes.items()}
      >>> heads = {"^q$": lp.MatrixAxes(rows=0, columns=(1, 2))}
      >>> matrices = lp.select_matrices(axes=heads, exclude="down", extend_default=True)
      >>> tx = lp.lorapre_adamw(2e-3, rank=32, matrices=matrices)
      >>> leaves = lp.describe(tx, params).leaves
      >>> print([leaf.path for leaf in leaves if leaf.is_factored])
      ['q', 'up']

    See also:
      `MatrixAxes`, `describe`, `optax.masked`; :doc:`choosing leaves and rank
      </choosing>`.
    """
    rules: Any = axes
    if isinstance(axes, Mapping):
        rules = tuple(
            (
                _compiled("axes", key),
                as_matrix_axes(value, f"select_matrices: axes of {key!r}"),
            )
            for key, value in axes.items()
        )
    elif axes is not None:
        rules = as_matrix_axes(axes, "select_matrices: axes")
    if extend_default and (include is not None or isinstance(rules, MatrixAxes)):
        raise ValueError(
            "select_matrices: `extend_default` goes with a mapping as `axes` and with "
            "`exclude`; `include`, or one `MatrixAxes` for all, leaves no default."
        )
    return MatrixSelection(
        None if include is None else _as_patterns("include", include),
        _as_patterns("exclude", exclude),
        rules,
        extend_default,
    )


class Resolved(NamedTuple):
    """The matrix axes of one leaf.

    Attributes:
      axes: The axes; None if the leaf is not seen as a matrix.
      why: Why it is not; empty if it is.
      by_default: Whether only its role says so.
    """

    axes: MatrixAxes | None
    why: str = ""
    by_default: bool = False


@dataclasses.dataclass(frozen=True)
class Decided:
    """What was decided on a whole tree, for a transform that gets a part of it."""

    by_role: Mapping[str, Role]
    axes: Mapping[str, Resolved]


def resolve_axes(
    matrices: Matrices, params: optax.Params, by_role: Mapping[str, Role]
) -> dict[str, Resolved]:
    """Returns the matrix axes of each leaf, by path."""
    leaves = named_leaves(params, masked=True)
    # Masked leaves have no shape, but a pattern that matches one is not a mistake.
    paths = [path for path, _ in leaves]
    shapes = {path: leaf.shape for path, leaf in leaves if not is_masked(leaf)}
    if not shapes:
        return {}
    if isinstance(matrices, Decided):
        return {path: matrices.axes[path] for path in shapes}
    if matrices is None:
        return {path: _of_role(role) for path, role in by_role.items()}
    if isinstance(matrices, (MatrixAxes, optax.contrib.MuonDimensionNumbers)):
        return _resolve_one(as_matrix_axes(matrices), shapes)
    if isinstance(matrices, MatrixSelection):
        return _resolve_selection(matrices, shapes, paths, by_role)
    if callable(matrices):
        raise TypeError(
            "matrices: callables are not accepted, since optax.inject_hyperparams "
            "takes them for schedules; use select_matrices(...) or a tree of "
            "MatrixAxes."
        )
    return _resolve_tree(matrices, shapes, paths, _nones(params))


def _of_role(role: Role) -> Resolved:
    return Resolved(role.axes, role.why, by_default=True)


def _resolve_one(axes: MatrixAxes, shapes) -> dict[str, Resolved]:
    lacking = Resolved(None, "lacks the matrix axes")
    return {
        path: Resolved(axes) if _fits(axes, len(shape)) else lacking
        for path, shape in shapes.items()
    }


def _fits(axes: MatrixAxes, ndim: int) -> bool:
    in_range = all(-ndim <= axis < ndim for axis in axes.named)
    return in_range and len({a % ndim for a in axes.named}) == len(axes.named)


def _resolve_selection(
    selection: MatrixSelection, shapes, paths, by_role
) -> dict[str, Resolved]:
    for role, pattern in _patterns(selection):
        if not any(map(pattern.search, paths)):
            raise ValueError(
                f"select_matrices: {role} pattern {pattern.pattern!r} matches no leaf. "
                f"The leaves are {_listed(paths)}."
            )
    return {
        path: _resolve_leaf(selection, path, shape, by_role[path])
        for path, shape in shapes.items()
    }


def _resolve_leaf(
    selection: MatrixSelection, path: str, shape: tuple[int, ...], role: Role
) -> Resolved:
    if any(pattern.search(path) for pattern in selection.exclude):
        return Resolved(None, "excluded")
    include, rules = selection.include, selection.axes
    if include is not None and not any(each.search(path) for each in include):
        return Resolved(None, "not included")
    if isinstance(rules, MatrixAxes):
        if include is None and not _fits(rules, len(shape)):
            return Resolved(None, "lacks the matrix axes")
        return Resolved(rules)
    if rules is None and include is not None:
        return Resolved(MatrixAxes())
    matching = [axes for pattern, axes in rules or () if pattern.search(path)]
    if selection.extend_default and not matching:
        return _of_role(role)
    if include is None and not matching and len(shape) != 2:
        return Resolved(None, "not two axes")
    # Views are compared, since on two axes (0, 1) means the same as (-2, -1).
    found = {matrix_view(shape, axes, path): axes for axes in matching}
    if len(found) > 1:
        raise ValueError(
            f"select_matrices: leaf '{path}' is given different axes by two patterns: "
            f"{_listed(found.values())}. Make the patterns exclude one another."
        )
    if not found and len(shape) != 2:
        raise ValueError(
            f"select_matrices: leaf '{path}' of shape {shape} is selected, but no "
            "pattern of axes= says which of its axes are rows and columns."
        )
    return Resolved(next(iter(found.values()), MatrixAxes()))


def _nones(tree: Any) -> set[str]:
    """Returns the paths where a tree has None for a leaf."""
    leaves = named_leaves(tree, is_leaf=lambda x: x is None)
    return {path for path, leaf in leaves if leaf is None}


def _resolve_tree(tree: Any, shapes, paths, nones) -> dict[str, Resolved]:
    specs = dict(named_leaves(tree, masked=True, is_leaf=_is_spec))
    resolved: dict[str, Resolved] = {}
    used: set[str] = set()
    for path in paths:
        # A spec at a subtree holds for every leaf below it.
        keys = path.split("/")
        prefixes = ["/".join(keys[:n]) for n in range(len(keys), -1, -1)]
        prefix = next((prefix for prefix in prefixes if prefix in specs), None)
        if prefix is None:
            raise ValueError(
                f"matrices: the tree has no entry for leaf '{path}'. Give it a "
                "MatrixAxes, or None to keep it dense."
            )
        used.add(prefix)
        spec = specs[prefix]
        if not _is_spec(spec):
            raise TypeError(
                f"matrices: the entry at '{prefix}' is a {type(spec).__name__}; it "
                "must be a MatrixAxes, an optax.contrib.MuonDimensionNumbers or None."
            )
        if path not in shapes:
            continue
        if spec is None or is_masked(spec):
            resolved[path] = Resolved(None, "not selected")
        else:
            resolved[path] = Resolved(as_matrix_axes(spec))
    unused = [path for path in specs if path not in used | nones]
    if unused:
        raise ValueError(
            f"matrices: the tree has entries for {_listed(unused)}, where the "
            "parameters have no leaf."
        )
    return resolved


def _patterns(selection: MatrixSelection) -> list[tuple[str, Pattern]]:
    rules = selection.axes if isinstance(selection.axes, tuple) else ()
    return (
        [("include", pattern) for pattern in selection.include or ()]
        + [("exclude", pattern) for pattern in selection.exclude]
        + [("axes", pattern) for pattern, _ in rules]
    )


def _as_patterns(role: str, value: str | Iterable[str]) -> tuple[Pattern, ...]:
    several = isinstance(value, Iterable) and not isinstance(value, str)
    return tuple(_compiled(role, each) for each in (value if several else (value,)))


def _compiled(role: str, pattern: Any) -> Pattern:
    if not isinstance(pattern, str):
        raise TypeError(
            f"select_matrices: {role} takes regular expressions as strings, got "
            f"{pattern!r}."
        )
    try:
        return compiled(pattern)
    except re.error as error:
        raise ValueError(
            f"select_matrices: {pattern!r} is not a regular expression: {error}."
        ) from error


def _is_spec(x: Any) -> bool:
    kinds = (MatrixAxes, optax.contrib.MuonDimensionNumbers, optax.MaskedNode)
    return x is None or isinstance(x, kinds)


def _listed(items: Iterable[Any], most: int = 8) -> str:
    items = [str(item) for item in items]
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(f"'{item}'" for item in items[:most]) + rest
