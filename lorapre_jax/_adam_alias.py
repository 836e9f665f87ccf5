"""AdamW with low-rank moments."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import optax

from lorapre_jax._adam import scale_by_lorapre_adam
from lorapre_jax._leaves.selection import Matrices
from lorapre_jax._moments.low_rank import LowRank
from lorapre_jax._moments.methods import Methods


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
    """AdamW with moments that are kept as low-rank factors.

    This is the chain of `optax.adamw` around `scale_by_lorapre_adam`.

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
      TypeError, ValueError: As `scale_by_lorapre_adam`. At `update`: weights decay and
        `params` are not given.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import lorapre_jax as lp
      >>> params = {"kernel": jnp.ones((256, 512)), "bias": jnp.zeros(512)}
      >>> tx = lp.lorapre_adamw(2e-3, rank=32, weight_decay=0.1)
      >>> state = tx.init(params)
      >>> grads = params  # those of |params|^2 / 2
      >>> updates, state = jax.jit(tx.update)(grads, state, params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Wang et al., *Taming Momentum: Rethinking Optimizer States Through Low-Rank
      Approximation* (LoRA-Pre), 2026: `arXiv 2602.24283
      <https://arxiv.org/abs/2602.24283>`_

      Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, 2019, algorithm 2:
      `arXiv 1711.05101 <https://arxiv.org/abs/1711.05101>`_

    See also:
      `scale_by_lorapre_adam`, `describe`, `optax.adamw`; :doc:`choosing leaves and rank
      </choosing>`.
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
    """Returns `optax.add_decayed_weights`, or the identity if the decay is Python's 0.

    `optax.add_decayed_weights` needs `params` even if it adds nothing.
    """
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        return optax.identity()
    return optax.add_decayed_weights(weight_decay, mask)
