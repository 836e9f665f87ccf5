"""Shards the state like its parameters.

A left factor is sharded like the parameter's row axes, a right factor like its column
axes, and both like its batch axes; the rank axis is replicated.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from lorapre_jax._trees.matrix_view import MatrixView


def like_parameter(init: Callable[[], Any], param: Any, view: MatrixView) -> Any:
    """Returns `init()`, a factored state, sharded like `param` if that is known."""
    sharding = known_sharding(param)
    if sharding is None:
        return init()
    shardings = factor_shardings(sharding, view, type(jax.eval_shape(init)))
    if isinstance(param, jax.core.Tracer):
        return jax.tree.map(jax.sharding.reshard, init(), shardings)
    # It is compiled so that no device ever holds more than its shard.
    return jax.jit(init, out_shardings=shardings)()


def factor_shardings(sharding: Sharding, view: MatrixView, kind: type[Any]) -> Any:
    """Returns a `kind` of shardings, from the sharding of the parameter."""
    if not isinstance(sharding, NamedSharding):
        return kind(*[sharding] * len(kind.sides))
    spec = _full_spec(sharding, view)

    def of(sides) -> NamedSharding:
        axes = view.factor_axes(sides)
        entries = (None if axis is None else spec[axis] for axis in axes)
        return sharding.update(spec=PartitionSpec(*entries))

    return kind(*map(of, kind.sides))


def entries_of(sharding: NamedSharding, path: str, view: MatrixView):
    """Returns the entries of the spec: of the batch axes, the rows and the columns."""
    spec = _full_spec(sharding, view)
    row, column = (
        _fused(sharding.mesh, spec, axes, path, view)
        for axes in (view.row_axes, view.column_axes)
    )
    return tuple(spec[axis] for axis in view.batch_axes), row, column


def _full_spec(sharding: NamedSharding, view: MatrixView) -> tuple[Any, ...]:
    return (*sharding.spec, *[None] * (len(view.shape) - len(sharding.spec)))


def _fused(mesh: Any, spec: Sequence[Any], axes, path: str, view: MatrixView):
    """Returns the entry of a fused side: that of its first axis longer than one."""
    first, *rest = [axis for axis in axes if view.shape[axis] > 1] or axes[:1]
    for axis in rest:
        if _parts(mesh, spec[axis]) > 1:
            raise ValueError(
                f"Leaf '{path}' of shape {view.shape}: axis {axis} is sharded over "
                f"mesh axis {spec[axis]!r}, but its matrix fuses it behind axis "
                f"{first}, and a shard would be no contiguous part of that side. "
                f"Shard axis {first} instead, or name the axes so that axis {axis} "
                "comes first or is a batch axis."
            )
    return spec[first]


def replicated_zero(params: Any) -> jax.Array:
    """Returns a counter, `()` int32, on all devices of the parameters' mesh."""
    known = filter(None, map(known_sharding, jax.tree.leaves(params)))
    return jnp.zeros([], jnp.int32, device=replicated(known))


def replicated(known: Iterable[Sharding]) -> Sharding | None:
    """Returns the replicated sharding on the first mesh among `known`.

    Without a mesh, it is the first sharding; None if there is none.
    """
    shardings = list(known)
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    if meshes:
        return NamedSharding(meshes[0], PartitionSpec())
    return shardings[0] if shardings else None


def batch_shards(param: Any, view: MatrixView) -> int:
    """Returns over how many devices the first batch axis is known to be sharded."""
    sharding = known_sharding(param)
    if not isinstance(sharding, NamedSharding) or not view.batch_axes:
        return 1
    return _parts(sharding.mesh, _full_spec(sharding, view)[view.batch_axes[0]])


def _parts(mesh: Any, entry: Any) -> int:
    """Returns over how many devices an entry of a spec shards its axis."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes(entry))


def mesh_axes(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes that an entry of a spec names."""
    axes = entry if isinstance(entry, tuple) else (entry,)
    return tuple(axis for axis in axes if axis is not None)


def known_sharding(param: Any) -> Sharding | None:
    """Returns the sharding, or None if it was never set explicitly.

    Accepts arrays, abstract values and tracers.
    """
    if isinstance(param, jax.core.Tracer):
        sharding = jax.typeof(param).sharding
        return sharding if sharding.mesh.explicit_axes else None
    sharding = getattr(param, "sharding", None)
    if isinstance(sharding, NamedSharding):
        return sharding
    # JAX moves an array that is not committed to the devices of the others.
    chosen = isinstance(param, jax.Array) and param.committed
    return sharding if chosen and isinstance(sharding, SingleDeviceSharding) else None


def with_auto_axes(fn: Callable[..., Any], *arrays: Any) -> Any:
    """Returns `fn(rule, *arrays)` for explicit axes too, with results sharded like
    `arrays`.

    Under explicit mesh axes JAX has to be told the sharding of every contraction of
    sharded axes. The compiler knows better, so only the results are pinned.
    """
    places = jax.tree.map(lambda x: jax.typeof(x).sharding, arrays)
    if not jax.tree.leaves(places)[0].mesh.explicit_axes:
        return fn
    return jax.sharding.auto_axes(fn, out_sharding=places)


def replicated_result(fn: Callable[..., Any], g: jax.Array) -> Callable[..., Any]:
    """Returns `fn(g, ...)` for explicit axes too, with replicated results."""
    mesh = jax.typeof(g).sharding.mesh
    if not mesh.explicit_axes:
        return fn
    return jax.sharding.auto_axes(fn, out_sharding=NamedSharding(mesh, PartitionSpec()))
