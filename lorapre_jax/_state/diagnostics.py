"""How well the factors fit what they follow: numbers to log, of any optimizer state."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorapre_jax._leaves.fit import check_fits
from lorapre_jax._leaves.moments import StoredMoment, stored_moments
from lorapre_jax._leaves.plan import FactoredLeaf, LeafPlan, has_plan
from lorapre_jax._moments.factors import FactorPair, open_boxes
from lorapre_jax._numerics.arrays import at_least_float32, dot
from lorapre_jax._numerics.norms import root_mean_square
from lorapre_jax._numerics.orthonormal import orthonormal_columns
from lorapre_jax._trees.paths import named_leaves
from lorapre_jax._trees.sharding import replicated_result


class FactorDiagnostics(NamedTuple):
    """Of each matrix of one leaf, in one moment; see `diagnostics`."""

    captured: jax.Array  # (*batch,) float32, 0 to 1
    effective_rank: jax.Array  # (*batch,) float32, 0 to r
    condition: jax.Array  # (*batch,) float32, 1 to infinity


def diagnostics(state: Any, grads: Any) -> dict[str, dict[str, FactorDiagnostics]]:
    r"""Measures the factors in an optimizer state, and gradients against them.

    With factors `B: (p, r)` and `A: (r, q)` of a moment, and a target G, which is the
    gradient for a first moment and its absolute value for a second:

    `captured` is the share of the target's energy that the factors can take up, with P
    and Q the projectors on the columns of B and on the rows of A:

    .. math::
      1 - \|(I - P)\, G\, (I - Q)\|_F^2 \,/\, \|G\|_F^2

    Small changes of B and A change `B A` by `dB A + B dA`, and what none of these can
    reach in G is `(I - P) G (I - Q)`: to first order in `1 - b`, what no rule puts
    into the factors. So give the state *before* the step with this gradient. A target
    unrelated to the factors has about `1 - (1 - r/p)(1 - r/q)`: compare with that. The
    gradient's scale, as clipping changes it, does not matter. 0 where the gradient is
    zero, or both factors are, as before the first step.

    `effective_rank` is `exp(-sum_k s_k log s_k)`, with `s_k` the k-th squared singular
    value of `B A` over the sum of all: between 1 and r, how many directions hold the
    moment's energy. (Roy and Vetterli, 2007, take the singular values unsquared.) 0
    where `B A` is zero.

    `condition` is the largest singular value of `B A` over the r-th; infinite where
    the r-th drowns in rounding (r machine epsilons of the largest) or `B A` is zero.

    Nothing of size `(p, q)` is formed (but `|G|`). The cost, `4 p q r + 16 r^2 (p+q)`
    multiplications and additions per moment and matrix, is less than an update's.
    Works under jit, vmap and `jax.eval_shape`, and on sharded states.

    Args:
      state: The state of any optax transform with one of this library's in it, however
        deep (chain, masked, partition, MultiSteps, inject_hyperparams, ...).
      grads: Gradients, a tree like the parameters.

    Returns:
      `{leaf path: {moment: FactorDiagnostics}}` for every moment of every leaf that is
      kept as a pair of factors. Moments are named as in the state: `"mu"`, `"nu"`,
      `"momentum"`, `"ema"`. The arrays are float32, of the leaf's batch shape.

    Raises:
      ValueError: No moment in the state is a pair of factors; a leaf of the state is
        not in `grads`, or has another shape there; an array is not what the state's
        plan says; two states keep the same moment of one leaf. The message names it.
    """
    by_path = dict(named_leaves(grads))
    found: dict[str, dict[str, FactorDiagnostics]] = {}
    for ours in filter(has_plan, jax.tree.leaves(state, is_leaf=has_plan)):
        check_fits(ours)
        for leaf in ours.plan.leaves:
            _check_gradient(leaf, by_path)
        for leaf, moment, pair in _factor_pairs(ours):
            of_leaf = found.setdefault(leaf.path, {})
            if moment.name in of_leaf:
                raise ValueError(
                    f"Leaf '{leaf.path}': two states keep '{moment.name}' as factors, "
                    "and both cannot follow one gradient. Pass them one by one."
                )
            g = jnp.asarray(by_path[leaf.path])
            of_leaf[moment.name] = _of_leaf(leaf, pair, g, moment.order == "second")
    if not found:
        raise ValueError(
            "The optimizer state keeps no moment as a pair of factors, so there is "
            "nothing to diagnose. `describe` says why each leaf is dense."
        )
    return found


def _factor_pairs(
    state: Any,
) -> Iterator[tuple[FactoredLeaf, StoredMoment, FactorPair]]:
    """All moments that one of our states keeps as such, leaf by leaf."""
    for leaf in state.plan.leaves:
        if isinstance(leaf, FactoredLeaf):
            for moment in stored_moments(state):
                factors = open_boxes(moment.factors.get(leaf.path))
                if isinstance(factors, FactorPair):
                    yield leaf, moment, factors


def _check_gradient(leaf: LeafPlan, by_path: dict[str, Any]) -> None:
    if leaf.path not in by_path:
        raise ValueError(
            f"Leaf '{leaf.path}' is in the state, but not in the gradients. Pass the "
            "gradients of all parameters that the state was initialised with."
        )
    shape = tuple(jnp.shape(by_path[leaf.path]))
    if shape != leaf.shape:
        raise ValueError(
            f"Leaf '{leaf.path}': the gradient has shape {shape}, but the optimizer "
            f"state was initialised for {leaf.shape}."
        )


def _of_leaf(
    leaf: FactoredLeaf, pair: FactorPair, g: jax.Array, absolute: bool
) -> FactorDiagnostics:
    view = leaf.view
    dtype = at_least_float32(g.dtype, pair.left.dtype)

    def on_matrix(g, left, right):
        g, left, right = (x.astype(dtype) for x in (g, left, right))
        result = _of_matrix(left, right, jnp.abs(g) if absolute else g)
        return FactorDiagnostics(*(x.astype(jnp.float32) for x in result))

    def on_leaf(g, left, right):
        fn = on_matrix
        for _ in view.batch_shape:
            fn = jax.vmap(fn)
        return fn(view.to_matrix(g), *view.fuse(FactorPair(left, right)))

    return replicated_result(on_leaf, g)(g, *pair)


@jax.jit  # So that op-by-op use compiles it once for each shape.
def _of_matrix(left, right, g) -> FactorDiagnostics:
    rms = root_mean_square
    u = orthonormal_columns(left)
    v = orthonormal_columns(right)

    # The energy of P G + (I - P) G Q, whose parts are orthogonal: no difference of
    # large numbers, and no square that could under- or overflow.
    in_columns, in_rows = dot(u.T, g), dot(g, v)
    only_in_rows = in_rows - dot(u, dot(in_columns, v))
    size = rms(g)
    shares = (
        jnp.square(rms(part) / jnp.where(size > 0, size, 1)) * (part.size / g.size)
        for part in (in_columns, only_in_rows)
    )
    captured = jnp.minimum(sum(shares), 1)

    # The moment in the two bases, (r, r), has its singular values.
    singular = _singular_values(dot(dot(u.T, left), dot(right.T, v)))
    largest, smallest = singular[0], singular[-1]
    is_zero = largest == 0
    relative = singular / jnp.where(is_zero, 1, largest)
    energy = jnp.square(relative) / jnp.where(is_zero, 1, jnp.sum(jnp.square(relative)))
    effective_rank = jnp.exp(jnp.sum(jax.scipy.special.entr(energy)))
    negligible = singular.size * jnp.finfo(g.dtype).eps * largest
    condition = largest / jnp.where(smallest > negligible, smallest, 0)
    return FactorDiagnostics(
        captured,
        jnp.where(is_zero, 0, effective_rank),
        jnp.where(is_zero, jnp.inf, condition),
    )


@jax.custom_batching.sequential_vmap
def _singular_values(core: jax.Array) -> jax.Array:
    """Descending, `(r,)`. One at a time under vmap: batched LAPACK calls of jaxlib on
    CPUs wait for the threads that they run on, and several may hang."""
    return jnp.linalg.svd(core, compute_uv=False)
