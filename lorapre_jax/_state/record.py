"""What a checkpoint should say of its state, and whether another state fits it."""

from collections.abc import Mapping
from typing import Any

from lorapre_jax._leaves.fit import check_all_fit
from lorapre_jax._leaves.plan import FactoredLeaf, LeafPlan, has_plan
from lorapre_jax._moments.methods import have_rank
from lorapre_jax._trees.paths import named_leaves

Record = Mapping[str, Mapping[str, Mapping[str, Any]]]


def state_record(state: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the decisions that a state was made by, to be saved beside its arrays.

    A checkpoint holds arrays only. Those of two states may have the same shapes and
    different meanings: other methods, or other axes of a square matrix.

    Args:
      state: The state of any transform; it may be abstract.

    Returns:
      A dictionary that JSON can hold. By place of each of this library's transforms in
      the state, and by leaf path, it has `shape`, `matrices`, `rank` and `moments`. It
      is empty if there is no such transform.

    Raises:
      ValueError: An array of the state does not have the shape that was decided, as
        after a restore into a state of another rank; the message names the leaf.

    Examples:
      >>> import jax
      >>> import lorapre_jax as lp
      >>> params = {"up": jax.ShapeDtypeStruct((256, 512), "float32")}
      >>> state = jax.eval_shape(lp.scale_by_lorapre_adam(rank=32).init, params)
      >>> record = lp.state_record(state)
      >>> print(record[""]["up"]["rank"], record[""]["up"]["moments"])
      32 ['LowRank', 'RotatedRankOne']

    See also:
      `check_state_record`; :doc:`checkpoints </checkpoints>`.
    """
    check_all_fit(state)
    return {
        place: {leaf.path: _of_leaf(leaf) for leaf in node.plan.leaves}
        for place, node in named_leaves(state, is_leaf=has_plan)
        if has_plan(node)
    }


def check_state_record(record: Record | None, state: Any) -> None:
    """Raises an error unless a state saved with `record` can be restored as `state`.

    Args:
      record: What `state_record` returned when the state was saved.
      state: The state to restore into, for example `jax.eval_shape(tx.init, params)`.

    Raises:
      ValueError: One or more leaves differ; the message lists all of them and what to
        call. Or `record` is not a record, for example None because nothing was
        recorded.
      What `state_record` raises.

    Examples:
      >>> import jax
      >>> import lorapre_jax as lp
      >>> params = {"up": jax.ShapeDtypeStruct((256, 512), "float32")}
      >>> saved = jax.eval_shape(lp.lorapre_adamw(2e-3, rank=32).init, params)
      >>> now = jax.eval_shape(lp.lorapre_adamw(2e-3, rank=16).init, params)
      >>> record = lp.state_record(saved)
      >>> lp.check_state_record(record, saved)
      >>> lp.check_state_record(record, now)
      Traceback (most recent call last):
      ValueError: The saved state is of another optimizer or model:
        up: rank 32 when saved, 16 now
      ...

    See also:
      `state_record`, `convert_state`; :doc:`checkpoints </checkpoints>`.
    """
    if not _is_record(record):
        raise ValueError(
            f"check_state_record: {record!r} is not a record of a state. Save what "
            "`state_record(state)` returns with the checkpoint, for example as Orbax's "
            "`custom_metadata`."
        )
    by_place, now_by_place = dict(record or {}), state_record(state)
    places = sorted({*by_place, *now_by_place})
    lines = []
    for place in places:
        saved, now = by_place.get(place, {}), now_by_place.get(place, {})
        where = f" (in '{place}' of the state)" if len(places) > 1 else ""
        lines += [
            f"  {path}{where}: {difference}"
            for path in [*saved, *(path for path in now if path not in saved)]
            if (difference := _difference(saved.get(path), now.get(path)))
        ]
    if lines:
        raise ValueError(
            "The saved state is of another optimizer or model:\n"
            + "\n".join(lines)
            + "\nTo continue from it, restore it into jax.eval_shape(saved_tx.init, "
            "params), where saved_tx is the transform that it was saved with. Then "
            "convert it: lorapre_jax.convert_state(state, tx, params). If the shape of "
            "a leaf differs, the state is of another model and cannot be converted."
        )


def _of_leaf(leaf: LeafPlan) -> dict[str, Any]:
    rank = sides = None
    if isinstance(leaf, FactoredLeaf):
        view = leaf.view
        sides = f"rows {list(view.row_axes)}, columns {list(view.column_axes)}"
        rank = leaf.rank if have_rank(leaf.methods) else None
    return {
        "shape": list(leaf.shape),
        "rank": rank,
        "matrices": sides,
        "moments": [type(method).__name__ for method in leaf.methods],
    }


def _is_record(record: Any) -> bool:
    def is_leaf(leaf: Any) -> bool:
        return isinstance(leaf, Mapping) and "moments" in leaf

    return isinstance(record, Mapping) and all(
        isinstance(leaves, Mapping) and all(map(is_leaf, leaves.values()))
        for leaves in record.values()
    )


def _difference(saved: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> str:
    """Returns in words how two entries of a record differ; empty if they do not."""
    if saved is None or now is None:
        return "not in the saved state" if saved is None else "only in the saved state"
    names = [name for name in now if saved.get(name) != now[name]]
    if "matrices" in names and None in (saved.get("matrices"), now["matrices"]):
        # One of them is dense, as the rank says, which explains all but the shape.
        names = [name for name in names if name in ("shape", "rank")] or names
    return "; ".join(
        f"{name} {saved.get(name)} when saved, {now[name]} now" for name in names
    )
