"""Converts one moment of one leaf from one way of keeping it to another."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorapre_jax._moments import representations as low_rank
from lorapre_jax._moments.algorithm_one import AlgorithmOne
from lorapre_jax._moments.dense import Dense
from lorapre_jax._moments.factors import FactorPair, is_factors
from lorapre_jax._moments.row_column import RankOne, RotatedRankOne
from lorapre_jax._numerics.arrays import at_least_float32, random_columns
from lorapre_jax._trees.matrix_view import MatrixView


class Moment(NamedTuple):
    """One moment of one leaf, as a state keeps it."""

    path: str
    order: str  # "first" or "second".
    method: Any
    value: Any  # Shaped like the leaf, or factors of its matrices.
    view: MatrixView | None  # The matrices of factors; None for a dense moment.
    count: jax.Array
    first: Any = None
    """With a second moment, the first one of the same leaf: factors, or dense."""

    @property
    def is_empty(self) -> bool:
        """Whether the leaf has no elements."""
        return self.view is None and self.value.size == 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf."""
        return self.value.shape if self.view is None else self.view.shape

    @property
    def devices(self) -> set[Any]:
        return {d for x in jax.tree.leaves(self.value) for d in x.devices()}

    @property
    def weight(self) -> Any:
        """The weight function of the method; see `lorapre_jax._moments.methods`."""
        return getattr(self.method, f"{self.order}_weight")


def translated(old: Moment, new: Moment, decay: float | None) -> Any:
    """Returns a value for `new` that means what the value of `old` means."""
    if old.shape != new.shape:
        raise ValueError(
            f"Leaf '{old.path}': the old moment has shape {old.shape}, and the new one "
            f"{new.shape}. Pass the state that belongs to these parameters."
        )
    view = new.view if old.view is None else old.view
    if view is None or _are_alike(old, new):
        return old.value
    if old.view is not None and new.view is not None and old.view != new.view:
        raise ValueError(
            f"Leaf '{old.path}': the old factors are of matrices with "
            f"{_sides(old.view)}, and the new ones of matrices with "
            f"{_sides(new.view)}. Convert to a transform that keeps `Dense()` moments "
            "first, and its state to `new_tx`."
        )
    if old.devices != new.devices:
        raise ValueError(
            f"Leaf '{old.path}': its moment is not on the devices of the parameter. "
            "Move the state first: jax.device_put(state, lorapre_jax.state_sharding("
            "old_tx, params)), where old_tx is the transform that it is a state of."
        )
    program = _program(
        (type(old.method), type(new.method)),
        new.order,
        view,
        new.value.right.shape[-1] if isinstance(new.value, FactorPair) else None,
        jax.tree.map(lambda x: x.dtype, new.value),
        jax.tree.map(lambda x: x.sharding, new.value),
    )
    ratio = jnp.asarray(_ratio(old, new, decay))
    rotates = [isinstance(x.method, RotatedRankOne) for x in (old, new)]
    before, after = old.first if any(rotates) else None, new.first
    return program(old.value, ratio, before, after if rotates[1] else None)


def _sides(view: MatrixView) -> str:
    return f"rows {list(view.row_axes)} and columns {list(view.column_axes)}"


def forget_programs() -> None:
    _program.cache_clear()


@functools.lru_cache(maxsize=1024)  # Layers that are alike are compiled once.
def _program(methods, order: str, view: MatrixView, rank, dtypes, places) -> Any:
    """Returns the compiled `(value, ratio, old first moment, new one) -> value`."""
    old, new = methods
    squared = order == "second"

    def as_matrices(x):
        if x is None:
            return None
        return view.fuse(x) if is_factors(x) else view.to_matrix(x)

    def run(value, ratio, before, after):
        compute = at_least_float32(*(x.dtype for x in jax.tree.leaves(value)))
        everything = value, ratio, before, after
        value, ratio, before, after = jax.tree.map(
            lambda x: x.astype(compute), everything
        )
        if old is Dense and squared:
            value = jnp.sqrt(value)
        value, before, after = map(as_matrices, (value, before, after))
        m = None
        if before is not None and not isinstance(before, FactorPair):
            before, m = None, before

        def on_matrix(each):
            x, before, after, m = each
            known = None
            if old is RotatedRankOne:
                known = x, before.left
                x = low_rank.unrotated(*known)
            if new is not RotatedRankOne:
                return _scaled(_kept_by(new, x, rank), ratio)
            whole: Any = _scaled(low_rank.as_row_column(x), ratio)
            return low_rank.rotated(whole, after, known, m)

        over_batch = low_rank.one_by_one(on_matrix, len(view.batch_shape))
        value = over_batch((value, before, after, m))
        if new is Dense:
            value = view.from_matrix(jnp.square(value) if squared else value)
        else:
            value = view.unfuse(value)
        return jax.tree.map(lambda x, dtype: x.astype(dtype), value, dtypes)

    program: Any = run
    meshes = [getattr(place, "mesh", None) for place in jax.tree.leaves(places)]
    if any(mesh is not None and mesh.explicit_axes for mesh in meshes):
        program = jax.sharding.auto_axes(run, out_sharding=places)
    return jax.jit(program, out_shardings=places)


def _are_alike(old: Moment, new: Moment) -> bool:
    """Whether both are kept in the same way, so that there is nothing to translate."""
    shapes = [jax.tree.map(jnp.shape, x.value) for x in (old, new)]
    is_same_method = type(old.method) is type(new.method)
    return is_same_method and old.view == new.view and shapes[0] == shapes[1]


def _kept_by(method: type, x: low_rank.Matrix, rank: int | None) -> low_rank.Matrix:
    if method is Dense:
        return low_rank.as_dense(x)
    if method is RankOne:
        return low_rank.as_row_column(x)
    assert rank is not None
    pair = low_rank.as_factors(x, rank)
    if method is AlgorithmOne:
        # The paper's step never leaves a pair of zeros.
        noise = 0.02 * random_columns(0, *pair.right.shape).astype(pair.right.dtype)
        empty = jnp.all(pair.right == 0, axis=0)
        return FactorPair(
            jnp.where(empty, 0, pair.left), jnp.where(empty, noise, pair.right)
        )
    return pair


def _scaled(x: low_rank.Matrix, ratio: jax.Array) -> low_rank.Matrix:
    if isinstance(x, FactorPair):
        return x._replace(right=ratio * x.right)
    return jax.tree.map(lambda part: ratio * part, x)


def _ratio(old: Moment, new: Moment, decay: float | None) -> Any:
    """Returns the ratio of new to old values; of second moments, of their roots."""
    if old.weight is new.weight:
        return 1.0
    if decay is None:
        name = {"first": "b1", "second": "b2"}[old.order]
        raise ValueError(
            f"Leaf '{old.path}': the old state and the new one keep its {old.order} "
            "moment with different bias corrections, which depend on the decay rate. "
            f"Pass it to convert_state as {name}=."
        )
    rate, count = jnp.asarray(decay, jnp.float32), old.count
    after, before = new.weight(rate, count), old.weight(rate, count)
    return jnp.where(count > 0, after, 1) / jnp.where(count > 0, before, 1)
