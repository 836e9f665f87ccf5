"""Decides for every leaf: is it seen as matrices, and how is each moment kept."""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorapre_jax._leaves import checks
from lorapre_jax._leaves.choice import Choice
from lorapre_jax._leaves.plan import (
    DenseLeaf,
    FactoredLeaf,
    Plan,
    let_flax_serialize,
)
from lorapre_jax._leaves.roles import UNKNOWN, roles, warn_of_unknown
from lorapre_jax._leaves.selection import Decided, Matrices, Resolved, resolve_axes
from lorapre_jax._moments.dense import Dense
from lorapre_jax._moments.methods import have_rank
from lorapre_jax._trees.matrix_view import MatrixView, matrix_view
from lorapre_jax._trees.paths import is_masked, named_leaves
from lorapre_jax._trees.sharding import batch_shards

_MIN_DIM_SIZE = 128  # Of a side of a leaf that only the default selects.


def make_plan(
    params: optax.Params,
    choices: tuple[Choice, ...],
    *,
    rank: int | Fraction,
    matrices: Matrices,
    min_dim_size_to_factor: int | None,
) -> Plan | jax.Array:
    """Decides for every leaf of `params`, which may be abstract.

    For optax's placeholder for parameters it returns an array:
    `optax.tree_map_params` then treats the plan as a leaf that belongs to no parameter.
    """
    if _is_placeholder(params):
        return jnp.zeros([])
    leaves = named_leaves(params)
    if not leaves:
        return Plan(())
    let_flax_serialize()
    checks.check_distinct([path for path, _ in leaves])
    for path, leaf in leaves:
        checks.check_floating(path, leaf)
    by_role = matrices.by_role if isinstance(matrices, Decided) else roles(params)
    axes = resolve_axes(matrices, params, by_role)
    for each in choices:
        each.check_patterns(path for path, _ in named_leaves(params, masked=True))
    by_default = {path for path, found in axes.items() if found.by_default}
    # None by default: optax.inject_hyperparams makes arrays of numbers.
    least = min_dim_size_to_factor
    least = _MIN_DIM_SIZE if least is None else least
    if by_default:
        checks.check_count("min_dim_size_to_factor", least, 0)
        shapes = {path: leaf.shape for path, leaf in leaves if path in by_default}
        warn_of_unknown(by_role, shapes, least)

    decided = (
        _decide(
            path,
            leaf,
            tuple(each.of(path, by_role[path].is_end) for each in choices),
            axes[path],
            rank,
            least,
        )
        for path, leaf in leaves
    )
    return Plan(tuple(decided))


def _decide(
    path: str,
    leaf: Any,
    methods: tuple[Any, ...],
    resolved: Resolved,
    rank: int | Fraction,
    least: int,
) -> DenseLeaf | FactoredLeaf:
    """Decides for one leaf; `least` is the smallest side that the default factors."""
    shape = tuple(leaf.shape)
    common: Any = {"path": path, "shape": shape, "dtype": jnp.dtype(leaf.dtype).name}
    dense = tuple(Dense() for _ in methods)
    if 0 in shape:
        return DenseLeaf(**common, methods=(), view=None, why="no elements")
    if resolved.axes is None:
        mend = _name_axes(path) if resolved.why == UNKNOWN else ""
        return DenseLeaf(
            **common, methods=dense, view=None, why=resolved.why, mend=mend
        )
    if len(methods) == 2:
        checks.check_moments(*methods, path)
    view = matrix_view(shape, resolved.axes, path)
    common |= {"view": view, "batch_shards": batch_shards(leaf, view)}
    r, (p, q) = rank_of(rank, view), (view.p, view.q)
    why = mend = ""
    if all(isinstance(method, Dense) for method in methods):
        why = "Dense() moments"
    elif have_rank(methods) and r * (p + q) >= p * q:
        why = f"rank {r} does not pay: r(p+q) >= pq"
        mend = "A smaller rank= would factor what this one does not pay for."
    elif resolved.by_default and min(p, q) < least:
        why = f"a side is below {least}"
        mend = "To factor smaller matrices, lower min_dim_size_to_factor=."
    if why:
        return DenseLeaf(**common, methods=dense, why=why, mend=mend)
    return FactoredLeaf(**common, methods=methods, rank=r)


def _name_axes(path: str) -> str:
    return (
        "Say which axes are rows and columns: matrices=lp.select_matrices(axes={"
        f'r"^{re.escape(path)}$": lp.MatrixAxes(rows=..., columns=...)}}, '
        "extend_default=True)."
    )


def _is_placeholder(params: Any) -> bool:
    """Whether it is one node that can hold nothing, and not an empty container."""
    empty = not jax.tree.leaves(params, is_leaf=is_masked)
    containers = (Mapping, list, tuple, type(None))
    is_one_node = jax.tree.structure(params).num_nodes == 1
    return empty and is_one_node and not isinstance(params, containers)


def rank_of(rank: int | Fraction, view: MatrixView) -> int:
    if isinstance(rank, Fraction):
        return max(1, int(min(view.p, view.q) * rank))
    return int(rank)
