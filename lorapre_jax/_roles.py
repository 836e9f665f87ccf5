"""What a leaf is in a network, as far as names tell: the selection of `matrices=None`.

Three things speak of a leaf: the names of its axes, where it is in a box that has them
("embed", "heads", "layers"); the layer that it is a field of, where that says which of
its axes are inputs (Haliax's and Equinox's `Linear`); and its path ("attn/q_proj/w").
Where none of them does, a leaf with more than two axes is left dense, with a warning.
"""

import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from lorapre_jax._boxes import axis_names, is_box, unboxed
from lorapre_jax._matrix_view import MatrixAxes
from lorapre_jax._paths import is_masked, named_nodes, path_str


class Role(NamedTuple):
    """Attributes:
    axes: Of its matrices; None where it is not seen as any.
    why: Why not; empty where it is.
    is_end: Whether it is an embedding or a head: one side is a vocabulary.
    """

    axes: MatrixAxes | None
    why: str = ""
    is_end: bool = False


class _Leaf(NamedTuple):
    path: str
    shape: tuple[int, ...]
    names: tuple[Any, ...]

    @property
    def last_key(self) -> str:
        return self.path.rpartition("/")[2]


# Names of axes.
_STACK = re.compile(r"(.*_)?(layers?|blocks?|stack|stages?|repeats?|layers_per_stage)")
_EXPERT = re.compile(r"(num_)?(exp|experts?)(_.*)?|num_activations")
_VOCAB = re.compile(r"vocab(ulary)?(_size)?")
_EMBED = re.compile(r"(embed|embedding|emb|d_?model|model_dim|hidden(_size)?)(_.*)?")

# Keys of paths, each between slashes or underscores.
_VECTOR = re.compile(r"(.*_)?(bias|biases|scale|gamma|beta|sinks?)")
_NORM = re.compile(r"norm|(^|/)ln\d*(_|/|$)", re.IGNORECASE)
# Of PyTorch and those who follow it: outputs first.
_OUT_FIRST = re.compile(r"weight(_[ih]h(_l\d+)?)?")
_STACK_KEY = re.compile(r"(.*_)?(layers?|blocks?|stack(ed)?|scan(ned)?|h)")
_END = re.compile(
    r"embed|(^|/)w[tp]e(/|$)|vocab|logits|(^|/)shared(/|$)"
    r"|(^|/)(lm_|output_|decoder_)?head(/|$)",
    re.IGNORECASE,
)
_CONV = re.compile(r"conv|patch", re.IGNORECASE)
_ATTENTION = re.compile(r"att(e)?n|einsum", re.IGNORECASE)
_INTO_HEADS = re.compile(
    r"(^|[/_])(to_)?w?(q|k|v|kv|qkv|query|key|value)(_?proj|_?einsum)?([/_]|$)"
)
_OUT_OF_HEADS = re.compile(r"(^|[/_])(to_)?(w?o|out|output|vec)([/_]|$)")
_NAMES_SIDE = re.compile(f"{_INTO_HEADS.pattern}|{_OUT_OF_HEADS.pattern}")
_EXPERTS = re.compile(r"mlp|ffn|feed_?forward|moe|expert", re.IGNORECASE)

_TALL = 8  # Over this, one side to the other, a matrix is taken to have a vocabulary.


def roles(params: Any) -> dict[str, Role]:
    """Of every leaf that is not masked, by path."""
    leaves = [
        _Leaf(path, tuple(unboxed(node).shape), axis_names(node, unboxed(node).ndim))
        for path, node in named_nodes(params)
        if unboxed(node) is not None and not is_masked(unboxed(node))
    ]
    layers = _sides_in_layers(params)
    width = _width(leaves)
    stacked = _stacked(leaves, width)
    return {
        leaf.path: _role(leaf, layers.get(leaf.path), leaf.path in stacked, width)
        for leaf in leaves
    }


