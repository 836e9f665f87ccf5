"""What an optimizer's state holds, leaf by leaf, from abstract values."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, Sharding

from lorapre_jax._leaves import checks
from lorapre_jax._leaves.fit import check_all_fit
from lorapre_jax._leaves.plan import DenseLeaf, FactoredLeaf, LeafPlan
from lorapre_jax._state.parts import Part, parts, plans_by_path
from lorapre_jax._state.report import LeafReport, Report
from lorapre_jax._trees.paths import named_leaves
from lorapre_jax._trees.sharding import factor_shardings, known_sharding


def describe(
    tx: optax.GradientTransformation, params: Any, state: Any = None
) -> Report:
    """Reports the optimizer state that `tx` keeps for `params`, before any compute.

    It finds the decisions of this library's transforms wherever they are in `tx`
    (chain, masked, partition, MultiSteps, ...), and every byte of the state of any
    transform.

    Args:
      tx: Any optax transform.
      params: Parameters: arrays or `jax.ShapeDtypeStruct`s, in boxes or not. Nothing is
        allocated.
      state: A state of `tx` on its devices, or a tree like it of shardings, such as a
        trainer's `out_shardings`. Paths are compared, so a `flax.nnx.State` of it, or
        of the optimizer around it, is accepted too. With a state, the report has the
        bytes on each device; and, if `params` carry shardings, the factors that are
        replicated although their parameter is not.

    Returns:
      A `Report`, whose `leaves` are `LeafReport`s.

    Raises:
      TypeError: A parameter is not an array; the message names the leaf.
      ValueError: `state` lacks an array that the state of `tx` has, or an array of it
        has another shape than in the state of `tx` or in its own plan; the message
        names it.
      What `tx.init` raises.

    Examples:
      >>> import jax
      >>> import lorapre_jax as lp
      >>> shapes = {"norm": (256,), "up": (256, 1024)}
      >>> params = {k: jax.ShapeDtypeStruct(s, "float32") for k, s in shapes.items()}
      >>> report = lp.describe(lp.lorapre_adamw(2e-3, rank=32), params)
      >>> for leaf in report.leaves:
      ...     print(f"{leaf.path}: {leaf.nbytes:,} bytes, rank {leaf.rank}")
      norm: 2,048 bytes, rank None
      up: 169,088 bytes, rank 32
      >>> print(str(report).splitlines()[-1])
      99.9% of the parameters are factored; no large leaf is dense.

    See also:
      `rank_for_budget`, `check_state_sharding`; :doc:`choosing leaves and rank
      </choosing>`.
    """
    leaves = named_leaves(params)
    for path, leaf in leaves:
        checks.check_array(path, leaf)
    abstract = jax.eval_shape(tx.init, params)
    plans = plans_by_path(abstract)
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves}
    found = parts(abstract, shapes)
    nbytes = _bytes_by_owner(found)
    adamw = _bytes_by_owner(
        parts(jax.eval_shape(optax.adamw(1.0).init, params), shapes)
    )
    per_device: Counter[str | None] | None = None
    replicated: tuple[str, ...] = ()
    if state is not None:
        placed = _placed(found, state)
        per_device = _bytes_by_owner(found, placed)
        replicated = tuple(_replicated(found, placed, dict(leaves)))
    reports = tuple(
        _leaf_report(path, leaf, plans.get(path), nbytes[path], adamw[path], per_device)
        for path, leaf in leaves
    )
    return Report(
        reports,
        nbytes[None],
        nbytes.total(),
        adamw.total(),
        None if per_device is None else per_device.total(),
        replicated,
    )


def check_state_sharding(
    tx: optax.GradientTransformation, params: Any, state: Any
) -> None:
    """Raises an error if a factor is replicated although its parameter is sharded.

    Call it at the start of a training program whose state was sharded by a framework. A
    framework replicates an array whose axes it does not know, and the state may then
    take more memory on each device than AdamW's.

    Args:
      tx: Any optax transform.
      params: The parameters: arrays or `jax.ShapeDtypeStruct`s that carry shardings.
      state: The state on its devices, or its shardings; see `describe`.

    Raises:
      ValueError: A factor is replicated (the message names every such factor), or no
        parameter is on a mesh.
      What `describe` raises.

    Examples:
      >>> import jax
      >>> from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
      >>> import lorapre_jax as lp
      >>> mesh = AbstractMesh((8,), ("fsdp",))  # no devices are needed
      >>> rows = NamedSharding(mesh, PartitionSpec("fsdp"))
      >>> params = {"up": jax.ShapeDtypeStruct((256, 512), "float32", sharding=rows)}
      >>> tx = lp.lorapre_adamw(2e-3, rank=32)
      >>> lp.check_state_sharding(tx, params, lp.state_sharding(tx, params))
      >>> everywhere = NamedSharding(mesh, PartitionSpec())
      >>> wrong = jax.tree.map(lambda x: everywhere, jax.eval_shape(tx.init, params))
      >>> lp.check_state_sharding(tx, params, wrong)
      Traceback (most recent call last):
      ValueError: These factors are replicated, though their parameters are sharded: ...

    See also:
      `state_sharding`, `describe`; :doc:`meshes and hosts </meshes>`.
    """
    known = (known_sharding(leaf) for _, leaf in named_leaves(params))
    if not any(isinstance(sharding, NamedSharding) for sharding in known):
        raise ValueError(
            "check_state_sharding: no parameter carries a NamedSharding to compare "
            "with. Pass arrays on a mesh, or jax.ShapeDtypeStructs with sharding=."
        )
    replicated = describe(tx, params, state).replicated
    if replicated:
        raise ValueError(
            "These factors are replicated, though their parameters are sharded: "
            f"{', '.join(replicated)}. Compile `init` with "
            "`out_shardings=lorapre_jax.state_sharding(tx, params)`, or call it with "
            "parameters in boxes that name their axes."
        )


def _leaf_report(
    path, leaf, plan: LeafPlan | None, nbytes, adamw_nbytes, per_device
) -> LeafReport:
    view = plan and plan.view
    why, mend = _why_dense(plan)
    return LeafReport(
        path=path,
        shape=tuple(leaf.shape),
        dtype=jnp.dtype(leaf.dtype).name,
        batch_shape=view.batch_shape if view else None,
        p=view.p if view else None,
        q=view.q if view else None,
        rank=plan.rank if isinstance(plan, FactoredLeaf) else None,
        why_dense=why,
        mend=mend,
        methods=plan.methods if plan else (),
        nbytes=nbytes,
        adamw_nbytes=adamw_nbytes,
        device_nbytes=None if per_device is None else per_device[path],
    )


def _why_dense(plan: LeafPlan | None) -> tuple[str, str]:
    """Returns why a leaf is dense, and what to write to change that."""
    if plan is None:
        return "another transform", ""
    return (plan.why, plan.mend) if isinstance(plan, DenseLeaf) else ("", "")


def _bytes_by_owner(
    found: list[Part], placed: Mapping[str, Sharding] | None = None
) -> Counter[str | None]:
    """Counts bytes by parameter: on all devices together, or on one if `placed`."""
    nbytes: Counter[str | None] = Counter()
    for part in found:
        for name, array in part.arrays():
            shape = (
                array.shape if placed is None else placed[name].shard_shape(array.shape)
            )
            nbytes[part.owner] += math.prod(shape) * array.dtype.itemsize
    return nbytes


def _placed(found: list[Part], state: Any) -> dict[str, Sharding]:
    """Returns the sharding of each array by its path in the state of the transform."""
    given = dict(named_leaves(state))
    # Trees around the state, such as `nnx.state(optimizer)`, have longer paths.
    by_end: dict[str, str] = {}
    for path in sorted(given, key=len):
        keys = path.split("/")
        for i in range(len(keys)):
            by_end.setdefault("/".join(keys[i:]), path)
    arrays = {name: array for part in found for name, array in part.arrays()}
    leaves = {name: given.get(by_end.get(name, "")) for name in arrays}
    placed = {}
    for name, leaf in leaves.items():
        sharding = leaf if isinstance(leaf, Sharding) else _sharding_of(leaf)
        if sharding is None:
            raise ValueError(
                f"describe: the given state has no array or sharding '{name}'. Pass a "
                "state of this transform, or a tree of shardings with its structure."
            )
        placed[name] = sharding
    check_all_fit(state)
    for name, array in arrays.items():
        shape = getattr(leaves[name], "shape", array.shape)
        if shape != array.shape:
            raise ValueError(
                f"describe: '{name}' has shape {shape} in the given state, "
                f"and {array.shape} in the state of this transform. Pass a state of "
                "this transform for these parameters."
            )
    return placed


def _sharding_of(leaf: Any) -> Sharding | None:
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, Sharding) else None


def _replicated(
    found: list[Part], placed: Mapping[str, Sharding], params: Mapping[str, Any]
):
    """Yields the names of factors that are sharded less than their parameter's axes."""
    for part in found:
        owner = known_sharding(params.get(part.owner or ""))
        if owner is None or part.view is None:
            continue
        wanted = factor_shardings(owner, part.view, type(part.node))
        for (name, array), fair in zip(part.arrays(), wanted, strict=True):
            has, should = (
                math.prod(place.shard_shape(array.shape))
                for place in (placed[name], fair)
            )
            if has > should:
                yield name
