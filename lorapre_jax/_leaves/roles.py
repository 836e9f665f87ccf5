"""What a leaf is in a network, as far as names tell: the selection of `matrices=None`.

Three things tell it: the names of the leaf's axes, if it is in a box that has them
("embed", "heads", "layers"); the layer that the leaf is a field of, if it says which
axes are inputs (Haliax's and Equinox's `Linear`); and the leaf's path
("attn/q_proj/w"). If none of them does, a leaf with more than two axes stays dense,
with a warning.
"""

import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lorapre_jax._leaves import names
from lorapre_jax._leaves.layers import Leaf, sides_in_layers
from lorapre_jax._trees.boxes import axis_names, unboxed
from lorapre_jax._trees.matrix_view import MatrixAxes
from lorapre_jax._trees.paths import is_masked, named_nodes


class Role(NamedTuple):
    """What a leaf is in a network.

    Attributes:
      axes: The axes of its matrices; None if it is not seen as any.
      why: Why it is not; empty if it is.
      is_end: Whether it is an embedding or a head: one side is a vocabulary.
    """

    axes: MatrixAxes | None
    why: str = ""
    is_end: bool = False


_TALL = 8  # If the sides have a larger ratio, one is taken for a vocabulary.


def roles(params: Any) -> dict[str, Role]:
    """Returns the role of every leaf that is not masked, by path."""
    leaves = [
        Leaf(path, tuple(unboxed(node).shape), axis_names(node, unboxed(node).ndim))
        for path, node in named_nodes(params)
        if unboxed(node) is not None and not is_masked(unboxed(node))
    ]
    layers = sides_in_layers(params)
    width = _width(leaves)
    stacked = _stacked(leaves, width)
    outputs_first = _outputs_first(leaves, width)
    times = Counter(map(_place, leaves))
    found = {}
    for leaf in leaves:
        is_alone = times[_place(leaf)] == 1
        batch = _batch_axes(leaf, leaf.path in stacked, width)
        sides = layers.get(leaf.path)
        is_out_first = leaf.path in outputs_first
        found[leaf.path] = _role(leaf, batch, sides, width, is_alone, is_out_first)
    return found


def warn_of_unknown(
    by_role: Mapping[str, Role], shapes: Mapping[str, tuple[int, ...]], least: int
) -> None:
    """Warns of large leaves whose rows and columns are not known, with what to write.

    It warns once: `describe` and others call `init` on the same parameters again.

    Args:
      shapes: Shapes of the leaves that the default decides on.
      least: Side of the smallest square matrix that is worth a warning.
    """
    unknown = [
        path
        for path, shape in shapes.items()
        if by_role[path].why == UNKNOWN and math.prod(shape) >= least**2
    ]
    if not unknown:
        return
    rules = "\n".join(
        f'        r"^{re.escape(path)}$": lp.MatrixAxes(rows=..., columns=...),'
        f"  # {shapes[path]}"
        for path in unknown[:8]
    )
    more = f"\n        # and {len(unknown) - 8} more" if len(unknown) > 8 else ""
    message = (
        f"lorapre_jax keeps {len(unknown)} large leaves dense, since neither their "
        "paths nor names of their axes say which axes are rows (inputs) and which are "
        "columns. Fill in, for example rows=-2, columns=-1 for a stack of matrices:\n"
        f"    matrices=lp.select_matrices(axes={{\n{rules}{more}\n    }}, "
        "extend_default=True)"
    )
    if message not in _told:
        warnings.warn(message, stacklevel=2)
        _told.add(message)


_told: set[str] = set()

UNKNOWN = "more than two axes, and nothing says which are rows and columns"


def _role(
    leaf: Leaf,
    batch: set[int],
    sides: Any,
    width: int | None,
    is_alone: bool,
    is_out_first: bool,
) -> Role:
    ndim = len(leaf.shape)
    if ndim < 2:
        return Role(None, "fewer than two axes")
    if names.is_vector(leaf):
        return Role(None, "a bias or a scale, by its name")
    is_end = _is_end(leaf, batch, is_alone)
    if sides is not None and (known := sides(leaf)) is not None:
        rows, columns, is_embedding = known
        return Role(_axes(rows, columns), is_end=is_end or is_embedding)
    inner = [axis for axis in range(ndim) if axis not in batch]
    if len(inner) < 2:
        return Role(None, "fewer than two axes in a slice")
    if len(inner) == 2:
        rows, columns = reversed(inner) if is_out_first else inner
        return Role(_axes([rows], [columns]), is_end=is_end)
    split = _split(leaf, inner, width)
    if split is None:
        return Role(None, UNKNOWN)
    return Role(_axes(*split), is_end=is_end)


def _axes(rows: Iterable[int], columns: Iterable[int]) -> MatrixAxes:
    rows, columns = tuple(rows), tuple(columns)
    return MatrixAxes(
        rows[0] if len(rows) == 1 else rows,
        columns[0] if len(columns) == 1 else columns,
    )


def _split(leaf: Leaf, inner: list[int], width: int | None):
    """Splits three or more axes, none of them a batch axis, into rows and columns.

    Kernels have their inputs first, and the model's width is one axis of either side.
    """
    first, last = inner[0], inner[-1]
    in_attention = names.is_in_attention(leaf)
    embed = names.named(leaf, names.EMBED)
    if not embed and not in_attention and names.is_convolution(leaf, inner):
        behind = inner[-2] if names.TRANSPOSED_CONV.search(leaf.path) else last
        out = first if leaf.last_key == "weight" else behind
        return [axis for axis in inner if axis != out], [out]
    if not embed and in_attention:
        axis = _width_in_attention(leaf, inner, width)
    elif not embed and not any(map(names.is_known, filter(None, leaf.names))):
        # Matrices of experts, one after the other.
        return ([inner[-2]], [last]) if names.EXPERTS.search(leaf.path) else None
    else:
        axis = embed[0] if embed else first
    if axis is None:
        return None
    others = [other for other in inner if other != axis]
    if "einsum" in leaf.path and len(inner) == 4:
        others.remove(min(others))  # Queries, keys, values: matrices of their own.
    is_output = axis == last and not names.GATES.search(leaf.path)
    return (others, [axis]) if is_output else ([axis], others)


