"""Boxes: the containers in which frameworks keep an array with the names of its axes.

Flax's `nnx.Variable` and Linen's `Partitioned` are boxes, and Haliax's `NamedArray`.
Trainers read the sharding of an optimizer state off them, so what `init` makes for a
boxed parameter is put into a box of the same kind. Afterwards a box is a pytree node
like any other, and `update` needs none of this.

No framework is imported: only those that are already loaded are looked for.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

Axes = tuple[int | None, ...]
"""Which axis of the parameter each axis of a new array is; None for a new axis."""

_RANK = "lorapre_rank"  # Haliax names every axis; no mapping to mesh axes has this one.


class _BoxKind(NamedTuple):
    kind: type[Any]
    axis_names: Callable[[Any], Sequence[Any] | None]
    like: Callable[[Any, Any, Axes], Any]


_registered: list[_BoxKind] = []


def register_box(
    kind: type[Any],
    axis_names: Callable[[Any], Sequence[Any] | None],
    like: Callable[[Any, Any, Axes], Any],
) -> None:
    """Teaches the library another kind of box around a parameter.

    A box is a pytree node with one child, the array, that may name the array's axes.
    Those of Flax and Haliax are known.

    Args:
      kind: The box's class. Its subclasses are boxes too.
      axis_names: `axis_names(box)` returns the names of the array's axes, a string or
        None for each, or None if it has no names. The default selection reads them.
      like: `like(box, array, axes)` returns a box of the same kind around another
        array. `axes` has for each axis of `array` the number of the axis of the old
        array that it is, or None for the rank. The array may be a tracer or abstract.

    Raises:
      TypeError: `kind` is not a class.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import lorapre_jax as lp
      >>> @jax.tree_util.register_pytree_node_class
      ... class Named:
      ...     def __init__(self, value, names):
      ...         self.value, self.names = value, names
      ...     def tree_flatten(self):
      ...         return (self.value,), self.names
      ...     @classmethod
      ...     def tree_unflatten(cls, names, children):
      ...         return cls(*children, names)
      >>> def like(box, array, axes):
      ...     return Named(array, [None if i is None else box.names[i] for i in axes])
      >>> lp.register_box(Named, lambda box: box.names, like)
      >>> params = {"kernel": Named(jnp.zeros((256, 512)), ["embed", "mlp"])}
      >>> print(lp.lorapre_ema(0.9, 32).init(params).ema_factors["kernel"].left.names)
      ['embed', None]

    See also:
      :doc:`The recipe for Flax </recipes/flax>`; :doc:`meshes and hosts </meshes>`.
    """
    if not isinstance(kind, type):
        raise TypeError(f"register_box: `kind` must be a class, got {kind!r}.")
    _registered[:] = [known for known in _registered if known.kind is not kind]
    _registered.append(_BoxKind(kind, axis_names, like))


def unboxed(node: Any) -> Any:
    """Returns the array, MaskedNode or None in a box; any other node as it is."""
    return node if _kind_of(node) is None else _children(node)[0]


def is_box(node: Any) -> bool:
    return _kind_of(node) is not None


def axis_names(node: Any, ndim: int) -> tuple[Any, ...]:
    """Returns the name of each axis, or None for an axis without a name."""
    kind = _kind_of(node)
    names = None if kind is None else kind.axis_names(node)
    return _padded(names or (), ndim)


def boxed_like(node: Any, array: Any, axes: Axes) -> Any:
    """Returns `array` in a box like `node`, named by the axes of `node` that it has."""
    kind = _kind_of(node)
    return array if kind is None else kind.like(node, array, axes)


def refilled(node: Any, array: Any) -> Any:
    """Returns the same box around another array with the same axes."""
    return jax.tree.unflatten(jax.tree.structure(node), [array])


def _kind_of(node: Any) -> _BoxKind | None:
    for known in (*_registered, *_loaded()):
        # A variable may hold a tree of arrays. Then it is not a box.
        if isinstance(node, known.kind) and len(_children(node)) == 1:
            return known
    return None


def _children(box: Any) -> list[Any]:
    stop = lambda x: x is None or isinstance(x, optax.MaskedNode)  # noqa: E731
    return jax.tree.leaves(box, is_leaf=stop)


def _loaded() -> list[_BoxKind]:
    """Returns the boxes of the frameworks that are loaded."""
    found = []
    if (nnx := sys.modules.get("flax.nnx")) is not None:
        found.append(_BoxKind(nnx.Variable, _names_of_variable, _variable_like))
    if (meta := sys.modules.get("flax.core.meta")) is not None:
        found.append(_BoxKind(meta.Partitioned, lambda box: box.names, _partitioned))
    if (haliax := sys.modules.get("haliax")) is not None:
        named = haliax.NamedArray
        found.append(_BoxKind(named, _names_of_named_array, _named_array_like))
    return found


# Flax NNX. Names are metadata, under the first of these keys that is present.

_NAMES = (tuple, list, PartitionSpec)
_SHARDING = ("out_sharding", "sharding_names", "sharding", "optimizer_sharding")


def _names_of_variable(variable: Any) -> Sequence[Any] | None:
    metadata = variable.get_metadata()
    entries = next((metadata[key] for key in _SHARDING if metadata.get(key)), None)
    if isinstance(entries, NamedSharding):
        entries = entries.spec
    return tuple(entries) if isinstance(entries, _NAMES) else None


def _variable_like(variable: Any, array: Any, axes: Axes) -> Any:
    metadata = dict(variable.get_metadata())
    for key in _SHARDING:
        if metadata.get(key):
            metadata[key] = _selected(metadata[key], axes)
    # MaxText's axis of scanned layers; it adds their name there if that is missing.
    scanned = metadata.get("param_scan_axis")
    if scanned in axes:
        metadata["param_scan_axis"] = axes.index(scanned)
    return type(variable).from_metadata(array, metadata)


def _selected(entries: Any, axes: Axes) -> Any:
    if isinstance(entries, NamedSharding):
        return entries.update(spec=_selected(entries.spec, axes))
    if not isinstance(entries, _NAMES):
        raise TypeError(
            f"its sharding metadata is a {type(entries).__name__}, which does not tell "
            "the names of the axes of a factor. Give a tuple of names, a "
            "PartitionSpec or a NamedSharding."
        )
    old = tuple(entries)
    new = [None if axis is None else _padded(old, axis + 1)[axis] for axis in axes]
    return PartitionSpec(*new) if isinstance(entries, PartitionSpec) else tuple(new)


def _padded(entries: Sequence[Any], ndim: int) -> tuple[Any, ...]:
    return (*entries, *[None] * (ndim - len(entries)))


# Flax Linen.


def _partitioned(box: Any, array: Any, axes: Axes) -> Any:
    return box.replace(value=array, names=_selected(tuple(box.names), axes))


# Haliax.


def _names_of_named_array(named: Any) -> Sequence[Any]:
    return [axis.name for axis in named.axes]


def _named_array_like(named: Any, array: Any, axes: Axes) -> Any:
    names = _names_of_named_array(named)
    new = tuple(_RANK if axis is None else names[axis] for axis in axes)
    return type(named)(array, new)
