"""The state lies where its parameter lies.

A left factor is sharded as the parameter's rows, a right factor as its columns, both as
its batch axes; the rank axis is replicated.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
from jax.sharding import NamedSharding, PartitionSpec

from lorapre_jax._matrix_view import MatrixView


def like_parameter(init: Callable[[], Any], param: Any, view: MatrixView) -> Any:
    """`init()`, a factored state, placed by the sharding that `param` carries, if any.

    A fused side follows its first axis, the only one whose shards stay contiguous.
    """
    sharding = named_sharding(param)
    if sharding is None:
        return init()
    spec = (*sharding.spec, *[None] * (len(view.shape) - len(sharding.spec)))
    side = {
        "row": spec[view.row_axes[0]],
        "column": spec[view.column_axes[0]],
        "rank": None,
    }
    batch = [spec[axis] for axis in view.batch_axes]
    state = jax.eval_shape(init)
    shardings = type(state)(
        *(
            NamedSharding(sharding.mesh, PartitionSpec(*batch, *map(side.get, axes)))
            for axes in state.axes
        )
    )
    if isinstance(param, jax.core.Tracer):
        return jax.tree.map(jax.sharding.reshard, init(), shardings)
    # Compiled, no device ever holds more than its shard.
    return jax.jit(init, out_shardings=shardings)()


def batch_shards(param: Any, view: MatrixView) -> int:
    """Over how many devices the first batch axis is sharded, as far as is known."""
    sharding = named_sharding(param)
    if sharding is None or not view.batch_axes:
        return 1
    spec = (*sharding.spec, *[None] * len(view.shape))[view.batch_axes[0]]
    axes = spec if isinstance(spec, tuple) else (spec,)
    return math.prod(sharding.mesh.shape[axis] for axis in axes if axis is not None)


def named_sharding(param: Any) -> NamedSharding | None:
    """The mesh sharding of an array, abstract value or tracer that knows its own."""
    if isinstance(param, jax.core.Tracer):
        sharding = jax.typeof(param).sharding
        return sharding if sharding.mesh.explicit_axes else None
    sharding = getattr(param, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def with_auto_axes(fn: Callable[..., Any], g: jax.Array, states: Any) -> Any:
    """`fn(hyper, g, *states) -> (update, *states)`, also under explicit mesh axes.

    There JAX wants to be told the sharding of every contraction of sharded dimensions.
    The compiler knows better; only the results are pinned, to where the arguments lie.
    """
    if not jax.typeof(g).sharding.mesh.explicit_axes:
        return fn
    out = jax.tree.map(lambda x: jax.typeof(x).sharding, (g, *states))
    return jax.sharding.auto_axes(fn, out_sharding=out)


def replicated_result(fn: Callable[..., Any], g: jax.Array) -> Callable[..., Any]:
    """`fn(g, ...)`, also under explicit mesh axes, with results on every device."""
    mesh = jax.typeof(g).sharding.mesh
    if not mesh.explicit_axes:
        return fn
    return jax.sharding.auto_axes(fn, out_sharding=NamedSharding(mesh, PartitionSpec()))
