"""How well factors fit the gradients that they follow: numbers to log."""

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
    """Measurements of each matrix of one leaf, in one moment; see `diagnostics`.

    Attributes:
      captured: Share of the gradient that the factors can take up, `(*batch,)`,
        float32, 0 to 1.
      effective_rank: Number of directions that hold the moment, `(*batch,)`, float32, 0
        to r.
      condition: Ratio of the largest to the r-th singular value, `(*batch,)`, float32,
        1 to infinity.
    """

    captured: jax.Array
    effective_rank: jax.Array
    condition: jax.Array


def diagnostics(state: Any, grads: Any) -> dict[str, dict[str, FactorDiagnostics]]:
    r"""Measures the factors in an optimizer state, and gradients against them.

    With the factors `B: (p, r)` and `A: (r, q)` of a moment, and a target G, which is
    the gradient for a first moment and its absolute value for a second:

    `captured` is the share of the target's energy that the factors can take up. With P
    and Q the projectors on the columns of B and on the rows of A, it is

    .. math::
      1 - \|(I - P)\, G\, (I - Q)\|_F^2 \,/\, \|G\|_F^2

    Small changes of B and A change `B A` by `dB A + B dA`, which cannot reach
    `(I - P) G (I - Q)`. To first order in `1 - b`, no rule puts that part into the
    factors. Pass the state from *before* the step with this gradient, which has not
    taken it up yet. For comparison, a target unrelated to the factors has about
    `1 - (1 - r/p)(1 - r/q)`. The scale of the gradient, which clipping changes, does
    not matter. The share is 0 if the gradient is zero, or if both factors are, as
    before the first step.

    `effective_rank` is `exp(-sum_k x_k log x_k)`, with `x_k` the k-th squared singular
    value of `B A` over the sum of all: how many directions hold the moment's energy,
    between 1 and r. (Roy and Vetterli do not square the singular values.) It is 0 if
    `B A` is zero.

    `condition` is the largest singular value of `B A` over the r-th. It is infinite if
    the r-th is lost in rounding (below r machine epsilons of the largest) or if `B A`
    is zero.

    Nothing of size `(p, q)` is formed, except `|G|`. The cost is
    `4 p q r + 26 r^2 (p + q) + 240 r^3` multiplications and additions per moment and
    matrix, which is less than that of an update unless r is nearly p or q. It works
    under jit, vmap and `jax.eval_shape`, and on sharded states.

    Args:
      state: The state of any optax transform that contains one of this library's,
        however deep (chain, masked, partition, MultiSteps, inject_hyperparams, ...).
      grads: Gradients, a tree like the parameters.

    Returns:
      `{leaf path: {moment: FactorDiagnostics}}` for every moment of every leaf that is
      kept as a pair of factors. Moments are named as in the state: `"mu"`, `"nu"`,
      `"momentum"`, `"ema"`. See `FactorDiagnostics`.

    Raises:
      ValueError: No moment in the state is a pair of factors; a leaf of the state is
        not in `grads`, or has another shape there; an array is not what the state's
        plan says; or two states keep the same moment of one leaf. The message names it.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import lorapre_jax as lp
      >>> params = {"up": jnp.ones((256, 128))}
      >>> tx = lp.lorapre_ema(0.9, rank=8)
      >>> _, state = jax.jit(tx.update)(params, tx.init(params))
      >>> found = jax.jit(lp.diagnostics)(state, params)["up"]["ema"]
      >>> print(f"{found.captured:.2f} {found.effective_rank:.2f}")  # rank one fits
      1.00 1.00

    References:
      Roy and Vetterli, *The effective rank: a measure of effective dimensionality*,
      2007

    See also:
      `rank_for_budget`; :doc:`which rank </choosing>`.
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
                    f"Leaf '{leaf.path}': the states of two transforms have factors of "
                    f"'{moment.name}'. Pass these states to `diagnostics` one by one, "
                    "each with the gradients that its transform gets."
                )
            g = jnp.asarray(by_path[leaf.path])
            of_leaf[moment.name] = _of_leaf(leaf, pair, g, moment.order == "second")
    if not found:
        raise ValueError(
            "The optimizer state has no moment that is a pair of factors, so there is "
            "nothing to diagnose. `describe` says why each leaf is dense."
        )
    return found


def _factor_pairs(
    state: Any,
) -> Iterator[tuple[FactoredLeaf, StoredMoment, FactorPair]]:
    """Yields every moment that one of our states keeps as a pair of factors."""
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
            f"state was initialised for a parameter of shape {leaf.shape}. Pass the "
            "gradients of these parameters."
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

    # The energy of P G + (I - P) G Q, whose two terms are orthogonal. This needs no
    # difference of large numbers, and no square that could under- or overflow.
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
    """Returns the singular values, `(r,)`, in descending order.

    Under vmap they are computed one matrix at a time: batched LAPACK calls of jaxlib on
    CPUs wait for the threads that they run on, and several may hang.
    """
    return jnp.linalg.svd(core, compute_uv=False)
