"""Layers that say which axes of their weight are inputs: Haliax's and Equinox's."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from lorapre_jax._trees.boxes import is_box
from lorapre_jax._trees.paths import path_str


class Leaf(NamedTuple):
    """A leaf, as far as the default selection looks at it.

    Attributes:
      path: Keys joined by slashes.
      shape: Its shape.
      names: The names of its axes; None for an axis without a name.
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[Any, ...]

    @property
    def last_key(self) -> str:
        return self.path.rpartition("/")[2]


def sides_in_layers(params: Any) -> dict[str, Any]:
    """Returns functions from a leaf to what its layer knows, by path of the weight.

    That is its row axes, its column axes, and whether it is an embedding.
    """
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: _sides(x) is not None
    )
    known = ((path_str(path), _sides(node)) for path, node in nodes)
    return {f"{path}/weight".lstrip("/"): sides for path, sides in known if sides}


def _sides(node: Any) -> Any:
    """Returns such a function for a layer; None for other nodes."""
    if is_box(node) or isinstance(node, (jax.Array, Mapping, str)):
        return None
    fields = getattr(node, "__dict__", {})
    if "weight" not in fields:
        return None
    if {"In", "Out"} <= fields.keys():  # Haliax
        return lambda leaf: _named_sides(leaf, node.In, node.Out, False)
    if {"Vocab", "Embed"} <= fields.keys():
        return lambda leaf: _named_sides(leaf, node.Vocab, node.Embed, True)
    if {"in_features", "out_features"} <= fields.keys():  # Equinox
        return lambda leaf: ([len(leaf.shape) - 1], [len(leaf.shape) - 2], False)
    if {"num_embeddings", "embedding_size"} <= fields.keys():
        return lambda leaf: ([len(leaf.shape) - 2], [len(leaf.shape) - 1], True)
    if {"in_channels", "out_channels", "num_spatial_dims"} <= fields.keys():
        return lambda leaf: _of_convolution(leaf, node.num_spatial_dims)
    return None


def _named_sides(leaf: Leaf, rows: Any, columns: Any, is_embedding: bool) -> Any:
    """Returns None if the weight is in no box, or if one side has no axes."""

    def axes(side: Any) -> list[int]:
        named = side if isinstance(side, (tuple, list)) else (side,)
        return [leaf.names.index(axis.name) for axis in named]

    if not any(leaf.names) or () in (rows, columns):
        return None
    return axes(rows), axes(columns), is_embedding


def _of_convolution(leaf: Leaf, spatial: int) -> tuple[list[int], list[int], bool]:
    out = len(leaf.shape) - spatial - 2
    return list(range(out + 1, len(leaf.shape))), [out], False
