"""One decision per leaf, made at `init` and carried in the state.

`make_plan` decides; `init_moment` allocates what was decided.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorapre_jax._leaves import checks
from lorapre_jax._leaves.choice import Choice
from lorapre_jax._leaves.roles import roles, warn_of_unknown
from lorapre_jax._leaves.selection import Decided, Matrices, resolve_axes
from lorapre_jax._moments.methods import Dense, have_rank
from lorapre_jax._numerics.arrays import at_least_float32
from lorapre_jax._trees.boxes import boxed_like, is_box, refilled, unboxed
from lorapre_jax._trees.matrix_view import MatrixView, matrix_view
from lorapre_jax._trees.paths import is_masked, named_leaves, named_nodes
from lorapre_jax._trees.sharding import batch_shards, known_sharding, like_parameter

_MIN_DIM_SIZE = 128  # Of a side of a leaf that only the default selects.


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What was decided for one leaf.

    Attributes:
      path: Keys joined by slashes.
      shape, dtype: Shape and dtype of the parameter.
      view: Its matrices; None if it is not seen as any.
      rank: Rank of its factors; None if the leaf is dense.
      why_dense: Why it is dense; empty if it is factored.
      methods: How each of the transform's moments is kept; empty for a leaf without
        elements.
      batch_shards: Over how many devices the first batch axis is known to be sharded.
        It is not part of the decision: plans compare equal however their leaves are
        sharded.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    view: MatrixView | None
    rank: int | None
    why_dense: str
    methods: tuple[Any, ...]
    batch_shards: int = dataclasses.field(default=1, compare=False)

    @property
    def is_factored(self) -> bool:
        return self.rank is not None

    def kind_of(self, index: int) -> Any:
        """Returns the class of a factored moment's state; None for a dense moment."""
        method = self.methods[index]
        if not self.is_factored or isinstance(method, Dense):
            return None
        return method.kind


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """The decisions for a tree, as a pytree node without leaves."""

    leaves: tuple[LeafPlan, ...]

    def __hash__(self):
        # jit hashes the node at every call, and paths tell almost all plans apart.
        return hash(tuple((leaf.path, leaf.rank) for leaf in self.leaves))

    def __repr__(self):
        # It is part of the repr of every state, and of JAX's errors about states.
        factored = sum(leaf.is_factored for leaf in self.leaves)
        return f"Plan({len(self.leaves)} leaves, {factored} factored)"

    def by_path(self, leaves: list[tuple[str, Any]]) -> dict[str, LeafPlan]:
        """Returns the decisions, and checks that `leaves` are those decided on."""
        plans = {leaf.path: leaf for leaf in self.leaves}
        for path, leaf in leaves:
            checks.check_floating(path, leaf)
        shapes = {path: leaf.shape for path, leaf in leaves}
        for path in sorted(plans.keys() ^ shapes.keys()):
            raise ValueError(
                f"Leaf '{path}' is in the {'state' if path in plans else 'updates'} "
                "only. Initialise the optimizer state with the same tree."
            )
        for path, leaf in plans.items():
            if leaf.shape != shapes[path]:
                raise ValueError(
                    f"Leaf '{path}': the update has shape {shapes[path]}, but the "
                    f"optimizer state was initialised for {leaf.shape}."
                )
        return plans


def _let_flax_serialize() -> None:
    """Tells Flax, if it is loaded, that a plan has nothing to serialize.

    Flax's `to_bytes` and `from_bytes` know only the types that were registered. A state
    that is read back has the plan of the state that it is read into.
    """
    serialization = sys.modules.get("flax.serialization")
    if serialization is not None:
        with contextlib.suppress(ValueError):  # It is registered already.
            serialization.register_serialization_state(
                Plan, lambda plan: {}, lambda plan, nothing: plan
            )


def has_plan(node: Any) -> bool:
    """Whether `node` is the state of one of our transforms."""
    return isinstance(getattr(node, "plan", None), Plan)


