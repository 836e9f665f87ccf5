"""A running optimizer's moments, carried over into the state of another."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorapre_jax import _low_rank as low_rank
from lorapre_jax._matrix_view import MatrixView
from lorapre_jax._methods import (
    AlgorithmOne,
    Dense,
    FactorPair,
    OnlineRegression,
    RankOne,
    at_least_float32,
    mass,
    random_rows,
)
from lorapre_jax._selection import named_leaves

_FIRST = ("mu", "momentum", "ema")
_SECOND = "nu"
_UNBIASED = (OnlineRegression, RankOne)  # They hold the average itself.


class _Moment(NamedTuple):
    """One moment of one leaf, as a state keeps it."""

    path: str
    kind: str  # "first" or "second".
    method: Any
    value: Any  # Shaped like the leaf, or factors of its matrices.
    view: MatrixView | None
    count: jax.Array


def convert_state(
    state: optax.OptState,
    new_tx: optax.GradientTransformation,
    params: Any,
    *,
    b1: float | None = None,
    b2: float | None = None,
) -> Any:
    """The state with which `new_tx` goes on where another transform stopped.

    Moments are matched by leaf path, wherever in a chain they are kept: those of this
    library's transforms, and `mu` and `nu` of optax's Adam family and Muon. What is
    carried over is the bias-corrected average; of a second moment, its root:

    - Factors become factors of another rank by the best truncation of their product,
      or by padding, through matrices of the size of the ranks: nothing is (p, q).
    - A dense moment becomes factors by a randomised SVD with 8 directions more than the
      rank and 3 power iterations, one matrix at a time.
    - A dense second moment becomes exactly what `RankOne()` would hold.
    - Counts are kept; all other numbers are taken from the same place in the old state.

    Args:
      state: Of any transform, for the same parameters.
      new_tx: The transform that goes on.
      params: The parameters; the new state lies where `new_tx.init(params)` puts it.
      b1, b2: Decay rates of both transforms, which no state holds. Needed where a
        moment that starts from zero (`optax.adam`, `Dense()`, the paper's) is exchanged
        for one that holds the average itself (`OnlineRegression()`, `RankOne()`).

    Returns:
      A state like `new_tx.init(params)`.

    Raises:
      ValueError: The old state lacks a moment that the new one keeps, or keeps one
        twice, or a decay rate is needed, or factors are of differently chosen matrices.
        The message names the leaf.
    """
    old: dict[tuple[str, str], _Moment] = {}
    others = dict(named_leaves(state, is_leaf=_keeps_moments))
    for node in filter(_keeps_moments, others.values()):
        for moment in _moments(node).values():
            if (moment.path, moment.kind) in old:
                raise ValueError(
                    f"Leaf '{moment.path}': the state keeps two {moment.kind} moments. "
                    "Convert the parts of the chain one by one."
                )
            old[moment.path, moment.kind] = moment
    decays = {"first": b1, "second": b2}
    fresh = new_tx.init(params)
    nodes = named_leaves(fresh, is_leaf=_keeps_moments)
    carried = [
        _filled(node, old, decays)
        if _keeps_moments(node)
        else _same_place(name, node, others, old)
        for name, node in nodes
    ]
    structure = jax.tree.structure(fresh, is_leaf=_keeps_moments)
    return jax.tree.unflatten(structure, carried)


def _keeps_moments(node: Any) -> bool:
    fields = getattr(node, "_fields", ())
    return "count" in fields and any(name in fields for name in _FIRST)


def _moments(node: Any) -> dict[tuple[str, str], _Moment]:
    """All that one transform's state keeps, by field and leaf path."""
    plan = getattr(node, "plan", None)
    plans = {leaf.path: leaf for leaf in plan.leaves} if plan else {}
    found = {}
    for field in (*_FIRST, _SECOND):
        if field not in node._fields:
            continue
        factors = getattr(node, f"{field}_factors", {})
        for path, value in [*named_leaves(getattr(node, field)), *factors.items()]:
            leaf = plans.get(path)
            method, view = Dense(), None
            if leaf is not None:
                method, view = leaf.methods[field == _SECOND], leaf.view
            kind = "second" if field == _SECOND else "first"
            found[field, path] = _Moment(path, kind, method, value, view, node.count)
    return found


def _filled(node: Any, old: dict[tuple[str, str], _Moment], decays: Any) -> Any:
    """A fresh state with the moments and the count of the old one."""
    values: dict[str, dict[str, Any]] = {}
    count = node.count
    for (field, path), moment in _moments(node).items():
        if (path, moment.kind) not in old:
            raise ValueError(
                f"Leaf '{path}': the old state keeps no {moment.kind} moment of it. "
                "Start from new_tx.init(params), or take a transform that needs none."
            )
        source = old[path, moment.kind]
        count = source.count
        values.setdefault(field, {})[path] = _converted(source, moment, decays)
    fields: dict[str, Any] = {}
    for field, by_path in values.items():
        tree = getattr(node, field)
        kept = [by_path[path] for path, _ in named_leaves(tree)]
        fields[field] = jax.tree.unflatten(jax.tree.structure(tree), kept)
        if factors := getattr(node, f"{field}_factors", {}):
            fields[f"{field}_factors"] = {path: by_path[path] for path in factors}
    return node._replace(count=_placed(count, node.count), **fields)


def _same_place(name: str, fresh: Any, others: dict[str, Any], old: Any) -> Any:
    found = others.get(name)
    if found is None and name.split("/")[-1] == "count" and old:
        found = next(iter(old.values())).count  # A schedule's, elsewhere in the chain.
    if found is None or jnp.shape(found) != jnp.shape(fresh):
        raise ValueError(
            f"The new state has '{name}' of shape {jnp.shape(fresh)}, and the old one "
            "nothing like it there. Convert the parts of the chain one by one."
        )
    return _placed(found, fresh)


def _placed(value: Any, like: jax.Array) -> jax.Array:
    return jax.device_put(jnp.asarray(value, like.dtype), like.sharding)


def _converted(old: _Moment, new: _Moment, decays: dict[str, float | None]) -> Any:
    """A value for `new` that means what that of `old` means."""
    if type(old.method) is type(new.method) is Dense:
        return _placed(old.value, new.value)
    both_factored = not (type(old.method) is Dense or type(new.method) is Dense)
    view: Any = new.view or old.view
    if both_factored and old.view != new.view:
        raise ValueError(
            f"Leaf '{old.path}': its factors are of other matrices, {old.view}, than "
            f"the new ones, {new.view}. Convert to `Dense()` first, then to these."
        )
    ratio: Any = 1.0
    if type(old.method) is not type(new.method):
        decay = decays[new.kind]
        ratio = _correction(old, decay) / _correction(
            new._replace(count=old.count), decay
        )
    program = _program(
        (type(old.method), type(new.method)),
        new.kind,
        view,
        new.value.right.shape[-2] if isinstance(new.value, FactorPair) else None,
        jax.tree.map(lambda x: x.dtype, new.value),
        jax.tree.map(lambda x: x.sharding, new.value),
    )
    return program(old.value, jnp.asarray(ratio))


@functools.lru_cache(maxsize=1024)  # Layers that are alike are compiled once.
def _program(methods, kind: str, view: MatrixView, rank, dtypes, places) -> Any:
    """`(value, ratio) -> value`, compiled."""
    old, new = methods
    squared = kind == "second"

    def run(value, ratio):
        compute = at_least_float32(*(x.dtype for x in jax.tree.leaves(value)))
        value = jax.tree.map(lambda x: x.astype(compute), value)
        if old is Dense:
            value = view.to_matrix(jnp.sqrt(value) if squared else value)

        def on_matrix(x):
            return _scaled(_kept_by(new, x, rank), ratio.astype(compute))

        value = low_rank.over_batch(on_matrix, len(view.batch))(value)
        if new is Dense:
            value = view.from_matrix(jnp.square(value) if squared else value)
        return jax.tree.map(lambda x, dtype: x.astype(dtype), value, dtypes)

    program: Any = run
    meshes = [getattr(place, "mesh", None) for place in jax.tree.leaves(places)]
    if any(mesh is not None and mesh.explicit_axes for mesh in meshes):
        program = jax.sharding.auto_axes(run, out_sharding=places)
    return jax.jit(program, out_shardings=places)


def _kept_by(method: type, x: low_rank.Matrix, rank: int | None) -> low_rank.Matrix:
    if method is Dense:
        return low_rank.as_dense(x)
    if method is RankOne:
        return low_rank.as_row_column(x)
    assert rank is not None
    pair = low_rank.as_factors(x, rank)
    if method is AlgorithmOne:
        # Its step cannot leave a pair of zeros.
        noise = 0.02 * random_rows(0, *pair.right.shape).astype(pair.right.dtype)
        empty = jnp.all(pair.right == 0, axis=1, keepdims=True)
        return FactorPair(
            jnp.where(empty.T, 0, pair.left), jnp.where(empty, noise, pair.right)
        )
    return pair


def _scaled(x: low_rank.Matrix, ratio: jax.Array) -> low_rank.Matrix:
    if isinstance(x, FactorPair):
        return x._replace(right=ratio * x.right)
    return jax.tree.map(lambda part: ratio * part, x)


def _correction(moment: _Moment, decay: float | None) -> Any:
    """What turns the value (of a second moment, its root) into the average."""
    if isinstance(moment.method, _UNBIASED):
        return 1.0
    if decay is None:
        name = {"first": "b1", "second": "b2"}[moment.kind]
        raise ValueError(
            f"Leaf '{moment.path}': its {moment.kind} moment starts from zero on one "
            "side and holds the bias-corrected average on the other. Pass "
            f"{name}=, the decay rate, to translate."
        )
    decay_rate, count = jnp.asarray(decay, jnp.float32), moment.count
    if moment.kind == "second" and isinstance(moment.method, AlgorithmOne):
        total = mass(jnp.sqrt(decay_rate), count)  # It follows |g|.
    elif moment.kind == "second":
        total = jnp.sqrt(mass(decay_rate, count))
    else:
        total = mass(decay_rate, count)
    return 1 / jnp.where(count > 0, total, 1)
