"""Moments that are kept as a pair of thin factors, the default's first moment."""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp

from lorapre_jax._moments.factors import FactorPair
from lorapre_jax._numerics.arrays import dot, sketch_columns
from lorapre_jax._numerics.averages import blend, one, unbiased_decay
from lorapre_jax._numerics.online_regression import subspace

# Norm of the random directions in what the step sketches with, whose norm is one:
# enough to bring back a direction that vanished and to keep the sketch well-conditioned
# in float32, too little to disturb the others.
_NOISE = 1e-3


@dataclasses.dataclass(frozen=True)
class LowRank:
    r"""Keeps a moment as a pair of factors, `m = B A`, `r (p + q)` numbers per matrix.

    At each step the factors, `B: (p, r)` and `A: (r, q)`, take one orthonormal step of
    subspace iteration towards

    .. math::
      X = \hat b\, B A + (1 - \hat b)\, g, \qquad
      \hat b = b\, \frac{1 - b^{t-1}}{1 - b^t}

    with b the decay rate of the moment. They thus hold the bias-corrected average
    itself: gradients that are one constant of rank at most r give that constant at
    every step. What the factors miss is the residual of the fit, with the factors after
    the step,

    .. math::
      R = \frac{X - B A}{1 - \hat b}

    A first moment returns :math:`B A + \gamma R`. With :math:`\gamma = 1` and t large,
    the residual has at once the weight that a full average would give it over all later
    steps.

    A second moment follows `|g|` with decay rate `sqrt(b_2)` and is read squared, so
    that it cannot be negative: :math:`v = \hat{b_2} (B A)^2 + (1 - \hat{b_2}) g^2`,
    with the factors before the step. It is exact if `|g|` is constant and of rank at
    most r.

    The state holds B and the transpose of A, `left` and `right`, in `factor_dtype`.

    Attributes:
      residual_gain: The gain :math:`\gamma` of the residual. With 1, what the factors
        miss has the same total weight over time as what they hold, as in a full
        average. First moments only.

    Raises:
      ValueError: The gain is negative, infinite, or not a number.

    Examples:
      A momentum without the residual:

      >>> import jax
      >>> import lorapre_jax as lp
      >>> params = {"mlp": jax.ShapeDtypeStruct((512, 2048), "float32")}
      >>> tx = lp.lorapre_ema(0.9, rank=64, moment=lp.LowRank(residual_gain=0.0))
      >>> print(jax.eval_shape(tx.init, params).ema_factors["mlp"].right.shape)
      (2048, 64)

    References:
      After Wang et al., *Taming Momentum: Rethinking Optimizer States Through Low-Rank
      Approximation* (LoRA-Pre), 2026, section 3 and appendix B.1: `arXiv 2602.24283
      <https://arxiv.org/abs/2602.24283>`_

    See also:
      `AlgorithmOne`, `Dense`; :doc:`the method </method>`; :doc:`which rank
      </choosing>`.
    """

    residual_gain: float = 1.0
    factors_type = FactorPair
    first_weight = second_weight = staticmethod(one)

    def __post_init__(self):
        gain = self.residual_gain
        if not (isinstance(gain, numbers.Real) and 0 <= gain < math.inf):
            raise ValueError(
                f"residual_gain must be a finite number of at least 0, got {gain!r}."
            )
        # LowRank(1) and LowRank(1.0) are the same in a report and in a record.
        object.__setattr__(self, "residual_gain", float(gain))

    def init(self, batch_shape, p, q, rank, dtype, seed) -> FactorPair:
        del seed
        left, right = (*batch_shape, p, rank), (*batch_shape, q, rank)
        return FactorPair(jnp.zeros(left, dtype), jnp.zeros(right, dtype))

    def first_moment(self, state, g, decay, count, seed):
        decay = unbiased_decay(jnp.asarray(decay, g.dtype), count)
        new, _ = self._step(state, g, decay, seed)
        return _with_residual(1, self.residual_gain, state, new, g, decay), new

    def split_moment(self, state, g, decay, seed):
        """Returns the new factors; `g^T B`, `(q, r)`; and the residual R, `(p, q)`.

        R has what the factors miss of g and what they drop of the old product. The
        decay is hat b.
        """
        new, components = self._step(state, g, decay, seed)
        return new, components, _with_residual(0, 1, state, new, g, decay)

    def second_moment(self, state, g, decay, count, seed):
        target, decay = jnp.abs(g), jnp.asarray(decay, g.dtype)
        root_decay = unbiased_decay(jnp.sqrt(decay), count)
        decay = unbiased_decay(decay, count)
        # Read from the factors before the step: after it, g^2 would count twice.
        before = blend(decay, state.product, g)
        return before, self._step(state, target, root_decay, seed)[0]

    def _step(self, state, target, decay, seed) -> tuple[FactorPair, jax.Array]:
        left, right = state
        # The same in all leaves of a shape, but an array that they shared would have
        # one sharding, which the compiler would carry over to their factors.
        noise = sketch_columns(seed, right.shape, _NOISE, target.dtype)
        new, components = subspace(left, right, target, decay, noise)
        return FactorPair(*new), components


def _with_residual(weight, gain, old: FactorPair, new: FactorPair, g, decay):
    """Returns `weight * B A + gain * R`, with `B A` the new product.

        R = (X - B A) / (1 - hat b),  X = hat b * (old product) + (1 - hat b) g

    This is one product of `(p, 2r)` and `(2r, q)`, so that one (p, q) buffer serves
    both terms. It is in full precision, since the terms may be `1 / (1 - hat b)` times
    larger than their difference.
    """
    share = gain / (1 - decay)
    left = jnp.concatenate([(weight - share) * new.left, share * decay * old.left], 1)
    right = jnp.concatenate([new.right, old.right], axis=1)
    return dot(left, right.T) + gain * g
