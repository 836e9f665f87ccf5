"""The methods of the race: the published ones, and ours at several ranks."""

from typing import Any

import optax

import lorapre_jax as lp
from benchmarks.quality.peers import PEERS
from benchmarks.quality.rules import (
    ADAM_RATES,
    B1,
    MUON_BETA,
    MUON_RATES,
    MUON_RMS,
    Method,
    Rule,
    stacked,
)

_AXES = lp.MatrixAxes(rows=-2, columns=-1)


def ours(share: int, b1: float = B1, **fields: Any) -> Rule:
    """LoRA-Pre Adam at rank width / `share`."""

    def rule(width: int, b2: float) -> optax.GradientTransformation:
        return stacked(
            lp.scale_by_lorapre_adam(width // share, b1, b2, matrices=_AXES, **fields)
        )

    return rule


def our_muon(share: int, **fields: Any) -> Rule:
    def rule(width: int, b2: float) -> optax.GradientTransformation:
        del b2
        return stacked(
            lp.scale_by_lorapre_muon(
                width // share,
                MUON_BETA,
                matrices=_AXES,
                consistent_rms=MUON_RMS,
                **fields,
            )
        )

    return rule


def paper(share: int) -> Rule:
    moment = lp.AlgorithmOne()
    return ours(share, first_moment=moment, second_moment=moment)


def rank_one(share: int) -> Rule:
    """LoRA-Pre Adam with `RankOne()` second moments."""
    return ours(share, second_moment=lp.RankOne())


_SHARES = (4, 8, 16, 32, 64)
_SEARCHED = (8, 32)

METHODS: dict[str, Method] = {
    **PEERS,
    # Adam with its second moment as rank one, which has no rank.
    "dense_rank_one": Method(
        ours(8, first_moment=lp.Dense(), second_moment=lp.RankOne()), ADAM_RATES
    ),
    # One rate for all parameters, as published; then matrices at a quarter of it.
    "paper/8": Method(paper(8), (2.5e-4, 5e-4, 1e-3), dense_factor=1),
    "paper_0.25/8": Method(paper(8), (2.5e-4, 5e-4, 1e-3), dense_factor=4),
    # All other leaves at the common rate; a factor of 0.25 then changes nothing else.
    "paper_common/8": Method(paper(8), (2.5e-4, 5e-4, 1e-3)),
    **{
        f"default/{share}": Method(
            ours(share),
            ADAM_RATES,
            rate_of=None if share in _SEARCHED else "default/8",
        )
        for share in _SHARES
    },
    **{f"rank_one/{share}": Method(rank_one(share), ADAM_RATES) for share in _SHARES},
    "paper_muon/8": Method(our_muon(8, moment=lp.AlgorithmOne()), MUON_RATES),
    # Embedding and head factored too, with `RankOne()` second moments.
    **{
        f"default_all/{share}": Method(
            ours(share),
            ADAM_RATES,
            embeddings=rank_one(share),
            rate_of=f"default/{share}",
        )
        for share in _SEARCHED
    },
    "rank_one_all/8": Method(rank_one(8), ADAM_RATES, embeddings=rank_one(8)),
    "default_muon/8": Method(our_muon(8), MUON_RATES),
    # The same bytes as at width / 8 in float32.
    "default_bf16/4": Method(
        ours(4, factor_dtype="bfloat16"), ADAM_RATES, rate_of="default/8"
    ),
    "default_muon_bf16/4": Method(our_muon(4, factor_dtype="bfloat16"), MUON_RATES),
    "default_muon/32": Method(our_muon(32), MUON_RATES),
}
