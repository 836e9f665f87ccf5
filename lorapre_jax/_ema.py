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
from lorapre_jax._moments.methods import LowRank, Methods
from lorapre_jax._numerics.averages import mass
from lorapre_jax._trees.boxes import unboxed
from lorapre_jax._trees.sharding import replicated_zero


class LorapreEmaState(NamedTuple):
    """State of `lorapre_ema`.

    Attributes:
      count: Steps taken, `()`, int32.
      ema: The averages of leaves that keep them densely, as `mu` in
        `ScaleByLorapreAdamState`.
      ema_factors: The others, by leaf path: `left (*batch, *rows, r)` and `right
        (*batch, *columns, r)` in `factor_dtype`, in boxes as the parameters are.
      plan: The decision per leaf; static, without leaves.
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
    r"""A moving average of past updates, kept as thin factors.

    With factors `B A` of the bias-corrected average, and X what a step fits them to,
    `X = b B A + (1 - b) g` of the factors before, at step t with `b = decay (1 -
    decay^(t-1)) / (1 - decay^t)` (LoRA-Pre, arXiv 2602.24283, section 3), the update is

    .. math::
      m_t = B A + \frac{\gamma}{1 - b} (X - B A)

    What the factors leave out passes at once, with the weight that the full average
    gives it over all later steps, once t is large, times the gain :math:`\gamma`
    (`LowRank`).
    Where r = min(p, q), or all gradients fit, this is `optax.ema`, and with
    `debias=False`, scaled by `1 / (1 - decay)`, heavy-ball momentum `v <- decay v + g`.

    Args:
      decay: Decay rate, in [0, 1).
      rank: See `scale_by_lorapre_adam`, as for all arguments that are not named here.
      debias: Whether to return the bias-corrected average; False returns it times
        `1 - decay^t`, the average that started from zero. Static.
      moment: How the average is kept, `LowRank(...)` or `Dense()`, or by pattern.

    Returns:
      The `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError, ValueError: As `scale_by_lorapre_adam`.
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
