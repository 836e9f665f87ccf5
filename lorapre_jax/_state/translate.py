"""Converts one moment of one leaf from one way of keeping it to another."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorapre_jax._moments import representations as low_rank
from lorapre_jax._moments.factors import FactorPair, is_factors
from lorapre_jax._moments.methods import (
    AlgorithmOne,
    Dense,
    LowRank,
    RankOne,
    RotatedRankOne,
)
from lorapre_jax._numerics.arrays import at_least_float32, random_columns
from lorapre_jax._numerics.averages import mass
from lorapre_jax._trees.matrix_view import MatrixView


class Moment(NamedTuple):
    """One moment of one leaf, as a state keeps it."""

    path: str
    kind: str  # "first" or "second".
    method: Any
    value: Any  # Shaped like the leaf, or factors of its matrices.
    view: MatrixView | None
    count: jax.Array
    first: Any = None
    """With a second moment, the first one of the same leaf: factors, or dense."""

    @property
    def is_factored(self) -> bool:
        return not isinstance(self.method, Dense)

    @property
    def is_empty(self) -> bool:
        """Whether the leaf has no elements."""
        return not self.is_factored and self.value.size == 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf."""
        return self.view.shape if self.view and self.is_factored else self.value.shape

    @property
    def devices(self) -> set[Any]:
        return {d for x in jax.tree.leaves(self.value) for d in x.devices()}


def translated(old: Moment, new: Moment, decay: float | None) -> Any:
    """Returns a value for `new` that means what the value of `old` means."""
    if old.shape != new.shape:
        raise ValueError(
            f"Leaf '{old.path}': the old moment is of shape {old.shape}, the new one "
            f"of {new.shape}."
        )
    if _are_alike(old, new):
        return old.value
    if old.is_factored and new.is_factored and old.view != new.view:
        raise ValueError(
            f"Leaf '{old.path}': its factors are of other matrices, {old.view}, than "
            f"the new ones, {new.view}. Convert to `Dense()` first, then to these."
        )
    if old.devices != new.devices:
        raise ValueError(
            f"Leaf '{old.path}': its moment lies on other devices than the parameter. "
            "Move the state first: jax.device_put(state, state_sharding(tx, params))."
        )
    view: Any = old.view if old.is_factored else new.view
    program = _program(
        (type(old.method), type(new.method)),
        new.kind,
        view,
        new.value.right.shape[-1] if isinstance(new.value, FactorPair) else None,
        jax.tree.map(lambda x: x.dtype, new.value),
        jax.tree.map(lambda x: x.sharding, new.value),
    )
    ratio = jnp.asarray(_ratio(old, new.method, decay))
    rotates = [isinstance(x.method, RotatedRankOne) for x in (old, new)]
    before, after = old.first if any(rotates) else None, new.first
    return program(old.value, ratio, before, after if rotates[1] else None)


def forget_programs() -> None:
    _program.cache_clear()


@functools.lru_cache(maxsize=1024)  # Layers that are alike are compiled once.
def _program(methods, kind: str, view: MatrixView, rank, dtypes, places) -> Any:
    """Returns the compiled `(value, ratio, old first moment, new one) -> value`."""
    old, new = methods
    squared = kind == "second"

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
    return (
        type(old.method) is type(new.method)
        and (old.view == new.view or not old.is_factored)
        and shapes[0] == shapes[1]
    )


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


def _ratio(old: Moment, method: Any, decay: float | None) -> Any:
    """Returns the ratio of new to old values; of second moments, of their roots."""
    if _start(old.method, old.kind) == _start(method, old.kind):
        return 1.0
    if decay is None:
        name = {"first": "b1", "second": "b2"}[old.kind]
        raise ValueError(
            f"Leaf '{old.path}': the two ways to keep its {old.kind} moment differ by "
            f"the bias correction. Pass the decay rate, {name}=, to translate."
        )
    rate = jnp.asarray(decay, jnp.float32)
    new, before = (
        _mass(_start(m, old.kind), rate, old.count) for m in (method, old.method)
    )
    return new / before


def _start(method: Any, kind: str) -> str:
    """Returns which value a moment is biased towards at the start."""
    if isinstance(method, (LowRank, RankOne, RotatedRankOne)):
        return "nowhere"  # The value is the average itself.
    if kind == "first":
        return "zero"
    return "zero of |g|" if isinstance(method, AlgorithmOne) else "zero of g^2"


def _mass(start: str, decay: jax.Array, count: jax.Array) -> jax.Array:
    """Returns the share of the average in the value; of second moments, of roots."""
    total = {
        "nowhere": jnp.ones(()),
        "zero": mass(decay, count),
        "zero of |g|": mass(jnp.sqrt(decay), count),
        "zero of g^2": jnp.sqrt(mass(decay, count)),
    }[start]
    return jnp.where(count > 0, total, 1)
