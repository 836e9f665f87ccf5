"""Where every array of an optimizer state belongs, before the state exists."""

from typing import Any

import jax
import optax
from jax.sharding import Sharding, SingleDeviceSharding

from lorapre_jax._leaves import checks
from lorapre_jax._state.parts import Part, parts
from lorapre_jax._trees.paths import named_leaves
from lorapre_jax._trees.sharding import factor_shardings, known_sharding, replicated


def state_sharding(tx: optax.GradientTransformation, params: Any) -> Any:
    """Returns the sharding of every array of `tx.init(params)`.

    It is for `jax.jit(tx.init, out_shardings=...)`, for the state among the
    `out_shardings` of a training step, for `jax.device_put`, and for an Orbax restore.
    An eager `init` shards the state like this by itself. A compiled `init` under Auto
    mesh axes does not see the shardings of its arguments and has to be told.

    A left factor is sharded like the parameter's batch axes and rows, a right factor
    like its batch axes and columns; the rank axis is replicated. Any other array that
    is in a parameter's place and has its shape (a dense moment, an accumulated
    gradient) is sharded like the parameter. All other arrays, such as a counter, are
    replicated.

    Args:
      tx: Any optax transform.
      params: Arrays, or `jax.ShapeDtypeStruct`s with `sharding=`. Nothing is allocated.
        An array that was never placed counts as replicated on the mesh of the others.

    Returns:
      A tree like the state, of `jax.sharding.Sharding`s.

    Raises:
      ValueError: A parameter carries no sharding; the message names the leaf.
      TypeError: A parameter is not an array; the message names the leaf.
      What `tx.init` raises.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> import lorapre_jax as lp
      >>> mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
      >>> rows = NamedSharding(mesh, PartitionSpec("fsdp"))
      >>> params = {"up": jax.device_put(jnp.zeros((256, 512)), rows)}
      >>> tx = lp.lorapre_adamw(2e-3, rank=32)
      >>> shardings = lp.state_sharding(tx, params)
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
      >>> print(tuple(state[0].mu_factors["up"].left.sharding.spec))
      ('fsdp', None)

    See also:
      `check_state_sharding`; :doc:`meshes and hosts </meshes>`; :doc:`checkpoints
      </checkpoints>`.
    """
    leaves = named_leaves(params)
    if not leaves:
        raise ValueError(
            "state_sharding: the parameters have no leaves, and the state is sharded "
            "like them. Pass the parameters that the state is for."
        )
    for path, leaf in leaves:
        checks.check_array(path, leaf)
    everywhere = replicated(filter(None, (known_sharding(x) for _, x in leaves)))
    shardings = {path: _known(path, leaf, everywhere) for path, leaf in leaves}
    everywhere = everywhere or next(iter(shardings.values()))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves}
    state = jax.eval_shape(tx.init, abstract)

    def place(part: Part) -> Any:
        if part.owner is None:
            return everywhere
        own = shardings[part.owner]
        if part.view is not None:
            return factor_shardings(own, part.view, type(part.node))
        return own if part.node.shape == shapes[part.owner] else everywhere

    placed = [place(part) for part in parts(state, shapes)]
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(placed))


def _known(path: str, leaf: Any, everywhere: Sharding | None) -> Sharding:
    if (known := known_sharding(leaf)) is not None:
        return known
    if isinstance(leaf, jax.Array):  # It was never placed: it goes with the others.
        return everywhere or leaf.sharding
    if isinstance(getattr(leaf, "sharding", None), SingleDeviceSharding):
        return leaf.sharding
    raise ValueError(
        f"Leaf '{path}' carries no sharding that says over which mesh axes it is "
        "sharded. Pass arrays, or jax.ShapeDtypeStructs with "
        "sharding=NamedSharding(...)."
    )
