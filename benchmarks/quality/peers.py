"""The published methods to compare with."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from benchmarks.baselines.alice import scale_by_alice
from benchmarks.baselines.apollo import scale_by_apollo, scale_by_apollo_mini
from benchmarks.baselines.dct import scale_by_dct_adam
from benchmarks.baselines.dion import scale_by_dion
from benchmarks.baselines.fira import scale_by_fira
from benchmarks.baselines.flora import scale_by_flora
from benchmarks.baselines.foam import scale_by_foam
from benchmarks.baselines.galore import scale_by_galore
from benchmarks.baselines.ldadam import scale_by_ldadam
from benchmarks.baselines.mlorc import scale_by_mlorc
from benchmarks.baselines.q_galore import scale_by_q_galore
from benchmarks.baselines.racs import scale_by_racs
from benchmarks.baselines.rmnp import scale_by_rmnp
from benchmarks.baselines.scale import scale_by_scale, scale_by_scale_last_layer
from benchmarks.baselines.sinkgd import scale_by_sinkgd
from benchmarks.baselines.soap import scale_by_soap
from benchmarks.quality.rules import (
    ADAM_RATES,
    B1,
    MUON_BETA,
    MUON_RATES,
    MUON_RMS,
    REFRESH,
    Method,
    Rule,
    adam,
)


def peer(scale_by: Callable[..., optax.GradientTransformation], share: int) -> Rule:
    """A baseline that takes a rank, betas and the steps between projections."""
    return lambda width, b2: scale_by(width // share, B1, b2, update_proj_gap=REFRESH)


def _muon(width: int, b2: float) -> optax.GradientTransformation:
    del width, b2
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    rule = optax.contrib.muon(
        1.0,
        beta=MUON_BETA,
        consistent_rms=MUON_RMS,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(
            lambda _: axes, params
        ),
    )
    return optax.chain(rule, optax.scale(-1.0))


def _galore(share: int) -> Rule:
    def rule(width: int, b2: float) -> optax.GradientTransformation:
        rule = optax.contrib.galore(
            1.0,
            rank=width // share,
            update_proj_gap=REFRESH,
            base_optimizer=optax.scale_by_adam(b1=B1, b2=b2),
            weight_dimension_numbers=optax.contrib.GaLoreDimensionNumbers(
                reduction_axis=0, output_axis=1
            ),
        )
        return optax.chain(rule, optax.scale(-1.0))

    return rule


def _adafactor(width: int, b2: float) -> optax.GradientTransformation:
    """optax's Adafactor, with absolute steps as in all other methods."""
    del width, b2
    rule = optax.adafactor(1.0, multiply_by_parameter_scale=False)
    return optax.chain(rule, optax.scale(-1.0))


def _alice(share: int, **fields: Any) -> Rule:
    """Alice with its own betas; 5/16 of its rank leads, as in its 60M model."""

    def rule(width: int, b2: float) -> optax.GradientTransformation:
        del b2
        rank = width // share
        return scale_by_alice(
            rank, update_proj_gap=REFRESH, leading=5 * rank // 16, **fields
        )

    return rule


def _dion(share: int) -> Rule:
    return lambda width, b2: scale_by_dion(
        width // share, MUON_BETA, consistent_rms=MUON_RMS
    )


def _scale_embeddings(width: int, b2: float) -> optax.GradientTransformation:
    """As published: momentum for the head alone."""
    del width, b2
    return optax.partition(
        {"embed": scale_by_scale(), "head": scale_by_scale_last_layer()},
        lambda params: {path: path.partition("/")[0] for path in params},
    )


_SCALE_RATES = (5e-4, 1e-3, 2e-3)

PEERS: dict[str, Method] = {
    "adamw": Method(adam, ADAM_RATES),
    "adamw_b1_0.5": Method(lambda width, b2: optax.scale_by_adam(0.5, b2), ADAM_RATES),
    "adafactor": Method(_adafactor, ADAM_RATES),
    "muon": Method(_muon, MUON_RATES),
    # optax's projects the larger side of a matrix, the paper's the smaller one.
    "galore/4": Method(_galore(4), (2e-3, 4e-3, 8e-3)),
    "galore_published/4": Method(peer(scale_by_galore, 4), (2e-3, 4e-3, 8e-3)),
    "q_galore/4": Method(peer(scale_by_q_galore, 4), ADAM_RATES),
    "fira/4": Method(peer(scale_by_fira, 4), ADAM_RATES),
    "apollo/4": Method(peer(scale_by_apollo, 4), ADAM_RATES),
    "apollo_mini": Method(
        lambda width, b2: scale_by_apollo_mini(B1, b2, update_proj_gap=REFRESH),
        ADAM_RATES,
    ),
    "flora/4": Method(lambda width, b2: scale_by_flora(width // 4, B1), ADAM_RATES),
    "mlorc/8": Method(lambda width, b2: scale_by_mlorc(width // 8, B1, b2), ADAM_RATES),
    "dct/4": Method(
        lambda width, b2: scale_by_dct_adam(width // 4, B1, b2), ADAM_RATES
    ),
    # Published from 2024 on. Constants are the published ones, except that Adams have
    # the race's b1 and b2.
    "soap": Method(lambda width, b2: scale_by_soap(b2=b2), ADAM_RATES),
    "rmnp": Method(
        lambda width, b2: scale_by_rmnp(MUON_BETA, consistent_rms=MUON_RMS), MUON_RATES
    ),
    "dion/4": Method(_dion(4), MUON_RATES),
    # Means of four entries, so a quarter of Adam's state.
    "foam/4": Method(lambda width, b2: scale_by_foam(b1=B1, b2=b2), (2e-3, 4e-3, 8e-3)),
    "foam_squares/4": Method(
        lambda width, b2: scale_by_foam(b1=B1, b2=b2, fold_squares=True),
        (2e-3, 4e-3, 8e-3),
    ),
    "ldadam/4": Method(
        lambda width, b2: scale_by_ldadam(width // 4, B1, b2), ADAM_RATES
    ),
    "ldadam_no_feedback/4": Method(
        lambda width, b2: scale_by_ldadam(width // 4, B1, b2, error_feedback=False),
        ADAM_RATES,
    ),
    "scale": Method(lambda width, b2: scale_by_scale(), _SCALE_RATES),
    # As published: embedding and head too, at one rate.
    "scale_all": Method(
        lambda width, b2: scale_by_scale(),
        _SCALE_RATES,
        embeddings=_scale_embeddings,
        dense_factor=1,
    ),
    "sinkgd": Method(lambda width, b2: scale_by_sinkgd(), _SCALE_RATES),
    "racs": Method(lambda width, b2: scale_by_racs(), (1e-2, 2e-2, 4e-2)),
    "alice/4": Method(_alice(4), (5e-3, 1e-2, 2e-2)),
    "alice_0/4": Method(_alice(4, b3=0), (5e-3, 1e-2, 2e-2)),
}
