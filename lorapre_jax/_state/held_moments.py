"""Which moments the state of one transform holds, whether it is ours or optax's."""

from typing import Any

import optax

from lorapre_jax._leaves.moments import StoredMoment, stored_moments
from lorapre_jax._leaves.plan import has_plan
from lorapre_jax._moments.dense import Dense
from lorapre_jax._moments.factors import open_boxes
from lorapre_jax._state.translate import Moment
from lorapre_jax._trees.boxes import unboxed
from lorapre_jax._trees.paths import named_leaves

_ADAM = (("mu", "first"), ("nu", "second"))
_OPTAX = {
    optax.ScaleByAdamState: _ADAM,
    optax.ScaleByAmsgradState: _ADAM,
    optax.EmaState: (("ema", "first"),),
    optax.contrib.MuonState: (("mu", "first"),),
}
"""Which fields of optax's states hold moments, all of them dense."""


def holds_moments(node: Any) -> bool:
    """Whether a node of an optimizer state is the state of a transform with moments."""
    return type(node) in _OPTAX or has_plan(node)


def moment_fields(node: Any) -> list[StoredMoment]:
    """Returns the moments of one transform's state, each with all of its leaves."""
    if has_plan(node):
        return stored_moments(node)
    return [
        StoredMoment(name, order, i, getattr(node, name), {})
        for i, (name, order) in enumerate(_OPTAX[type(node)])
    ]


def moments_in(node: Any) -> dict[tuple[str, str], Moment]:
    """Returns the moments of one transform's state, by field and leaf path."""
    plans = {leaf.path: leaf for leaf in node.plan.leaves} if has_plan(node) else {}
    found: dict[tuple[str, str], Moment] = {}
    firsts: dict[str, Any] = {}
    for name, order, index, dense, factors in moment_fields(node):
        by_path = dict(named_leaves(dense))
        by_path |= {path: open_boxes(x) for path, x in factors.items()}
        for path, value in by_path.items():
            method, view = Dense(), None
            if path in factors:
                method, view = plans[path].methods[index], plans[path].view
            moment = Moment(path, order, method, value, view, unboxed(node.count))
            found[name, path] = moment._replace(first=firsts.get(path))
        firsts = {path: found[name, path].value for path in by_path}
    return found
