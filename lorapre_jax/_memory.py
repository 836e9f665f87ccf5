"""What an optimizer's state holds, leaf by leaf, from abstract values."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorapre_jax import _checks
from lorapre_jax._methods import (
    Dense,
    FactorPair,
    RotatedRowColumn,
    RowColumn,
    have_rank,
)
from lorapre_jax._plan import LeafPlan, Plan, has_plan
from lorapre_jax._selection import named_leaves


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """One parameter's share of the optimizer state.

    Attributes:
      path, shape, dtype: The parameter's.
      batch, p, q, rank: Its matrices and their factors' rank; None where it is dense.
      dense: Why it is dense; empty where it is factored.
      methods: How each moment is kept.
      nbytes: Bytes of state that belong to it.
      adamw_nbytes: The same for `optax.adamw`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    batch: tuple[int, ...] | None
    p: int | None
    q: int | None
    rank: int | None
    dense: str
    methods: tuple[Any, ...]
    nbytes: int
    adamw_nbytes: int

    @property
    def is_factored(self) -> bool:
        return self.rank is not None


@dataclasses.dataclass(frozen=True)
class Report:
    """What `describe` returns; `str()` of it is a table.

    Attributes:
      leaves: One `LeafReport` per parameter, in tree order.
      other_bytes: State that belongs to no parameter, such as counters.
      total_bytes: The whole state, in bytes.
      adamw_bytes: The state of `optax.adamw` for the same parameters, in bytes.
    """

    leaves: tuple[LeafReport, ...]
    other_bytes: int
    total_bytes: int
    adamw_bytes: int

    @property
    def ratio(self) -> float:
        """`total_bytes / adamw_bytes`."""
        return self.total_bytes / self.adamw_bytes

    def __str__(self) -> str:
        rows = [("leaf", "shape", "state", "bytes", "of AdamW's")]
        for leaf in self.leaves:
            share = leaf.nbytes / leaf.adamw_nbytes if leaf.adamw_nbytes else 1.0
            rows.append(
                (leaf.path, _times(leaf.shape), _kept(leaf), f"{leaf.nbytes:,}",
                 f"{share:.3f}")
            )  # fmt: skip
        rows.append(("other", "", "", f"{self.other_bytes:,}", ""))
        rows.append(("total", "", "", f"{self.total_bytes:,}", f"{self.ratio:.3f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = [
                cell.rjust(width) if i >= 3 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:]])


def describe(tx: optax.GradientTransformation, params: Any) -> Report:
    """Reports the optimizer state that `tx` keeps for `params`, before any compute.

    Finds the decisions of this library's transforms wherever they stand in `tx` (chain,
    masked, partition, MultiSteps, ...), and every byte of the state of any transform.

    Args:
      tx: Any optax transform.
      params: Parameters: arrays or `jax.ShapeDtypeStruct`s; nothing is allocated.

    Returns:
      A `Report`: `.leaves` with a row per parameter, `.total_bytes`, `.adamw_bytes` and
      `.ratio`; `str()` gives a table.

    Raises:
      TypeError: A parameter is no array; the message names the leaf.
      What `tx.init` raises.
    """
    leaves = named_leaves(params)
    for path, leaf in leaves:
        _checks.check_array(path, leaf)
    state = jax.eval_shape(tx.init, params)
    plans = plans_by_path(state)
    nbytes = _bytes_by_leaf(state, leaves)
    adamw_state = jax.eval_shape(optax.adamw(1.0).init, params)
    adamw = _bytes_by_leaf(adamw_state, leaves)
    reports = tuple(
        _leaf_report(path, leaf, plans.get(path), nbytes[path], adamw[path])
        for path, leaf in leaves
    )
    return Report(reports, nbytes[None], sum(nbytes.values()), sum(adamw.values()))


def _leaf_report(path, leaf, plan: LeafPlan | None, nbytes, adamw_nbytes) -> LeafReport:
    shape, dtype = tuple(leaf.shape), jnp.dtype(leaf.dtype).name
    if plan is None:
        return LeafReport(
            path, shape, dtype, None, None, None, None, "another transform", (),
            nbytes, adamw_nbytes,
        )  # fmt: skip
    view = plan.view
    return LeafReport(
        path,
        shape,
        dtype,
        view.batch if view else None,
        view.p if view else None,
        view.q if view else None,
        plan.rank,
        plan.dense,
        plan.methods,
        nbytes,
        adamw_nbytes,
    )


def _bytes_by_leaf(state, leaves) -> dict[str | None, int]:
    """Bytes of the state's arrays by the parameter they belong to; None: to none."""
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves}
    nbytes: dict[str | None, int] = dict.fromkeys([*shapes, None], 0)
    for owner, _, node in parts(state, shapes):
        for array in jax.tree.leaves(node):
            nbytes[owner] += math.prod(array.shape) * array.dtype.itemsize
    return nbytes


Part = tuple[str | None, LeafPlan | None, Any]


def parts(state: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[Part]:
    """The state's arrays in tree order, factors together: owner, its plan, array.

    An array belongs to a parameter where its path ends with the parameter's (a tree
    shaped like the parameters); factors, where it is their key. Others belong to None.
    Where several parameters' paths fit, the longest of the array's shape has it.

    Args:
      shapes: The parameters', by path.
    """

    def owner(name: str, node: Any) -> str | None:
        keys = name.split("/")
        # The empty suffix names a tree of one array.
        suffixes = ["/".join(keys[i:]) for i in range(len(keys) + 1)]
        fitting = [suffix for suffix in suffixes if suffix in shapes]
        alike = [s for s in fitting if shapes[s] == getattr(node, "shape", None)]
        return next(iter(alike + fitting), None)

    found: list[Part] = []
    for name, node in named_leaves(state, is_leaf=has_plan):
        if not has_plan(node):
            found.append((owner(name, node), None, node))
            continue
        plans = {leaf.path: leaf for leaf in node.plan.leaves}
        for inner_name, inner in named_leaves(node, is_leaf=is_factors):
            path = owner(inner_name, inner)
            found.append((path, plans.get(path or ""), inner))
    return found


def is_factors(node: Any) -> bool:
    return isinstance(node, (FactorPair, RowColumn, RotatedRowColumn))


def _kept(leaf: LeafReport) -> str:
    if not leaf.is_factored:
        return f"dense: {leaf.dense}"
    kinds = [type(m).__name__ for m in leaf.methods if not isinstance(m, Dense)]
    size = _times((*(leaf.batch or ()), leaf.p, leaf.q))
    at_rank = f" at rank {leaf.rank}" if have_rank(leaf.methods) else ""
    return f"{size}{at_rank}: {', '.join(kinds)}"


def _times(shape) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def plans_by_path(state: Any) -> dict[str, LeafPlan]:
    """The decisions of our transforms; of several for a leaf, one that factors it."""
    is_plan = lambda node: isinstance(node, Plan)  # noqa: E731
    plans = filter(is_plan, jax.tree.leaves(state, is_leaf=is_plan))
    leaves = (leaf for plan in plans for leaf in plan.leaves)
    return {leaf.path: leaf for leaf in sorted(leaves, key=lambda x: x.is_factored)}
