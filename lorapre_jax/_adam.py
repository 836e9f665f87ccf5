"""LoRA-Pre Adam."""

import dataclasses
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorapre_jax._leaves import checks
from lorapre_jax._leaves.choice import choice
from lorapre_jax._leaves.decide import make_plan
from lorapre_jax._leaves.fit import check_fits
from lorapre_jax._leaves.map_leaves import map_leaves
from lorapre_jax._leaves.moments import init_moment
from lorapre_jax._leaves.plan import FactoredLeaf, Leaf
from lorapre_jax._leaves.selection import Matrices
from lorapre_jax._moments.algorithm_one import AlgorithmOne
from lorapre_jax._moments.low_rank import LowRank
from lorapre_jax._moments.methods import Methods
from lorapre_jax._moments.row_column import RankOne, RotatedRankOne
from lorapre_jax._numerics.averages import unbiased_decay
from lorapre_jax._trees.boxes import unboxed
from lorapre_jax._trees.sharding import replicated_zero


class ScaleByLorapreAdamState(NamedTuple):
    """State of `scale_by_lorapre_adam`.

    Attributes:
      count: Number of steps taken, `()`, int32.
      mu: The dense first moments: a tree like the parameters, float32 at least, with
        `optax.MaskedNode` in place of leaves whose moment is factored.
      nu: The dense second moments, likewise.
      mu_factors: The factored first moments, by leaf path. Arrays have the leaf's own
        axes and are in boxes like the parameter's: `left (*batch, *rows, r)` and
        `right (*batch, *columns, r)` in `factor_dtype`.
      nu_factors: The factored second moments, likewise. The statistics of `RankOne()`
        are `row (*batch, *rows)` and `column (*batch, *columns)`, to which
        `RotatedRankOne()` adds `direction (*batch, r)`: root mean squares in float32 at
        least.
      plan: The decision for each leaf: a static pytree node without leaves.
    """

    moments = (("mu", "first"), ("nu", "second"))
    count: jax.typing.ArrayLike
    mu: optax.Updates
    nu: optax.Updates
    mu_factors: Any
    nu_factors: Any
    plan: Any


