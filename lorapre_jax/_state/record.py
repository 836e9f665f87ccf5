"""What a checkpoint should say of its state, and whether another state fits it."""

from collections.abc import Mapping
from typing import Any

from lorapre_jax._leaves.fit import check_all_fit
from lorapre_jax._leaves.plan import FactoredLeaf, LeafPlan, has_plan
from lorapre_jax._moments.methods import have_rank
from lorapre_jax._trees.paths import named_leaves

Record = Mapping[str, Mapping[str, Mapping[str, Any]]]


def state_record(state: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """The decisions that a state was made by, to be saved beside its arrays.

    A checkpoint holds arrays alone, and those of two states may have the same shapes
    and mean different things: other methods, other axes of a square matrix.

    Args:
      state: Of any transform; abstract values do.

    Returns:
      JSON-able: by place of each of this library's transforms in the state, and by leaf
      path, `shape`, `matrices`, `rank` and `moments`. Empty where there are none.

    Raises:
      ValueError: An array of the state has not the shape that was decided, as after a
        restore into a state of another rank; the message names the leaf.
    """
    check_all_fit(state)
    return {
        place: {leaf.path: _of_leaf(leaf) for leaf in node.plan.leaves}
        for place, node in named_leaves(state, is_leaf=has_plan)
        if has_plan(node)
    }


def check_state_record(record: Record | None, state: Any) -> None:
    """Raises unless a state saved with `record` can be restored as `state`.

    Args:
      record: What `state_record` returned then.
      state: What is to be restored; `jax.eval_shape(tx.init, params)` does.

    Raises:
      ValueError: One or more leaves differ; all are listed, with what to call. Or
        `record` is none, for example None where nothing was recorded. What
        `state_record` raises.
    """
    if not _is_record(record):
        raise ValueError(
            f"{record!r} is no record of a state. Save what `state_record` returns, "
            "as the checkpoint's `custom_metadata` or under a key of it."
        )
    here, saved = state_record(state), dict(record or {})
    places = sorted({*saved, *here})
    lines = []
    for place in places:
        there, now = saved.get(place, {}), here.get(place, {})
        where = f" (of '{place}' in the state)" if len(places) > 1 else ""
        lines += [
            f"  {path}{where}: {difference}"
            for path in [*there, *(path for path in now if path not in there)]
            if (difference := _difference(there.get(path), now.get(path)))
        ]
    if lines:
        raise ValueError(
            "The saved state is of another optimizer or model:\n"
            + "\n".join(lines)
            + "\nRestore it as jax.eval_shape(saved_tx.init, params) of the transform "
            "that saved it, then carry it over to this one: "
            "lorapre_jax.convert_state(state, tx, params). A leaf of another shape is "
            "of another model, whose state cannot be carried over."
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


def _difference(there: Mapping[str, Any] | None, here: Mapping[str, Any] | None) -> str:
    """In words; empty where there is none."""
    if there is None or here is None:
        return "only here" if there is None else "only there"
    names = [name for name in here if there.get(name) != here[name]]
    if "matrices" in names and None in (there.get("matrices"), here["matrices"]):
        # That it is dense says all but the shape, where a rank says it.
        names = [name for name in names if name in ("shape", "rank")] or names
    return "; ".join(
        f"{name} {there.get(name)} there, {here[name]} here" for name in names
    )
