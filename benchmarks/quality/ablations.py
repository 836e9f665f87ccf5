"""Ablations: the default with one thing changed, at rank width / 8.

The steps from Algorithm 1 to the default have rows in results/archive. Their code is no
longer in the library; the commit that each row names has it.
"""

import inspect
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

import lorapre_jax as lp
from benchmarks.quality.methods import METHODS, our_muon, ours, rank_one
from benchmarks.quality.rules import ADAM_RATES, B1, Method
from lorapre_jax import _adam as adam_module
from lorapre_jax._leaves import map_leaves
from lorapre_jax._moments import factors, low_rank, row_column

GAINS = (0.5, 1.4, 2.0)
# Without factors, the only basis is that of the entries.
_DENSE_M: dict[str, Any] = {
    "first_moment": lp.Dense(),
    "second_moment": lp.RankOne(),
}


def _adam(**fields: Any) -> Method:
    return Method(ours(8, **fields), ADAM_RATES)


def _gain(gain: float) -> lp.LowRank:
    return lp.LowRank(residual_gain=gain)


def _muon(**fields: Any) -> Method:
    return Method(our_muon(8, **fields), (2.5e-3, 5e-3, 1e-2))


def _with(module: ModuleType, **values: Any) -> Method:
    """The default with other values of these names of a private module.

    They are constants in the library, since a user would gain nothing by changing them.
    """

    def rule(width: int, b2: float) -> optax.GradientTransformation:
        default = ours(8)(width, b2)

        def update(updates, state, params=None):
            traced_anew = {"_run_kind": inspect.unwrap(map_leaves._run_kind)}
            with (
                mock.patch.multiple(module, **values),
                mock.patch.multiple(map_leaves, **traced_anew),
            ):
                return default.update(updates, state, params)

        return optax.GradientTransformation(default.init, update)

    return Method(rule, ADAM_RATES)


class _Uncorrected(lp.LowRank):
    """Without bias correction."""

    def split_moment(self, state, g, decay, seed):
        return super().split_moment(state, g, jnp.full_like(decay, B1), seed)


class _FromRandomDirections(lp.LowRank):
    """A left factor that starts as a random basis, not from the first gradient."""

    def init(self, batch_shape, p, q, rank, dtype, seed):
        noise = jax.random.normal(jax.random.key(seed), (p, rank), dtype)
        left, right = super().init(batch_shape, p, q, rank, dtype, seed)
        return factors.FactorPair(left + jnp.linalg.qr(noise)[0], right)


def _along_the_width(width: int, b2: float) -> optax.GradientTransformation:
    """In both leaves, the axis of the width forms the rows of the left factor."""
    axes = {
        "^embed/": lp.MatrixAxes(rows=-1, columns=-2),
        "^head/": lp.MatrixAxes(rows=-2, columns=-1),
    }
    matrices = lp.select_matrices(axes=axes)
    return lp.scale_by_lorapre_adam(
        width // 8, B1, b2, matrices=matrices, second_moment=lp.RotatedRankOne()
    )


ABLATIONS: dict[str, Method] = {
    **{f"gain {gain}": _adam(first_moment=_gain(gain)) for gain in GAINS},
    # With `RankOne()`, a larger gain helps, as does the basis of the left factor.
    **{
        f"rank one, gain {gain}": _adam(
            first_moment=_gain(gain), second_moment=lp.RankOne()
        )
        for gain in (0.3, *GAINS, 4.0)
    },
    "v factored": _adam(second_moment=lp.LowRank()),
    "v dense": _adam(second_moment=lp.Dense()),
    **{f"b1 = {b1}": _adam(b1=b1) for b1 in (0.5, 0.8)},
    # Constants, which no argument changes.
    "no floor under v": _with(row_column, FLOOR=0.0),
    "no bounds on quotients": _with(adam_module, bounded=lambda root_v, least: root_v),
    "no bias correction": _adam(first_moment=_Uncorrected()),
    **{
        f"{share:g} of noise in the sketch": _with(low_rank, _NOISE=share)
        for share in (1e-4, 1e-2)
    },
    "start from random directions": _adam(first_moment=_FromRandomDirections()),
    "m none (b1 = 0)": _adam(b1=0.0, **_DENSE_M),
    "m dense": _adam(**_DENSE_M),
    "bfloat16 factors": _adam(factor_dtype="bfloat16"),
    "bfloat16 factors, twice the rank": Method(
        ours(4, factor_dtype="bfloat16"), ADAM_RATES
    ),
    # Embedding and head factored in other ways than in `default_all/8`.
    "embeddings, v along the factor": Method(
        ours(8), ADAM_RATES, embeddings=ours(8, second_moment=lp.RotatedRankOne())
    ),
    "embeddings, v along the width": Method(
        ours(8), ADAM_RATES, embeddings=_along_the_width
    ),
    "embeddings, m dense": Method(ours(8), ADAM_RATES, embeddings=ours(8, **_DENSE_M)),
    "embeddings at rank/2": Method(ours(8), ADAM_RATES, embeddings=rank_one(2)),
    "muon, no nesterov": _muon(nesterov=False),
    **{f"muon, gain {gain}": _muon(moment=_gain(gain)) for gain in (0.3, 0.45, 1.0)},
}

ENTRANTS: dict[str, Method] = METHODS | ABLATIONS
