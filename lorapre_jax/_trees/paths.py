"""Leaves of a tree by their paths, the names that rules, reports and states use."""

import functools
import re
from collections import Counter
from typing import Any

import jax
import optax

from lorapre_jax._trees.boxes import is_box, unboxed

compiled = functools.cache(re.compile)
"""A compiled pattern on paths. `re.compile` itself keeps only the last 512."""


def path_str(path: tuple[Any, ...]) -> str:
    return "/".join(
        str(next(getattr(k, a) for a in ("key", "name", "idx") if hasattr(k, a)))
        for k in path
    )


def named_leaves(
    tree: Any, masked: bool = False, is_leaf=None
) -> list[tuple[str, Any]]:
    """Returns arrays with their paths, in tree order.

    With `masked`, each `optax.MaskedNode` is among them. A box and the array in it have
    one path.
    """
    nodes = named_nodes(tree, is_leaf)
    leaves = [(path, x if is_leaf and is_leaf(x) else unboxed(x)) for path, x in nodes]
    wanted = is_leaf or (lambda x: False)
    return [
        (path, x)
        for path, x in leaves
        if wanted(x) or (x is not None and (masked or not is_masked(x)))
    ]


def named_nodes(tree: Any, is_leaf=None) -> list[tuple[str, Any]]:
    """Returns the same in their boxes, with every None and `optax.MaskedNode`."""
    wanted = is_leaf or (lambda x: False)
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: x is None or is_masked(x) or wanted(x) or is_box(x)
    )
    children = Counter(path[:-1] for path, _ in flat)

    def name(path) -> str:
        # An unknown box, which has its array as the only child, adds this key.
        boxed = path and getattr(path[-1], "name", None) == "value"
        return path_str(path[:-1] if boxed and children[path[:-1]] == 1 else path)

    return [(name(path), x) for path, x in flat]


def is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
