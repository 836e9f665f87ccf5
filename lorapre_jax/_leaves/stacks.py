"""Which leaves share a program: those of layers that are alike, as one stacked leaf.

A model whose layers are separate leaves has many leaves of each kind. The program of
their updates is the same, but XLA would compile it once for each leaf. Stacked along a
new axis, as a model that scans its layers has them, they need it once. The stack is a
copy, so its size has a bound.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from lorapre_jax._leaves import names
from lorapre_jax._leaves.plan import Leaf, Plan

AT_ONCE = 2**20
"""How many elements of a stack are computed at once, unless the user chooses."""

# A stack has at most so many elements, or this part of those of all leaves.
_LARGEST, _PART = 2**24, 16


def stacks(
    plan: Plan, arrays: Mapping[str, Any], slices_at_once: int | None
) -> Iterator[list[Leaf]]:
    """Yields the leaves that have arrays, by path, in lists that share a program.

    Such leaves have the same plan and the same types, and their paths differ in numbers
    only: these are layers, which are sharded alike. A leaf with batch axes of its own
    is alone if the user has it computed in slices of these.
    """
    total = sum(math.prod(leaf.shape) for leaf in plan.leaves)
    largest = max(_LARGEST, total // _PART)
    alike: dict[Any, list[Leaf]] = {}
    for leaf in plan.leaves:
        if leaf.path not in arrays:
            continue
        place = leaf.path
        if slices_at_once is None or leaf.view is None or not leaf.view.batch_axes:
            place = names.LAYER_NUMBER.sub("", place)
        types = map(jax.typeof, jax.tree.leaves(arrays[leaf.path]))
        kind = dataclasses.replace(leaf, path=place), *types
        alike.setdefault(kind, []).append(leaf)
    for leaves in alike.values():
        count = max(1, largest // math.prod(leaves[0].shape))
        for i in range(0, len(leaves), count):
            yield leaves[i : i + count]
