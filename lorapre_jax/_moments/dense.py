"""A moment that is kept in full."""

import dataclasses

import jax.numpy as jnp

from lorapre_jax._numerics.averages import mass, root_of_mass
from lorapre_jax._numerics.norms import root


@dataclasses.dataclass(frozen=True)
class Dense:
    """Keeps the full moment, one number per parameter, as `optax.scale_by_adam` does.

    It is a first or a second moment, in float32 at least.

    Examples:
      A dense second moment for the output projections only:

      >>> import jax
      >>> import lorapre_jax as lp
      >>> params = {"mlp": {"down": jax.ShapeDtypeStruct((2048, 512), "float32")}}
      >>> tx = lp.scale_by_lorapre_adam(rank=64, second_moment={"down$": lp.Dense()})
      >>> print(lp.describe(tx, params).leaves[0].methods)
      (LowRank(residual_gain=1.0), Dense())

    References:
      Kingma and Ba, *Adam: A Method for Stochastic Optimization*, 2015, algorithm 1:
      `arXiv 1412.6980 <https://arxiv.org/abs/1412.6980>`_

    See also:
      `LowRank`, `RankOne`; :doc:`methods by pattern </choosing>`.
    """

    factors_type = None
    first_weight = staticmethod(mass)
    second_weight = staticmethod(root_of_mass)

    def first_moment(self, mu, g, decay, count, seed):
        del seed
        decay = jnp.asarray(decay, g.dtype)
        mu = decay * mu + (1 - decay) * g
        return mu / self.first_weight(decay, count), mu

    def second_moment(self, nu, g, decay, count, seed):
        del seed
        decay = jnp.asarray(decay, g.dtype)
        nu = decay * nu + (1 - decay) * jnp.square(g)
        return root(nu) / self.second_weight(decay, count), nu