def scale_by_lorapre_adam(
    rank: int | Fraction,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    first_moment: Methods = LowRank(),  # noqa: B008 (frozen)
    second_moment: Methods | None = None,
    matrices: Matrices = None,
    min_dim_size_to_factor: int | None = None,
    update_scale: jax.typing.ArrayLike = 1.0,
    slices_at_once: int | None = None,
    factor_dtype: jax.typing.DTypeLike = "float32",
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates as Adam does, with moments that are kept as low-rank factors.

    For a matrix `g: (p, q)` at step t, with the factors B (orthonormal) and A of the
    bias-corrected first moment and the residual R of their fit, the update by default
    is

    .. math::
      u = B\, \frac{A}{
          \max(\sqrt{v}, (1 - \hat{b_1}) \sqrt{1 - \hat{b_2}}\, |A|) + \epsilon}
        + \gamma\, \frac{R}{\max(\sqrt{w}, \sqrt{1 - \hat{b_2}}\, |R|) + \epsilon}

    with :math:`\hat{b_i} = b_i (1 - b_i^{t-1}) / (1 - b_i^t)`, the decay rates of
    averages that are bias-corrected at every step.

    `LowRank` defines R and its gain :math:`\gamma`, and `RotatedRankOne` the second
    moments v of `B^T g` and w of R. With any other second moment v, of the entries of
    g, the first moment m is divided entry by entry, as in Adam, with the first of the
    two bounds. A bound is the root of the second moment after a single gradient whose
    size is the share of m, or of R, that one step adds. It matters for entries whose
    low-rank estimates are far too small, as can happen next to outliers.
    `AlgorithmOne` has no bounds.

    Dense leaves get the update of `optax.scale_by_adam`.

    Args:
      rank: Rank r of the factors, or a `fractions.Fraction` of the smaller side of each
        matrix. Static.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the root of the second moment.
      first_moment: How the first moment is kept: `LowRank(...)`, `Dense()` or
        `AlgorithmOne()`; or a mapping from patterns on leaf paths (`re.search`) to
        these. Leaves that no pattern matches have the default.
      second_moment: How the second moment is kept, likewise. None: `RankOne()` for
        embeddings and heads, and `RotatedRankOne()`, which needs a first moment
        `LowRank(...)`, for all other matrices. `AlgorithmOne()` for both moments is the
        paper's algorithm to the letter.
      matrices: Which leaves are matrices: a `select_matrices(...)`; one `MatrixAxes`
        for every leaf that has these axes; or a tree of `MatrixAxes` and None, which
        may be a prefix of the parameters. A selected leaf stays dense only if its rank
        does not pay, `r (p + q) >= p q`. None: every matrix that the names of axes in
        boxes (`register_box`) and the leaf paths tell, if its sides are at least
        `min_dim_size_to_factor` and its rank pays. A large leaf of which they tell
        nothing stays dense, with a warning that names it. `describe` shows the outcome.
      min_dim_size_to_factor: See `matrices`. None: 128. Static.
      update_scale: Multiplies the update of factored leaves; 0.25 in the paper's
        recipe.
      slices_at_once: How many slices along a leaf's first batch axis are computed at
        once, which bounds the memory of temporaries: the largest divisor of the axis up
        to this number. On a mesh see :doc:`meshes </meshes>`. None: all slices. Static.
      factor_dtype: Dtype of the stored factors, "bfloat16", "float32" or "float64".
        Computation is in float32 at least. Static.
      seed: Seed of the random start and of the sketches, which depend on (seed, r, q)
        only.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state
      `ScaleByLorapreAdamState`. Updates have the dtype that optax's Adam would return;
      the dtypes of the state do not depend on those of the gradients.

    Raises:
      TypeError, ValueError: An argument is out of range, an array where a static value
        is needed, or a number in half precision (`optax.inject_hyperparams` takes
        `static_args="rank"` and `hyperparam_dtype=`). At `init`: a leaf is not real
        floating point or lacks the axes it is said to have. At `update`: an array of
        the state has another shape than was decided. The message names the argument or
        the leaf's path.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import lorapre_jax as lp
      >>> params = {"kernel": jnp.ones((256, 512)), "bias": jnp.zeros(512)}
      >>> tx = optax.chain(lp.scale_by_lorapre_adam(rank=32), optax.scale(-2e-3))
      >>> state = tx.init(params)
      >>> grads = params  # those of |params|^2 / 2
      >>> updates, state = jax.jit(tx.update)(grads, state)
      >>> print(state[0].mu_factors["kernel"].left.shape, state[0].mu["bias"].shape)
      (256, 32) (512,)

    References:
      Wang et al., *Taming Momentum: Rethinking Optimizer States Through Low-Rank
      Approximation* (LoRA-Pre), 2026, section 3: `arXiv 2602.24283
      <https://arxiv.org/abs/2602.24283>`_

    See also:
      `lorapre_adamw`; :doc:`the method </method>`; :doc:`choosing leaves and rank
      </choosing>`; :doc:`limits </limits>`, such as gradients so large that their
      squares overflow.
    """
    checks.check_storage(rank, slices_at_once, factor_dtype, seed)
    checks.check_decay("b1", b1)
    checks.check_decay("b2", b2)
    checks.check_not_negative("eps", eps)
    checks.check_not_negative("update_scale", update_scale)
    first = choice("first_moment", first_moment, LowRank())
    second = choice("second_moment", second_moment, RotatedRankOne(), RankOne())
    checks.check_methods(first, "first_moment")
    checks.check_methods(second, "second_moment", "rotated_moment")
    checks.check_moments(first.block, second.block)

    def init_fn(params):
        plan = make_plan(
            params,
            (first, second),
            rank=rank,
            matrices=matrices,
            min_dim_size_to_factor=min_dim_size_to_factor,
        )
        mu, mu_factors = init_moment(plan, params, 0, factor_dtype, seed)
        nu, nu_factors = init_moment(plan, params, 1, factor_dtype, seed)
        count = replicated_zero(params)
        return ScaleByLorapreAdamState(count, mu, nu, mu_factors, nu_factors, plan)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        checks.check_state(state, ScaleByLorapreAdamState)
        check_fits(state)
        count = jax.tree.map(optax.safe_increment, state.count)
        rule = AdamRule(b1, b2, eps, update_scale, unboxed(count), seed)
        updates, (mu, mu_factors), (nu, nu_factors) = map_leaves(
            rule,
            state.plan,
            updates,
            [(state.mu, state.mu_factors), (state.nu, state.nu_factors)],
            slices_at_once,
        )
        return updates, ScaleByLorapreAdamState(
            count, mu, nu, mu_factors, nu_factors, state.plan
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdamRule:
    """The update of one matrix, or of a dense leaf of any shape.

    A call returns the update and the new states of the two moments.
    """

    b1: jax.typing.ArrayLike
    b2: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike
    update_scale: jax.typing.ArrayLike
    count: jax.Array
    seed: jax.typing.ArrayLike

    def __call__(self, leaf: Leaf, g, mu, nu):
        first, second = leaf.methods
        b1, b2 = (
            unbiased_decay(jnp.asarray(b, g.dtype), self.count)
            for b in (self.b1, self.b2)
        )
        eps, least = jnp.asarray(self.eps, g.dtype), jnp.sqrt(1 - b2)
        # The paper's rule stays as it was published.
        is_bounded = isinstance(leaf, FactoredLeaf) and not isinstance(
            second, AlgorithmOne
        )

        def divide(m, root_v, added):
            if is_bounded:
                root_v = bounded(root_v, least * jnp.abs(added))
            return m / (root_v + eps)

        if isinstance(second, RotatedRankOne):
            mu, components, residual = first.split_moment(mu, g, b1, self.seed)
            (root_v, root_w), nu = second.rotated_moment(
                nu, g, components, residual, b2
            )
            # The components A are divided in the basis of B, the residual entry by
            # entry. A step adds the residual as a whole, and of A a share.
            update = mu.left @ divide(mu.right, root_v, (1 - b1) * mu.right).T
            update += first.residual_gain * divide(residual, root_w, residual)
        else:
            m, mu = first.first_moment(mu, g, self.b1, self.count, self.seed)
            root_v, nu = second.second_moment(nu, g, self.b2, self.count, self.seed)
            update = divide(m, root_v, (1 - b1) * m)
        if isinstance(leaf, FactoredLeaf):
            update = update * jnp.asarray(self.update_scale, g.dtype)
        return update, mu, nu


def bounded(root_v, least):
    """Bounds the root of v, since low-rank estimates may be far too small.

    Args:
      least: The root of one gradient's share of v, if that gradient were as large as
        what a step adds to m.
    """
    return jnp.maximum(root_v, least)