def _width_in_attention(leaf: Leaf, inner: list[int], width: int | None) -> int | None:
    """Returns the axis that is the model's width; None if that is not clear."""
    sides = [
        (match.start(), axis)
        for axis, pattern in (
            (inner[0], names.INTO_HEADS),
            (inner[-1], names.OUT_OF_HEADS),
        )
        for match in pattern.finditer(leaf.path)
    ]
    of_width = [axis for axis in inner if leaf.shape[axis] == width]
    if ("einsum" in leaf.path or not sides) and len(of_width) == 1:
        return of_width[0]
    if not sides:
        return None
    _, axis = max(sides)  # The innermost name tells.
    return axis if not of_width or axis in of_width else None


def _batch_axes(leaf: Leaf, is_stacked: bool, width: int | None) -> set[int]:
    batch = {*names.named(leaf, names.STACK), *names.named(leaf, names.EXPERT)}
    if not batch and is_stacked:
        batch.add(0)
    inner = [axis for axis in range(len(leaf.shape)) if axis not in batch]
    if not any(leaf.names):
        batch.update(axis for axis in inner[:-2] if leaf.shape[axis] == 1)
    if (
        len(inner) != 3
        or names.named(leaf, names.EMBED)
        or not names.EXPERTS.search(leaf.path)
    ):
        return batch
    begins_with_width = [leaf.shape[axis] == width for axis in inner] == [1, 0, 0]
    if not (
        names.is_in_attention(leaf) or names.CONV.search(leaf.path) or begins_with_width
    ):
        batch.add(inner[0])
    return batch


def _is_end(leaf: Leaf, batch: set[int], is_alone: bool) -> bool:
    if names.named(leaf, names.VOCAB):
        return True
    if batch or len(leaf.shape) != 2:
        return False
    in_block = names.ATTENTION.search(leaf.path) or names.EXPERTS.search(leaf.path)
    own = "/".join(leaf.path.split("/")[-2:])
    if names.END.search(own if in_block else leaf.path):
        return True
    p, q = leaf.shape
    return max(p, q) > _TALL * min(p, q) and not in_block and is_alone


def _outputs_first(leaves: list[Leaf], width: int | None) -> set[str]:
    """Returns the matrices of two axes whose first axis is the columns of `x @ W`."""
    # In FlaxGPT2, kernels that take the model's width as input have it as last axis.
    is_conv_1d = any(
        leaf.shape[-1] == width != leaf.shape[-2]
        for leaf in leaves
        if len(leaf.shape) > 1 and names.FROM_WIDTH.search(leaf.path)
    )
    return {
        leaf.path
        for leaf in leaves
        if names.OUT_FIRST.fullmatch(leaf.last_key)
        or (is_conv_1d and names.CONV_1D.search(leaf.path))
    }


def _place(leaf: Leaf) -> Any:
    """Returns a key that alike leaves of different layers share."""
    return names.DIGITS.sub("", leaf.path), leaf.shape


def _stacked(leaves: list[Leaf], width: int | None) -> set[str]:
    """Returns the leaves whose first axis is the layers.

    That axis is equally long for all leaves below a key, biases and scales too, and
    shorter than the sides of their matrices. Without biases and scales, the key has to
    be a name for a stack (`layers`). Or the axis is equally long for all leaves with
    more than two axes.
    """
    below: defaultdict[str, list[Leaf]] = defaultdict(list)
    for leaf in leaves:
        keys = leaf.path.split("/")
        for i, key in enumerate(keys[1:], 1):
            if not key.isdigit():
                below["/".join(keys[:i])].append(leaf)
    found: set[str] = set()
    for prefix, group in below.items():
        vectors = [leaf for leaf in group if names.is_vector(leaf)]
        matrices = [leaf for leaf in group if not names.is_vector(leaf)]
        is_named = names.STACK_KEY.fullmatch(prefix.rpartition("/")[2])
        says_so = all(len(leaf.shape) > 1 for leaf in vectors)
        if (vectors or is_named) and says_so and _may_be_stacked(group, matrices):
            found.update(leaf.path for leaf in group)
    deep = [
        leaf for leaf in leaves if len(leaf.shape) > 2 and not names.is_vector(leaf)
    ]
    if len(deep) > 1 and _may_be_stacked(deep, deep) and deep[0].shape[0] != width:
        found.update(leaf.path for leaf in deep)
    return found


def _may_be_stacked(group: list[Leaf], matrices: list[Leaf]) -> bool:
    lengths = {leaf.shape[:1] for leaf in group}
    return (
        len(lengths) == 1
        and bool(matrices)
        and all(
            len(leaf.shape) > 2
            and leaf.shape[0] < max(leaf.shape[1:])
            and not names.is_convolution(leaf, list(range(len(leaf.shape))))
            for leaf in matrices
        )
    )


def _width(leaves: list[Leaf]) -> int | None:
    """Returns the model's width: the size that most matrices have an axis of."""
    counts = Counter(
        size
        for leaf in leaves
        if len(leaf.shape) > 1 and not names.is_vector(leaf)
        for size in set(leaf.shape)
    )
    return max(counts, key=lambda size: (counts[size], size), default=None)
