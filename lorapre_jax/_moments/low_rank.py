"""Moments that are kept as a pair of thin factors, the default's first moment."""

import dataclasses
import math
import numbers

import jax.numpy as jnp

from lorapre_jax._moments.factors import FactorPair
from lorapre_jax._numerics.arrays import sketch_columns
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
        new, components, missed = self._step(state, g, decay, seed)
        gain = self.residual_gain
        right = gain * components - new.right  # So that the sum is B A + gain R.
        m = _less(new.left, right, gain * missed, state.right, decay, gain * g)
        return m, new

    def split_moment(self, state, g, decay, seed):
        """Returns the new factors; `g^T B`, `(q, r)`; and the residual R, `(p, q)`.

        R has what the factors miss of g and what they drop of the old product. The
        decay is hat b.
        """
        new, components, missed = self._step(state, g, decay, seed)
        residual = _less(new.left, components, missed, state.right, decay, g)
        return new, components, residual

    def second_moment(self, state, g, decay, count, seed):
        target, decay = jnp.abs(g), jnp.asarray(decay, g.dtype)
        root_decay = unbiased_decay(jnp.sqrt(decay), count)
        decay = unbiased_decay(decay, count)
        # Read from the factors before the step: after it, g^2 would count twice.
        before = blend(decay, state.product, g)
        return before, self._step(state, target, root_decay, seed)[0]

    def _step(self, state, target, decay, seed):
        left, right = state
        # The same in all leaves of a shape, but an array that they shared would have
        # one sharding, which the compiler would carry over to their factors.
        noise = sketch_columns(seed, right.shape, _NOISE, target.dtype)
        new, components, missed = subspace(left, right, target, decay, noise)
        return FactorPair(*new), components, missed


def _less(left, right, missed, old_right, decay, g):
    """Returns `g - left right^T + hat b / (1 - hat b) missed old_right^T`, `(p, q)`.

    With `right` the components of g along the new B, and `missed` what that misses of
    the old B, this is the residual

        R = (X - B A) / (1 - hat b),  X = hat b * (old product) + (1 - hat b) g

    without the small difference of large products, so that low precision will do. It is
    one product of `(p, 2r)` and `(2r, q)`, so that one (p, q) buffer serves both terms.
    """
    left = jnp.concatenate([left, decay / (decay - 1) * missed], axis=1)
    return g - left @ jnp.concatenate([right, old_right], axis=1).T
