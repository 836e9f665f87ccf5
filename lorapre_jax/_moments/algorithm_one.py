"""Moments as LoRA-Pre was published."""

import dataclasses

import jax.numpy as jnp

from lorapre_jax._moments.factors import FactorPair
from lorapre_jax._numerics.arrays import at_least_float32, random_columns
from lorapre_jax._numerics.averages import blend, mass, mass_of_root, root_of_mass
from lorapre_jax._numerics.online_regression import jacobi


@dataclasses.dataclass(frozen=True)
class AlgorithmOne:
    r"""Keeps a moment as LoRA-Pre's Algorithm 1 does, `r (p + q)` numbers per matrix.

    Each factor takes the damped Newton step of Theorem 3.1, B from zero and A from a
    random start:

    .. math::
      B \leftarrow (1 - \eta) B + \eta\, g A^T (A A^T)^{-1}, \qquad
      A \leftarrow (1 - \eta) A + \eta\, (B^T B)^{-1} B^T g, \qquad
      1 - \eta = \sqrt{b}

    A first moment is read as :math:`b_1 B A + (1 - b_1) g` with the factors before the
    step, over `1 - b_1^t`. The factors C and D of a second moment follow `|g|` with
    decay rate `sqrt(b_2)`, and it is read as :math:`b_2 (C D)^2 + (1 - b_2) g^2`, over
    `1 - b_2^t`. What rounding may take from a Gram matrix (8 machine epsilons of its
    trace) is added to the 1e-6 by which the paper damps it (Appendix C.1).

    The step is quadratic in the gradient and unbounded: after a gradient far larger
    than those before it, the factors overshoot. Clip the gradients,
    `optax.clip_by_global_norm`; :doc:`what is hard </results/hard>` has figures.

    Examples:
      The paper's algorithm for Adam, with its published recipe:

      >>> import jax
      >>> import lorapre_jax as lp
      >>> params = {"mlp": jax.ShapeDtypeStruct((512, 2048), "float32")}
      >>> paper = lp.AlgorithmOne()
      >>> tx = lp.lorapre_adamw(
      ...     1e-3, rank=64, first_moment=paper, second_moment=paper, update_scale=0.25
      ... )
      >>> print(lp.describe(tx, params).leaves[0].methods)
      (AlgorithmOne(), AlgorithmOne())

    References:
      Wang et al., *Taming Momentum: Rethinking Optimizer States Through Low-Rank
      Approximation* (LoRA-Pre), 2026, algorithm 1 and theorem 3.1: `arXiv 2602.24283
      <https://arxiv.org/abs/2602.24283>`_

    See also:
      `LowRank`; :doc:`the method </method>`.
    """

    factors_type = FactorPair
    first_weight = staticmethod(mass)
    second_weight = staticmethod(mass_of_root)

    def init(self, batch_shape, p, q, rank, dtype, seed) -> FactorPair:
        left = jnp.zeros((*batch_shape, p, rank), dtype)
        noise = random_columns(seed, q, rank).astype(at_least_float32(dtype))
        right = (0.02 * noise).astype(dtype)
        return FactorPair(left, jnp.broadcast_to(right, (*batch_shape, q, rank)))

    def first_moment(self, state, g, decay, count, seed):
        del seed
        decay = jnp.asarray(decay, g.dtype)
        before = decay * state.product + (1 - decay) * g
        return before / self.first_weight(decay, count), self._step(state, g, decay)

    def second_moment(self, state, g, decay, count, seed):
        del seed
        decay = jnp.asarray(decay, g.dtype)
        before = blend(decay, state.product, g)
        new = self._step(state, jnp.abs(g), jnp.sqrt(decay))
        # The paper corrects as if the state were Adam's, and not by `second_weight`.
        return before / root_of_mass(decay, count), new

    def _step(self, state, target, decay) -> FactorPair:
        return FactorPair(*jacobi(state.left, state.right, target, decay))