def warn_of_unknown(
    by_role: Mapping[str, Role], shapes: Mapping[str, tuple[int, ...]], least: int
) -> None:
    """Names the leaves of which nothing is known, with what to write.

    Args:
      shapes: Of the leaves that the default decides on.
      least: Side of a square matrix; smaller leaves are not worth a word.
    """
    unknown = [
        path
        for path, shape in shapes.items()
        if by_role[path].why == UNKNOWN and math.prod(shape) >= least**2
    ]
    if not unknown:
        return
    rules = "\n".join(
        f'        r"^{re.escape(path)}$": lp.MatrixAxes(rows=-2, columns=-1),'
        f"  # {shapes[path]}"
        for path in unknown[:8]
    )
    more = f"\n        # and {len(unknown) - 8} more" if len(unknown) > 8 else ""
    warnings.warn(
        f"lorapre_jax keeps {len(unknown)} large leaves densely, for neither their "
        "paths nor names of their axes say which axes are rows and columns. Say it:\n"
        f"    matrices=lp.select_matrices(axes={{\n{rules}{more}\n    }}, "
        "extend_default=True)",
        stacklevel=2,
    )


UNKNOWN = "more than two axes, and nothing says which are rows and columns"


def _role(leaf: _Leaf, sides: Any, stacked: bool, width: int | None) -> Role:
    ndim = len(leaf.shape)
    if ndim < 2:
        return Role(None, "fewer than two axes")
    if _is_vector(leaf):
        return Role(None, "biases or scales of a stack")
    batch = _batch_axes(leaf, stacked)
    is_end = _is_end(leaf, batch, width)
    if sides is not None and (known := sides(leaf)) is not None:
        rows, columns, is_embedding = known
        return Role(_axes(rows, columns), is_end=is_end or is_embedding)
    inner = [axis for axis in range(ndim) if axis not in batch]
    if len(inner) < 2:
        return Role(None, "fewer than two axes in a slice")
    if len(inner) == 2:
        out_first = _OUT_FIRST.fullmatch(leaf.last_key)
        rows, columns = reversed(inner) if out_first else inner
        return Role(_axes([rows], [columns]), is_end=is_end)
    split = _split(leaf, inner, width)
    return Role(None, UNKNOWN) if split is None else Role(_axes(*split))


def _axes(rows: Iterable[int], columns: Iterable[int]) -> MatrixAxes:
    rows, columns = tuple(rows), tuple(columns)
    return MatrixAxes(
        rows[0] if len(rows) == 1 else rows,
        columns[0] if len(columns) == 1 else columns,
    )


def _split(leaf: _Leaf, inner: list[int], width: int | None):
    """Of three axes or more that are no batch axes: those of rows, those of columns.

    Kernels have their inputs first, and the model's width is one axis of either side.
    """
    path = leaf.path
    embed = _named(leaf, _EMBED)
    first, last = inner[0], inner[-1]
    if not embed and (_CONV.search(path) or _is_small_window(leaf, inner)):
        out = first if leaf.last_key == "weight" else last
        return [axis for axis in inner if axis != out], [out]
    if not embed and not any(_known(name) for name in leaf.names if name):
        in_attention = _ATTENTION.search(path) or _INTO_HEADS.search(path)
        if not in_attention:
            # Matrices of experts, one behind the other.
            return ([inner[-2]], [last]) if _EXPERTS.search(path) else None
        of_width = [axis for axis in inner if leaf.shape[axis] == width]
        ends = [last] if _OUT_OF_HEADS.search(path) else [first]
        if ("einsum" in path or not _NAMES_SIDE.search(path)) and len(of_width) == 1:
            embed = of_width
        elif _NAMES_SIDE.search(path) and (not of_width or ends[0] in of_width):
            embed = ends
        else:
            return None
    axis = embed[0] if embed else first
    others = [other for other in inner if other != axis]
    if "einsum" in path and len(inner) == 4:
        others.remove(first)  # Queries, keys and values are matrices of their own.
    return (others, [axis]) if axis == last else ([axis], others)


def _is_small_window(leaf: _Leaf, inner: list[int]) -> bool:
    """Four axes, the first two as long as the sides of a convolution's window."""
    height, width = (leaf.shape[axis] for axis in inner[:2])
    return len(inner) == 4 and height == width and height in (1, 3, 5, 7, 9, 11)


def _known(name: str) -> bool:
    return any(p.fullmatch(str(name)) for p in (_STACK, _EXPERT, _VOCAB, _EMBED)) or (
        re.search(r"head|mlp|ffn|lora|^kv$|^qkv$", str(name)) is not None
    )


