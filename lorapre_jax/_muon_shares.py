"""Orthogonalisation of sharded matrices: each device takes its share of whole ones."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from lorapre_jax._leaves.plan import Leaf, Plan
from lorapre_jax._numerics.arrays import at_least_float32
from lorapre_jax._trees.matrix_view import MatrixView
from lorapre_jax._trees.paths import named_leaves
from lorapre_jax._trees.sharding import entries_of, mesh_axes

Polar = Callable[[jax.Array], jax.Array]  # On one matrix.


class _Group(NamedTuple):
    """Leaves whose matrices can form one stack: of one size, sharded alike."""

    mesh: Any
    batch: frozenset[str]  # Mesh axes that the batch axes are sharded over.
    rows: tuple[str, ...]  # Mesh axes that the rows are sharded over.
    columns: tuple[str, ...]
    p: int
    q: int
    dtype: str

    @property
    def parts(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in self.rows + self.columns)


Shares = Mapping[_Group, Mapping[str, MatrixView]]
"""The leaves of each group, by path."""


def plan_shares(param_shardings: Any, plan: Plan) -> Shares:
    """Groups matrices into stacks; returns nothing if none is known to be sharded."""
    if param_shardings is None:
        return {}
    given = dict(named_leaves(param_shardings, is_leaf=lambda x: x is None))
    groups: dict[_Group, dict[str, MatrixView]] = {}
    unsharded = []
    for leaf in plan.leaves:
        place = _checked(leaf, given.get(leaf.path))
        if leaf.view is None:
            continue  # It has no elements.
        if isinstance(place, SingleDeviceSharding):
            unsharded.append(leaf.path)
            continue
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
    if not any(group.parts > 1 for group in groups):
        return {}
    for path in unsharded:
        raise ValueError(
            f"Leaf '{path}': `param_shardings` places it on one device, and other "
            "leaves on a mesh. Give it a NamedSharding of that mesh."
        )
    return groups


def _checked(leaf: Leaf, place: Any) -> Any:
    what = f"Leaf '{leaf.path}': `param_shardings` has {place!r} for it"
    if isinstance(place, SingleDeviceSharding):
        return place
    if not isinstance(place, NamedSharding):
        raise ValueError(
            f"{what}, which is not a NamedSharding. Pass the parameters' shardings, "
            "such as jax.tree.map(lambda x: x.sharding, params)."
        )
    if PartitionSpec.UNCONSTRAINED in place.spec:
        raise ValueError(
            f"{what}, which leaves an axis unconstrained. Name the mesh axes that it "
            "is sharded over, or None."
        )
    what += f", of shape {leaf.shape}"
    if len(place.spec) > len(leaf.shape):
        raise ValueError(
            f"{what}: the spec has more entries than the leaf has axes. Pass the "
            "sharding of this leaf."
        )
    try:
        place.shard_shape(leaf.shape)
    except ValueError as error:
        raise ValueError(f"{what}: {error} Pass the sharding of this leaf.") from error
    return place


def orthogonalize_shares(
    polar: Polar,
    shares: Shares,
    tree: Any,
    places: Any,
    slices_at_once: int | None,
) -> Any:
    """Applies `polar` to every matrix of the tree, each on one device.

    The devices that hold shards of a stack of matrices exchange them for whole
    matrices: by an all-to-all over the mesh axes of the rows, one over those of the
    columns, and the same back. Each moves at most what a device holds of the stack,
    which is padded with zeros to the same number of matrices for each device. Leaves of
    one matrix size that are sharded alike share a stack. A device computes
    `slices_at_once` of its matrices at once.
    """
    leaves, places = dict(named_leaves(tree)), dict(named_leaves(places))
    for group, views in shares.items():
        specs = tuple(places[path].spec for path in views)
        on_one_device = functools.partial(
            _of_group, polar, group, [*views.values()], slices_at_once
        )
        in_group = jax.shard_map(
            on_one_device,
            mesh=group.mesh,
            in_specs=specs,
            out_specs=specs,
        )
        blocks = [_moved(leaves[path], places[path]) for path in views]
        done = in_group(*blocks)
        for path, x in zip(views, done, strict=True):
            leaves[path] = _moved(x, jax.typeof(leaves[path]).sharding)
    return jax.tree.unflatten(jax.tree.structure(tree), leaves.values())


def without_underflow(g: jax.Array) -> jax.Array:
    """Casts float16 to float32.

    A residual is a small part of the gradient, for which float16 has no small numbers
    left.
    """
    return g.astype(jnp.float32) if g.dtype == jnp.float16 else g


def _moved(x: jax.Array, place: Any) -> jax.Array:
    """Reshards to `place` under explicit mesh axes; else the compiler does it."""
    return jax.sharding.reshard(x, place) if place.mesh.explicit_axes else x


def _of_group(
    polar: Polar,
    group: _Group,
    views: list[MatrixView],
    slices_at_once: int | None,
    *blocks: jax.Array,
) -> tuple[jax.Array, ...]:
    """Computes one group on one device, from its shards to its shards."""
    views = [
        dataclasses.replace(view, shape=block.shape)
        for view, block in zip(views, blocks, strict=True)
    ]
    with jax.numpy_dtype_promotion("standard"):  # Gradients may be of several dtypes.
        dtype = jnp.result_type(*blocks)
    stacks = [
        view.to_matrix(block.astype(dtype)).reshape(-1, view.p, view.q)
        for view, block in zip(views, blocks, strict=True)
    ]
    counts = [len(stack) for stack in stacks]
    idle = -sum(counts) % group.parts  # Matrices of zeros, which stay zeros.
    stack = jnp.pad(jnp.concatenate(stacks), ((0, idle), (0, 0), (0, 0)))
    hops = [(group.rows, 1), (group.columns, 2)]
    for axes, side in hops:
        stack = jax.lax.all_to_all(stack, axes, 0, side, tiled=True)

    def whole(x: jax.Array) -> jax.Array:
        return polar(x.astype(at_least_float32(dtype))).astype(dtype)

    if slices_at_once is None:
        stack = jax.vmap(whole)(stack)
    else:
        stack = jax.lax.map(whole, stack, batch_size=slices_at_once)
    for axes, side in reversed(hops):
        stack = jax.lax.all_to_all(stack, axes, side, 0, tiled=True)
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    done = jnp.split(stack, ends)[: len(views)]
    return tuple(
        view.from_matrix(x.reshape(*view.batch_shape, view.p, view.q)).astype(
            block.dtype
        )
        for view, x, block in zip(views, done, blocks, strict=True)
    )
