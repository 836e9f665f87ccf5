"""The low-rank moving average, from which any momentum method is built."""

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
from lorapre_jax._leaves.plan import Leaf
from lorapre_jax._leaves.selection import Matrices
from lorapre_jax._moments.low_rank import LowRank
from lorapre_jax._moments.methods import Methods
from lorapre_jax._numerics.averages import mass
from lorapre_jax._trees.boxes import unboxed
from lorapre_jax._trees.sharding import replicated_zero


class LorapreEmaState(NamedTuple):
    """State of `lorapre_ema`.

    Attributes:
      count: Number of steps taken, `()`, int32.
      ema: The dense averages: a tree like the parameters, float32 at least, with
        `optax.MaskedNode` in place of leaves whose average is factored.
      ema_factors: The factored averages, by leaf path: `left (*batch, *rows, r)` and
        `right (*batch, *columns, r)` in `factor_dtype`, in boxes like the parameter's.
      plan: The decision for each leaf: a static pytree node without leaves.
    """

    moments = (("ema", "first"),)
    count: jax.typing.ArrayLike
    ema: optax.Updates
    ema_factors: Any
    plan: Any


def lorapre_ema(
    decay: jax.typing.ArrayLike,
    rank: int | Fraction,
    debias: bool = True,
    *,
    moment: Methods = LowRank(),  # noqa: B008 (frozen)
    matrices: Matrices = None,
    min_dim_size_to_factor: int | None = None,
    slices_at_once: int | None = None,
    factor_dtype: jax.typing.DTypeLike = "float32",
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""A moving average of past updates that is kept as low-rank factors.

    This is the first moment of `scale_by_lorapre_adam` alone, from which any method
    with momentum can be built. With the factors B and A of the bias-corrected average,
    the residual R of their fit and its gain :math:`\gamma` (`LowRank`), the update is

    .. math::
      m = B A + \gamma R

    The residual has the total weight over time that it would have in a full average,
    but all of it at once. If r = min(p, q), or if all gradients fit into the factors,
    the result is that of `optax.ema`. With `debias=False`, scaled by `1 / (1 - decay)`,
    it is then heavy-ball momentum, `m <- decay m + g`.

    Args:
      decay: Decay rate b, in [0, 1).
      rank: See `scale_by_lorapre_adam`, as for all arguments that are not named here.
      debias: Whether to return the bias-corrected average. If False, it is multiplied
        by `1 - b^t`, as the average that started from zero. Static.
      moment: How the average is kept: `LowRank(...)`, `Dense()` or `AlgorithmOne()`; or
        a mapping from patterns on leaf paths to these.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state `LorapreEmaState`.

    Raises:
      TypeError, ValueError: As `scale_by_lorapre_adam`.

    Examples:
      Momentum for SGD:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import lorapre_jax as lp
      >>> params = {"kernel": jnp.ones((256, 512))}
      >>> tx = optax.chain(lp.lorapre_ema(0.9, rank=32), optax.sgd(0.5))
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params))
      >>> print(f"{updates['kernel'][0, 0]:.3f}")  # -0.5 times the gradient
      -0.500

    References:
      Wang et al., *Taming Momentum: Rethinking Optimizer States Through Low-Rank
      Approximation* (LoRA-Pre), 2026, section 3: `arXiv 2602.24283
      <https://arxiv.org/abs/2602.24283>`_

    See also:
      `optax.ema`, `optax.trace`; :doc:`the method </method>`.
    """
    checks.check_decay("decay", decay)
    checks.check_storage(rank, slices_at_once, factor_dtype, seed)
    checks.check_flag("debias", debias)
    kept = choice("moment", moment, LowRank())
    checks.check_methods(kept, "first_moment")

    def init_fn(params):
        plan = make_plan(
            params,
            (kept,),
            rank=rank,
            matrices=matrices,
            min_dim_size_to_factor=min_dim_size_to_factor,
        )
        ema, factors = init_moment(plan, params, 0, factor_dtype, seed)
        return LorapreEmaState(replicated_zero(params), ema, factors, plan)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        checks.check_state(state, LorapreEmaState)
        check_fits(state)
        count = jax.tree.map(optax.safe_increment, state.count)
        updates, (ema, factors) = map_leaves(
            EmaRule(decay, unboxed(count), seed, debias),
            state.plan,
            updates,
            [(state.ema, state.ema_factors)],
            slices_at_once,
        )
        return updates, LorapreEmaState(count, ema, factors, state.plan)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EmaRule:
    """The average of one matrix, and its new state."""

    decay: jax.typing.ArrayLike
    count: jax.Array
    seed: jax.typing.ArrayLike
    debias: bool = dataclasses.field(metadata={"static": True})

    def __call__(self, leaf: Leaf, g, ema):
        decay = jnp.asarray(self.decay, g.dtype)
        m, ema = leaf.methods[0].first_moment(ema, g, decay, self.count, self.seed)
        return m if self.debias else m * mass(decay, self.count), ema
