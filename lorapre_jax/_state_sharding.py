"""Where every array of an optimizer state belongs, before any of it exists."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from lorapre_jax._memory import is_factors, parts, plans_by_path
from lorapre_jax._selection import named_leaves
from lorapre_jax._sharding import factor_shardings


def state_sharding(tx: optax.GradientTransformation, params: Any) -> Any:
    """The sharding of every array of `tx.init(params)`.

    For `jax.jit(tx.init, out_shardings=...)`, for the state among the `out_shardings`
    of a training step, for `jax.device_put`, and for an Orbax restore. It is what an
    eager `init` chooses by itself; a compiled one under Auto mesh axes does not see
    where its arguments lie, and has to be told.

    A left factor is sharded as the parameter's batch axes and rows, a right one as its
    batch axes and columns; the rank axis is replicated. Any other array that stands in
    a parameter's place with its shape (a dense moment, an accumulated gradient) is
    sharded like it. All else, such as a counter, is replicated.

    Args:
      tx: Any optax transform.
      params: Arrays, or `jax.ShapeDtypeStruct`s with `sharding=`. Nothing is allocated.

    Returns:
      A tree like the state, of `jax.sharding.Sharding`s.

    Raises:
      ValueError: A parameter carries no sharding, or one of which a factor cannot have
        its share; the message names the leaf and the mesh axis.
      What `tx.init` raises.
    """
    shardings = {path: _known(path, leaf) for path, leaf in named_leaves(params)}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    shapes = {path: leaf.shape for path, leaf in named_leaves(abstract)}
    state = jax.eval_shape(tx.init, abstract)
    plans = plans_by_path(state)
    everywhere = _replicated(next(iter(shardings.values())))

    def place(owner: str | None, node: Any) -> Any:
        if owner is None:
            return everywhere
        sharding = shardings[owner]
        if is_factors(node):
            view: Any = plans[owner].view
            return factor_shardings(sharding, owner, view, type(node))
        return sharding if node.shape == shapes[owner] else _replicated(sharding)

    placed = [place(owner, node) for owner, node in parts(state, shapes)]
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(placed))


def _known(path: str, leaf: Any) -> Sharding:
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, (NamedSharding, SingleDeviceSharding)):
        return sharding
    raise ValueError(
        f"Leaf '{path}' carries no sharding that tells what each axis is divided over "
        f"(it has {sharding!r}). Pass arrays that were placed with a NamedSharding, or "
        "jax.ShapeDtypeStructs with sharding=."
    )


def _replicated(sharding: Sharding) -> Sharding:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding
