"""Orthogonalisation of whole matrices, where each device takes its share of them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lorapre_jax._matrix_view import MatrixView
from lorapre_jax._methods import at_least_float32
from lorapre_jax._plan import Plan
from lorapre_jax._selection import named_leaves
from lorapre_jax._sharding import entries_of, mesh_axes

Polar = Callable[..., jax.Array]  # Of (matrix, eps).


class _Group(NamedTuple):
    """Leaves whose matrices can stand in one stack: of one size, divided alike."""

    mesh: Any
    batch: frozenset[str]  # Mesh axes that whole matrices are divided over already.
    rows: tuple[str, ...]  # Mesh axes that the rows are divided over.
    columns: tuple[str, ...]
    p: int
    q: int
    dtype: str

    @property
    def parts(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in self.rows + self.columns)


Shares = Mapping[_Group, Mapping[str, MatrixView]]
"""Of each group its leaves, by path."""


def plan_shares(plan: Plan, param_shardings: Any) -> Shares:
    """Who stands in a stack with whom; nothing where no matrix is divided."""
    given = dict(named_leaves(param_shardings, is_leaf=lambda x: x is None))
    groups: dict[_Group, dict[str, MatrixView]] = {}
    for leaf in plan.leaves:
        place = given.get(leaf.path)
        if not isinstance(place, NamedSharding):
            raise ValueError(
                f"Leaf '{leaf.path}': `param_shardings` has {place!r} for it, and "
                "not a NamedSharding. Give a tree like the parameters, such as "
                "jax.tree.map(lambda x: x.sharding, params)."
            )
        if leaf.view is None:
            continue  # No elements.
        batch, row, column = entries_of(place, leaf.path, leaf.view)
        group = _Group(
            place.mesh,
            frozenset(axis for entry in batch for axis in mesh_axes(entry)),
            mesh_axes(row),
            mesh_axes(column),
            leaf.view.p,
            leaf.view.q,
            leaf.dtype,
        )
        groups.setdefault(group, {})[leaf.path] = leaf.view
    return groups if any(group.parts > 1 for group in groups) else {}


def orthogonalize_shares(
    polar: Polar, eps: jax.typing.ArrayLike, shares: Shares, tree: Any, places: Any
) -> Any:
    """`polar(matrix, eps)` of every matrix of the tree, each on one device.

    The devices that hold blocks of a stack of matrices exchange them for whole ones:
    an all-to-all over the mesh axes of the rows, one over those of the columns, and the
    same back. Each moves at most what a device holds of the stack, which is filled up
    with zeros to as many matrices for each device. Leaves of one matrix size that are
    divided alike share a stack.
    """
    leaves, places = dict(named_leaves(tree)), dict(named_leaves(places))
    for group, views in shares.items():
        specs = tuple(places[path].spec for path in views)
        on_one_device = functools.partial(_of_group, polar, group, [*views.values()])
        in_group = jax.shard_map(
            on_one_device,
            mesh=group.mesh,
            in_specs=(PartitionSpec(), *specs),
            out_specs=specs,
        )
        done = in_group(jnp.asarray(eps), *(leaves[path] for path in views))
        leaves |= zip(views, done, strict=True)
    return jax.tree.unflatten(jax.tree.structure(tree), leaves.values())


def _of_group(
    polar: Polar, group: _Group, views: list[MatrixView], eps, *blocks: jax.Array
) -> tuple[jax.Array, ...]:
    """On one device: its blocks in, its blocks out."""
    views = [
        dataclasses.replace(view, shape=block.shape)
        for view, block in zip(views, blocks, strict=True)
    ]
    stacks = [
        view.to_matrix(block).reshape(-1, view.p, view.q)
        for view, block in zip(views, blocks, strict=True)
    ]
    counts = [len(stack) for stack in stacks]
    idle = -sum(counts) % group.parts  # Of zeros, which stay zeros.
    stack = jnp.pad(jnp.concatenate(stacks), ((0, idle), (0, 0), (0, 0)))
    hops = [(group.rows, 1), (group.columns, 2)]
    for axes, side in hops:
        stack = jax.lax.all_to_all(stack, axes, 0, side, tiled=True)
    compute = at_least_float32(stack.dtype)
    one = functools.partial(polar, eps=eps)
    stack = jax.vmap(one)(stack.astype(compute)).astype(stack.dtype)
    for axes, side in reversed(hops):
        stack = jax.lax.all_to_all(stack, axes, side, 0, tiled=True)
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    done = jnp.split(stack, ends)[: len(views)]
    return tuple(
        view.from_matrix(x.reshape(*view.batch, view.p, view.q)).astype(block.dtype)
        for view, x, block in zip(views, done, blocks, strict=True)
    )
