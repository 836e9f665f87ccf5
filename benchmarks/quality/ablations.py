"""One mechanism at a time: from Algorithm 1 to the default, and back from the default.

Rank is an eighth of the width throughout.
"""

import dataclasses
from typing import Any

import lorapre_jax as lp
from benchmarks.quality.methods import Method, our_muon, ours

PAPER = lp.OnlineRegression.paper()
DEFAULT = lp.OnlineRegression()

GAINS = (0.0, 0.3, 0.5, 0.7, 1.4, 2.0)
_LOW, _HIGH = (2.5e-4, 5e-4, 1e-3), (1e-3, 2e-3, 4e-3)


def _both(moment: lp.OnlineRegression, **fields: Any) -> Method:
    """The same repairs for the factors of both moments."""
    second = dataclasses.replace(moment, complement_gain=None)
    return Method(ours(8, first_moment=moment, second_moment=second, **fields), _HIGH)


def _first(**fields: Any) -> Method:
    moment = dataclasses.replace(DEFAULT, **fields)
    return Method(ours(8, first_moment=moment), _HIGH)


def _second(second: Any, **fields: Any) -> Method:
    return Method(ours(8, second_moment=second, **fields), _HIGH)


def _muon(**fields: Any) -> Method:
    return Method(our_muon(8, **fields), (2.5e-3, 5e-3, 1e-2))


_bias = dataclasses.replace(PAPER, bias_correction="exact")
_start = dataclasses.replace(_bias, start="gradient")
_damping = dataclasses.replace(_start, damping=None, damping_scale="relative")
_gain = dataclasses.replace(_damping, complement_gain=1.0)
_subspace = dataclasses.replace(_gain, rule="subspace")

ABLATIONS: dict[str, Method] = {
    "paper": Method(ours(8, first_moment=PAPER, second_moment=PAPER), _LOW),
    # Each with all those above it.
    "+ exact bias": _both(_bias),
    "+ start from gradient": _both(_start),
    "+ relative damping": _both(_damping),
    "+ gain": _both(_gain),
    "+ gain, gauss_seidel": _both(dataclasses.replace(_gain, rule="gauss_seidel")),
    "+ subspace": _both(_subspace),
    # The next one is the default; what follows are single steps away from it.
    "+ rank-one v (default)": Method(ours(8), _HIGH),
    "jacobi": _first(rule="jacobi"),
    "gauss_seidel": _first(rule="gauss_seidel"),
    "bias adam": _first(bias_correction="adam"),
    "gain None": _first(complement_gain=None),
    **{f"gain {gain}": _first(complement_gain=gain) for gain in GAINS},
    "jacobi, start random": _first(rule="jacobi", start="random"),
    "v dense": _second(lp.Dense()),
    "m none (b1 = 0)": Method(ours(8, b1=0.0, first_moment=lp.Dense()), _HIGH),
    "m dense": Method(ours(8, first_moment=lp.Dense()), _HIGH),
    "bfloat16 factors": Method(ours(8, factor_dtype="bfloat16"), _HIGH),
    "bfloat16 factors, twice the rank": Method(ours(4, factor_dtype="bfloat16"), _HIGH),
    # Embedding and head as matrices too.
    "embeddings, m dense": Method(
        ours(8), _HIGH, embeddings=ours(8, first_moment=lp.Dense())
    ),
    "embeddings, v dense": Method(
        ours(8), _HIGH, embeddings=ours(8, second_moment=lp.Dense())
    ),
    "embeddings at rank/2": Method(ours(8), _HIGH, embeddings=ours(2)),
    "muon (default)": _muon(),
    "muon, no nesterov": _muon(nesterov=False),
    **{
        f"muon, gain {gain}": _muon(moment=lp.OnlineRegression(complement_gain=gain))
        for gain in (0.3, 0.45, 1.0)
    },
}
