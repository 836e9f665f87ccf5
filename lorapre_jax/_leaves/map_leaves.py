"""Maps an optimizer's function over the matrices of all leaves, as planned."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorapre_jax._leaves.plan import Leaf, Plan
from lorapre_jax._leaves.stacks import AT_ONCE, stacks
from lorapre_jax._moments.factors import is_factors, open_boxes
from lorapre_jax._numerics.arrays import at_least_float32
from lorapre_jax._trees.paths import named_leaves
from lorapre_jax._trees.sharding import with_auto_axes

Moments = tuple[Any, Any]  # What `init_moment` returns.


def map_leaves(
    rule: Callable[..., tuple[Any, ...]],
    plan: Plan,
    updates: optax.Updates,
    moments: Sequence[Moments],
    slices_at_once: int | None,
    *others: Any,
) -> tuple[Any, ...]:
    """Maps `rule(leaf, g, *others, *states) -> (update, *states)` over all matrices.

    A dense leaf that is not seen as matrices is passed whole. Computation is in float32
    at least. Updates are returned in the dtype that optax would return, and states in
    their own dtypes.

    Args:
      rule: The optimizer's rule for one matrix, a pytree that holds its numbers.
      plan: The decision for each leaf.
      updates: Gradients, a tree like the one that the plan was made for.
      moments: One `(dense tree, factors)` pair per moment.
      slices_at_once: How many slices of the first batch axis at a time; None: all.
      others: Trees like the updates, whose arrays the rule gets too.

    Returns:
      The updates, and the new `(dense tree, factors)` pairs.
    """
    leaves = named_leaves(updates)
    if not leaves:
        return updates, *moments
    plans = plan.by_path(leaves)
    by_path = [dict(named_leaves(tree)) for tree in others]
    dense = [dict(named_leaves(tree)) for tree, _ in moments]
    factors = [dict(of_path) for _, of_path in moments]

    def kept(path: str) -> list[dict[str, Any]]:
        return [f if path in f else d for d, f in zip(dense, factors, strict=True)]

    arrays = {
        path: (
            g,
            [each[path] for each in by_path],
            [open_boxes(where[path]) for where in kept(path)],
        )
        for path, g in leaves
        if plans[path].methods
    }
    results = dict(leaves)
    for stack in stacks(plan, arrays, slices_at_once):
        done = _run_stack(rule, stack, slices_at_once, [arrays[x.path] for x in stack])
        for leaf, (update, *states) in zip(stack, done, strict=True):
            results[leaf.path] = update
            for where, state in zip(kept(leaf.path), states, strict=True):
                boxes = jax.tree.structure(where[leaf.path])
                where[leaf.path] = jax.tree.unflatten(boxes, jax.tree.leaves(state))
    trees = (
        jax.tree.unflatten(jax.tree.structure(tree), new.values())
        for (tree, _), new in zip(moments, dense, strict=True)
    )
    return (
        jax.tree.unflatten(jax.tree.structure(updates), results.values()),
        *zip(trees, factors, strict=True),
    )


def _run_stack(rule, stack: list[Leaf], slices_at_once, arrays) -> list[Any]:
    """Applies the rule to leaves that are alike, in one program for all of them."""
    if len(stack) == 1:
        return [_run_leaf(rule, stack[0], slices_at_once, *arrays[0])]
    leaf, count = stack[0], len(stack)
    if slices_at_once is None:
        slices_at_once = max(1, AT_ONCE // math.prod(leaf.shape))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *arrays)
    done = _run_leaf(rule, leaf.stacked(count), slices_at_once, *stacked)
    return [jax.tree.map(lambda x: x[i], done) for i in range(count)]  # noqa: B023


def _run_leaf(rule, leaf: Leaf, slices_at_once, *arrays):
    """Applies the rule to one leaf."""
    kind = dataclasses.replace(leaf, path="")
    return _run_kind(rule, kind, leaf.batch_shards, slices_at_once, *arrays)


# Compiled, so that leaves that differ in their paths only are traced once. `shards` is
# an argument since plans compare equal without it.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _run_kind(rule, leaf: Leaf, shards: int, slices_at_once, g, inputs, states):
    """Applies the rule to a leaf: seen as matrices, in the compute dtype."""
    compute = at_least_float32(
        g.dtype, leaf.dtype, *(x.dtype for x in jax.tree.leaves(states))
    )
    with jax.numpy_dtype_promotion("standard"):
        # The cast loses nothing, and the update can reuse the gradient's buffer.
        g = g.astype(jnp.promote_types(g.dtype, leaf.dtype))

    def on_matrix(rule, *arrays):
        cast = jax.tree.map(lambda x: x.astype(compute), arrays)
        update, *new = rule(leaf, *cast)
        # Other inputs are returned unchanged: a loop over slices carries all arrays.
        done = update, *arrays[1 : 1 + len(inputs)], *new
        return jax.tree.map(lambda new, old: new.astype(old.dtype), done, arrays)

    def on_leaf(rule, *arrays):
        view, one = leaf.view, functools.partial(on_matrix, rule)
        if view is None:
            return one(*arrays)
        matrices = [
            view.fuse(x) if is_factors(x) else view.to_matrix(x) for x in arrays
        ]
        ndim = len(view.batch_shape)
        mapped = over_batch(one, ndim, slices_at_once, shards)
        return tuple(
            view.unfuse(x) if is_factors(x) else view.from_matrix(x)
            for x in mapped(*matrices)
        )

    arrays = g, *inputs, *states
    update, *done = with_auto_axes(on_leaf, *arrays)(rule, *arrays)
    return update, *done[len(inputs) :]


def over_batch(fn, ndim: int, slices_at_once: int | None, shards: int):
    """Maps `fn`, whose results are like its arguments, over `ndim` leading axes."""
    for _ in range(max(ndim - 1, 0)):
        fn = jax.vmap(fn)
    if ndim == 0:
        return fn
    vmapped = jax.vmap(fn)
    return (
        vmapped if slices_at_once is None else _sliced(vmapped, slices_at_once, shards)
    )


def _sliced(fn, most: int, shards: int):
    """Applies `fn` to at most `most` entries of the leading axis at a time.

    A slice takes the same number of entries from each shard of the axis, at least one.
    So a sharded axis stays sharded, and no device ever fetches another's entries.
    """

    def run(*args):
        per_shard, rest = divmod(args[0].shape[0], shards)
        assert not rest, "JAX shards an axis evenly"
        most_each = max(1, most // shards)
        divisors = (d for d in range(1, per_shard + 1) if per_shard % d == 0)
        each = max(d for d in divisors if d <= most_each)
        length, size, count = per_shard * shards, each * shards, per_shard // each
        if count == 1:
            return fn(*args)
        # One buffer holds the gradients to come and the updates that are done, and the
        # states are carried with it: donated arguments are updated in place.
        carried = jax.tree.map(lambda x: x.reshape(size, count, *x.shape[1:]), args)

        def body(i, carried):
            entries = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), carried
            )
            # XLA does not inline a branch, so a slice is read before any of it is
            # written. Otherwise it may copy the whole stacks at every iteration.
            done = jax.lax.cond(i < count, fn, lambda *same: same, *entries)
            return jax.tree.map(
                lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 1),
                carried,
                done,
            )

        done = jax.lax.fori_loop(0, count, body, carried)
        return jax.tree.map(lambda x: x.reshape(length, *x.shape[2:]), done)

    return run