def _named(leaf: _Leaf, pattern: re.Pattern[str]) -> list[int]:
    names = enumerate(leaf.names)
    return [i for i, name in names if isinstance(name, str) and pattern.fullmatch(name)]


def _is_vector(leaf: _Leaf) -> bool:
    named_norm = any(name == "norm" for name in leaf.names)
    is_vector = _VECTOR.fullmatch(leaf.last_key) or _NORM.search(leaf.path)
    return named_norm or bool(is_vector)


def _batch_axes(leaf: _Leaf, stacked: bool) -> set[int]:
    batch = {*_named(leaf, _STACK), *_named(leaf, _EXPERT)}
    if not batch and stacked:
        batch.add(0)
    left = len(leaf.shape) - len(batch)
    is_other = _ATTENTION.search(leaf.path) or _CONV.search(leaf.path)
    is_of_experts = _EXPERTS.search(leaf.path) and not is_other
    if left == 3 and is_of_experts and not _named(leaf, _EMBED):
        batch.add(min({*range(len(leaf.shape))} - batch))
    return batch


def _is_end(leaf: _Leaf, batch: set[int], width: int | None) -> bool:
    if _named(leaf, _VOCAB):
        return True
    if batch or len(leaf.shape) != 2:
        return False
    if _END.search(leaf.path):
        return True
    p, q = leaf.shape
    in_block = _ATTENTION.search(leaf.path) or _EXPERTS.search(leaf.path)
    return max(p, q) > _TALL * min(p, q) and not in_block


def _stacked(leaves: list[_Leaf], width: int | None) -> set[str]:
    """Leaves whose first axis goes over the layers.

    Either all below a key such as `layers`: it is as long for all of them, and none is
    a single matrix. Or all with more than two axes, where that is not the width.
    """
    below: defaultdict[str, list[_Leaf]] = defaultdict(list)
    for leaf in leaves:
        keys = leaf.path.split("/")
        for i, key in enumerate(keys[:-1]):
            if _STACK_KEY.fullmatch(key) and not keys[i + 1].isdigit():
                below["/".join(keys[: i + 1])].append(leaf)
                break
    found: set[str] = set()
    for group in below.values():
        lengths = {leaf.shape[0] if leaf.shape else None for leaf in group}
        matrices = [leaf for leaf in group if not _is_vector(leaf)]
        if len(lengths) == 1 and all(len(leaf.shape) > 2 for leaf in matrices):
            found.update(leaf.path for leaf in group)
    deep = [leaf for leaf in leaves if len(leaf.shape) > 2 and not _is_vector(leaf)]
    lengths = {leaf.shape[0] for leaf in deep}
    is_window = any(_CONV.search(leaf.path) for leaf in deep)
    if len(deep) > 1 and len(lengths) == 1 and width not in lengths and not is_window:
        found.update(leaf.path for leaf in deep)
    return found


def _width(leaves: list[_Leaf]) -> int | None:
    """The model's: the size that most matrices have an axis of."""
    counts = Counter(
        size
        for leaf in leaves
        if len(leaf.shape) > 1 and not _is_vector(leaf)
        for size in set(leaf.shape)
    )
    return max(counts, key=lambda size: (counts[size], size), default=None)


# Layers that say which axes of their weight are inputs.


def _sides_in_layers(params: Any) -> dict[str, Any]:
    """By the path of a weight: a function from its leaf to what is known of it."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: _sides(x) is not None
    )
    return {
        f"{path_str(path)}/weight".lstrip("/"): _sides(node)
        for path, node in nodes
        if _sides(node) is not None
    }


def _sides(node: Any) -> Any:
    """A function of the weight's leaf: its rows, its columns, is it an embedding."""
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


def _named_sides(leaf: _Leaf, rows: Any, columns: Any, is_embedding: bool) -> Any:
    """None where the weight is in no box, or one side has no axes."""

    def axes(side: Any) -> list[int]:
        named = side if isinstance(side, (tuple, list)) else (side,)
        return [leaf.names.index(axis.name) for axis in named]

    if not any(leaf.names) or () in (rows, columns):
        return None
    return axes(rows), axes(columns), is_embedding


def _of_convolution(leaf: _Leaf, spatial: int) -> tuple[list[int], list[int], bool]:
    out = len(leaf.shape) - spatial - 2
    return list(range(out + 1, len(leaf.shape))), [out], False
