"""LoRA-Pre Adam."""

import dataclasses
from collections.abc import Callable
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
from lorapre_jax._moments.methods import (
    AlgorithmOne,
    LowRank,
    Methods,
    RankOne,
    RotatedRankOne,
)
from lorapre_jax._numerics.averages import unbiased_decay
from lorapre_jax._trees.boxes import unboxed
from lorapre_jax._trees.sharding import replicated_zero


class ScaleByLorapreAdamState(NamedTuple):
    """State of `scale_by_lorapre_adam`.

    Attributes:
      count: Steps taken, `()`, int32.
      mu, nu: First and second moments of the leaves that keep them densely, a tree like
        the parameters with `optax.MaskedNode` elsewhere, in float32 at least.
      mu_factors, nu_factors: The others, by leaf path, on the leaf's own axes and in
        boxes as the parameters are. `LowRank()` has `left (*batch, *rows, r)` and
        `right (*batch, *columns, r)` in `factor_dtype`; `RankOne()` and
        `RotatedRankOne()` have `row (*batch, *rows)`, `column (*batch, *columns)` and,
        the latter, `direction (*batch, r)`, in float32 at least.
      plan: The decision per leaf; static, without leaves.
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
    r"""Rescales updates as Adam does, with moments kept as thin factors.

    For a matrix `g: (p, q)` at step t, with `B A` the factors of the bias-corrected
    first moment, B orthonormal, `R = (X - B A) / c_1` the residual of their fit to the
    average X, `\gamma` its gain (`LowRank`), and v and w the estimates of the
    second moments of `B^T g` and of R (`RotatedRankOne`):

    .. math::
      u_t = B\, \frac{A}{\max(\sqrt{v}, \kappa |A|) + \epsilon}
        + \gamma\, \frac{R}{\max(\sqrt{w}, \sqrt{c_2} |R|) + \epsilon},
      \quad \kappa = c_1 \sqrt{c_2}, \quad c_i = \frac{1 - b_i}{1 - b_i^t}

    With any other second moment, entries are divided one by one as in Adam: `u_t =
    m / (max(sqrt(v), kappa |m|) + eps)`. The maxima are what v and w have of a single
    gradient as large as what one step adds. They keep entries that low-rank estimates
    tell badly apart, such as those next to outliers, from being divided by next to
    nothing: quotients are at most `1 / ((1 - b1) sqrt(1 - b2))`, those of R `1 / sqrt(1
    - b2)`. Algorithm 1 has none (LoRA-Pre, arXiv 2602.24283).

    The default's directions have a step of their own, whatever their number: where the
    gradients have only k of them, the update's root mean square is about `sqrt(k / p)`
    of Adam's (with the sides of `MatrixAxes` exchanged, `sqrt(k / q)`). Then try higher
    learning rates, or `RankOne()`, whose updates are as large as Adam's.

    Leaves that are not factored get `optax.scale_by_adam`'s update, from dense moments
    in the same state.

    Finite gradients may overflow inside: factors, where sums over a side of the matrix
    do (entries near 1e38 in float32), `Dense()` second moments and `AlgorithmOne()`,
    where squares do (1.8e19), as `optax.adam`'s. The state then stays non-finite, and
    `optax.apply_if_finite`, which looks at gradients, lets them pass. Clip before,
    `optax.clip(1e18)` or by the global norm.

    Args:
      rank: Rank r of the factors; or a `fractions.Fraction` of the smaller side of each
        matrix. Static.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the root of the second moment.
      first_moment: How the first moment is kept, `LowRank(...)` or `Dense()`; or a
        mapping from patterns on leaf paths (`re.search`) to these. Leaves that no
        pattern matches have the default.
      second_moment: How the second is, likewise. None: `RankOne()` for embeddings and
        heads, as far as their names and shapes tell, and `RotatedRankOne()`, which goes
        with `LowRank(...)` alone, for all other matrices. `LowRank()` is exact where
        `|g|` is constant and of rank r, and otherwise behind both
        (`benchmarks/quality`); `Dense()`. Both moments `AlgorithmOne()`: the paper's
        algorithm to the letter.
      matrices: Which leaves are matrices: a `select_matrices(...)`, one `MatrixAxes`
        for every leaf that has these axes, or a tree of `MatrixAxes` and None (a prefix
        of the parameters will do). Taken at its word, except that a leaf for which
        `r (p+q) >= p q` stays dense. None: every matrix with sides of at least
        `min_dim_size_to_factor` for which the rank pays. Stacks of layers and experts,
        heads and convolutions are told by the names of axes in the parameters' boxes
        (`register_box`) and by paths, of the tree that `init` gets: in a part of a tree
        (`optax.masked`) they may tell less. A large leaf of which they tell nothing
        stays dense, with a warning that names it. `describe` shows the outcome.
      min_dim_size_to_factor: See `matrices`; None: 128. Static.
      update_scale: Multiplies the update of factored leaves; 0.25 in the published
        recipe.
      slices_at_once: How many slices along a leaf's first batch axis are in flight at
        once, for bounded memory (the largest divisor of the axis up to it); None: all.
        Static.
        An axis that is sharded over n devices is walked n at a time, one on each, or
        more. Where `init` cannot see the sharding (under jit with Auto mesh axes),
        it must be a multiple of n, or the stack is gathered. Under `shard_map` the
        state must come from outside.
      factor_dtype: Dtype of the stored factors. Computation is in float32 at least.
        Changes below the last bit of bfloat16 are lost, as in any average that is kept
        in it: the nearer a decay rate is to one, the farther the average stays off.
      seed: Of the random start and sketches, which depend on (seed, r, q) alone.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Updates have the dtype that optax's
      Adam would return; the state's dtypes do not depend on the gradients'.

    Raises:
      TypeError, ValueError: An argument is out of range, an array where a static value
        is needed, or a number in half precision (`optax.inject_hyperparams` takes
        `static_args="rank"` and `hyperparam_dtype=`); at `init`, a leaf is not real
        floating point or lacks the axes it is said to have; at `update`, an array of
        the state has another shape than was decided. The message names the argument or
        the leaf's path.
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

    Returns it with the new states of the two moments.
    """

    b1: jax.typing.ArrayLike
    b2: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike
    update_scale: jax.typing.ArrayLike
    count: jax.Array
    seed: jax.typing.ArrayLike

    def __call__(self, leaf: Leaf, g, mu, nu):
        first, second = leaf.methods
        # The weights that the bias-corrected averages give to one gradient.
        w1, w2 = (
            1 - unbiased_decay(b, self.count, g.dtype) for b in (self.b1, self.b2)
        )
        is_bounded = isinstance(leaf, FactoredLeaf) and not isinstance(
            second, AlgorithmOne
        )

        def divide(m, root_v, weight):
            if is_bounded:
                root_v = jnp.maximum(root_v, jnp.sqrt(w2) * weight * jnp.abs(m))
            return m / (root_v + jnp.asarray(self.eps, g.dtype))

        if isinstance(second, RotatedRankOne):
            mu, along, residual = first.split_moment(
                mu, g, self.b1, self.count, self.seed
            )
            (root_v, root_w), nu = second.rotated_moment(
                nu, g, along, residual, self.b2, self.count
            )
            update = mu.left @ divide(mu.right, root_v, w1).T
            update += first.residual_gain * divide(residual, root_w, 1)
        else:
            m, mu = first.first_moment(mu, g, self.b1, self.count, self.seed)
            root_v, nu = second.second_moment(nu, g, self.b2, self.count, self.seed)
            update = divide(m, root_v, w1)
        if isinstance(leaf, FactoredLeaf):
            update = update * jnp.asarray(self.update_scale, g.dtype)
        return update, mu, nu


def lorapre_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | Fraction,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    first_moment: Methods = LowRank(),  # noqa: B008
    second_moment: Methods | None = None,
    matrices: Matrices = None,
    min_dim_size_to_factor: int | None = None,
    update_scale: jax.typing.ArrayLike = 1.0,
    slices_at_once: int | None = None,
    factor_dtype: jax.typing.DTypeLike = "float32",
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with low-rank moments: `optax.adamw`'s chain around our Adam.

    Args:
      learning_rate: A number or a schedule.
      rank: See `scale_by_lorapre_adam`, as for all arguments that are not named here.
      weight_decay: Strength of the decoupled weight decay, multiplied by the learning
        rate as in `optax.adamw`; a number or a schedule. Unless it is Python's number
        0, `update` needs `params`.
      mask: Which leaves decay: a tree of booleans, or a function of the parameters
        that returns one.

    Returns:
      The `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError, ValueError: As `scale_by_lorapre_adam`; and by `update`, where weights
        decay and there are no `params`.
    """
    return optax.chain(
        scale_by_lorapre_adam(
            rank,
            b1,
            b2,
            eps,
            first_moment=first_moment,
            second_moment=second_moment,
            matrices=matrices,
            min_dim_size_to_factor=min_dim_size_to_factor,
            update_scale=update_scale,
            slices_at_once=slices_at_once,
            factor_dtype=factor_dtype,
            seed=seed,
        ),
        decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def decayed_weights(weight_decay, mask) -> optax.GradientTransformation:
    """`optax.add_decayed_weights`, which needs `params` even to add nothing."""
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        return optax.identity()
    return optax.add_decayed_weights(weight_decay, mask)