def make_plan(
    params: optax.Params,
    choices: tuple[Choice, ...],
    *,
    rank: int | Fraction,
    matrices: Matrices,
    min_dim_size_to_factor: int | None,
) -> Plan | jax.Array:
    """Decides for every leaf of `params`, which may be abstract.

    For optax's placeholder for parameters it returns an array:
    `optax.tree_map_params` then treats the plan as a leaf that belongs to no parameter.
    """
    if _is_placeholder(params):
        return jnp.zeros([])
    leaves = named_leaves(params)
    if not leaves:
        return Plan(())
    _let_flax_serialize()
    checks.check_distinct([path for path, _ in leaves])
    for path, leaf in leaves:
        checks.check_floating(path, leaf)
    by_role = matrices.by_role if isinstance(matrices, Decided) else roles(params)
    axes = resolve_axes(matrices, params, by_role)
    for each in choices:
        each.check_patterns(path for path, _ in named_leaves(params, masked=True))
    by_default = {path for path, found in axes.items() if found.by_default}
    # None by default: optax.inject_hyperparams makes arrays of numbers.
    least = min_dim_size_to_factor
    least = _MIN_DIM_SIZE if least is None else least
    if by_default:
        checks.check_count("min_dim_size_to_factor", least, 0)
        shapes = {path: leaf.shape for path, leaf in leaves if path in by_default}
        warn_of_unknown(by_role, shapes, least)

    def decide(path, leaf) -> LeafPlan:
        shape, dtype = tuple(leaf.shape), jnp.dtype(leaf.dtype)
        methods = tuple(each.of(path, by_role[path].is_end) for each in choices)

        def dense(why: str, view: MatrixView | None = None) -> LeafPlan:
            kept = () if 0 in shape else tuple(Dense() for _ in methods)
            shards = 1 if view is None else batch_shards(leaf, view)
            return LeafPlan(path, shape, dtype.name, view, None, why, kept, shards)

        if 0 in shape:
            return dense("no elements")
        leaf_axes, why, is_default = axes[path]
        if leaf_axes is None:
            return dense(why)
        if len(methods) == 2:
            checks.check_moments(*methods, path)
        view = matrix_view(shape, leaf_axes, path)
        if all(isinstance(method, Dense) for method in methods):
            return dense("Dense() moments", view)
        r, (p, q) = rank_of(rank, view), (view.p, view.q)
        if have_rank(methods) and r * (p + q) >= p * q:
            return dense(f"rank {r} does not pay: r(p+q) >= pq", view)
        if is_default and min(p, q) < least:
            return dense(f"a side is below {least}", view)
        shards = batch_shards(leaf, view)
        return LeafPlan(path, shape, dtype.name, view, r, "", methods, shards)

    return Plan(tuple(decide(path, leaf) for path, leaf in leaves))


def _is_placeholder(params: Any) -> bool:
    """Whether it is one node that can hold nothing, and not an empty container."""
    empty = not jax.tree.leaves(params, is_leaf=is_masked)
    containers = (Mapping, list, tuple, type(None))
    is_one_node = jax.tree.structure(params).num_nodes == 1
    return empty and is_one_node and not isinstance(params, containers)


def rank_of(rank: int | Fraction, view: MatrixView) -> int:
    if isinstance(rank, Fraction):
        return max(1, int(min(view.p, view.q) * rank))
    return int(rank)


def init_moment(plan, params, index: int, factor_dtype, seed) -> tuple[Any, Any]:
    """Returns the zero state of moment `index`: a dense tree, and factors by path.

    The tree is shaped like `params`, with `optax.MaskedNode` in place of the array, or
    of the box that it is in, if the moment is factored. Dense moments are float32 at
    least. With optax's placeholder for parameters, the tree is the placeholder, and the
    factors are an array that belongs to no parameter: `tree_map_params` then leaves
    them to its `transform_non_params`.
    """
    if not isinstance(plan, Plan):
        return params, jnp.zeros([])
    plans = {leaf.path: leaf for leaf in plan.leaves}
    dense, factors = [], {}
    for path, node in named_nodes(params):
        leaf, param = plans.get(path), unboxed(node)
        if leaf is None or not leaf.methods:
            dense.append(node if param is None else optax.MaskedNode())
        elif leaf.kind_of(index) is None:
            dtype, sharding = at_least_float32(param.dtype), known_sharding(param)
            zeros = jnp.zeros(leaf.shape, dtype, device=sharding)
            dense.append(refilled(node, zeros))
        else:
            dense.append(optax.MaskedNode())
            init = functools.partial(
                _init_factors, leaf, index, jnp.dtype(factor_dtype), seed
            )
            view: Any = leaf.view
            state = like_parameter(init, param, view)
            factors[path] = _boxed(path, state, node, view)
    return jax.tree.unflatten(_structure(params), dense), factors


def _init_factors(leaf: LeafPlan, index: int, dtype, seed) -> Any:
    view: Any = leaf.view
    method, rank = leaf.methods[index], leaf.rank
    return view.unfuse(method.init(view.batch_shape, view.p, view.q, rank, dtype, seed))


def _boxed(path: str, state: Any, node: Any, view: Any) -> Any:
    """Puts each array of a factored state into a box like the parameter's."""
    kind = type(state)
    axes = map(view.factor_axes, kind.sides)
    try:
        boxes = [boxed_like(node, x, a) for x, a in zip(state, axes, strict=True)]
    except TypeError as error:
        raise TypeError(f"Leaf '{path}': {error}") from error
    return kind(*boxes)


def _structure(params: Any) -> Any:
    """Returns the structure with one leaf for each node of `named_nodes`."""
    stop = lambda x: x is None or is_masked(x) or is_box(x)  # noqa: E731
    return jax.tree.structure(params, is_leaf=stop)
