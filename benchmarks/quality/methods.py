"""The methods of the race: each one's rule for the matrices, without a learning rate.

Everything else is the same for all methods: schedule, clipping, and Adam with one
common rate for the embedding, the head and the norms, unless `Method` says otherwise.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lorapre_jax as lp
from benchmarks.baselines.apollo import scale_by_apollo, scale_by_apollo_mini
from benchmarks.baselines.dct import scale_by_dct_adam
from benchmarks.baselines.fira import scale_by_fira
from benchmarks.baselines.flora import scale_by_flora
from benchmarks.baselines.galore import scale_by_galore
from benchmarks.baselines.mlorc import scale_by_mlorc
from benchmarks.baselines.q_galore import scale_by_q_galore

B1, B2 = 0.9, 0.95
MUON_BETA = 0.95
MUON_RMS = 0.2
"""Root mean square of Muon's update, which is about that of Adam's."""
REFRESH = 100
"""Steps between two projections of the methods that keep one."""

Rule = Callable[[int, float], optax.GradientTransformation]
"""From the model's width and b2 to a transform whose updates are to be subtracted."""


@dataclasses.dataclass(frozen=True)
class Method:
    matrices: Rule
    rates: tuple[float, ...]
    """Peak rates of the matrices that the search begins with, in factors of two."""
    embeddings: Rule | None = None
    """The rule for the embedding and the head; None means Adam."""
    dense_factor: float | None = None
    """Ratio of the dense rate to the matrices'; None means the common dense rate."""
    rate_of: str | None = None
    """The method whose best rate it has; None means that its own is searched."""


def adam(width: int, b2: float) -> optax.GradientTransformation:
    del width
    return optax.scale_by_adam(B1, b2)


def stacked(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `inner` to stacks of leaves of one shape, so that it compiles faster."""

    def stack(leaves: Mapping[str, Any]) -> dict[str, Any]:
        shapes: dict[str, list[Any]] = {}
        for path in sorted(leaves):
            name = "x".join(map(str, leaves[path].shape))
            shapes.setdefault(name, []).append(leaves[path])
        return {name: jnp.stack(group) for name, group in shapes.items()}

    def unstack(stacks: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
        slices = {name: iter(stack) for name, stack in stacks.items()}
        return {
            path: next(slices["x".join(map(str, like[path].shape))])
            for path in sorted(like)
        }

    def update(updates, state, params=None):
        del params
        directions: Any
        directions, state = inner.update(stack(updates), state)
        return unstack(directions, updates), state

    return optax.GradientTransformation(
        lambda params: inner.init(stack(params)), update
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


def rank_one(share: int) -> Rule:
    """LoRA-Pre Adam with `RankOne()` second moments."""
    return ours(share, second_moment=lp.RankOne())


_SHARES = (4, 8, 16, 32, 64)
_SEARCHED = (8, 32)
_ADAM_RATES = (1e-3, 2e-3, 4e-3)
_MUON_RATES = (2.5e-3, 5e-3, 1e-2)

METHODS: dict[str, Method] = {
    "adamw": Method(adam, _ADAM_RATES),
    "adamw_b1_0.5": Method(lambda width, b2: optax.scale_by_adam(0.5, b2), _ADAM_RATES),
    "adafactor": Method(_adafactor, _ADAM_RATES),
    "muon": Method(_muon, _MUON_RATES),
    # optax's projects the larger side of a matrix, the paper's the smaller one.
    "galore/4": Method(_galore(4), (2e-3, 4e-3, 8e-3)),
    "galore_published/4": Method(peer(scale_by_galore, 4), (2e-3, 4e-3, 8e-3)),
    "q_galore/4": Method(peer(scale_by_q_galore, 4), _ADAM_RATES),
    "fira/4": Method(peer(scale_by_fira, 4), _ADAM_RATES),
    "apollo/4": Method(peer(scale_by_apollo, 4), _ADAM_RATES),
    "apollo_mini": Method(
        lambda width, b2: scale_by_apollo_mini(B1, b2, update_proj_gap=REFRESH),
        _ADAM_RATES,
    ),
    "flora/4": Method(lambda width, b2: scale_by_flora(width // 4, B1), _ADAM_RATES),
    "mlorc/8": Method(
        lambda width, b2: scale_by_mlorc(width // 8, B1, b2), _ADAM_RATES
    ),
    "dct/4": Method(
        lambda width, b2: scale_by_dct_adam(width // 4, B1, b2), _ADAM_RATES
    ),
    # One rate for all parameters, as published; then matrices at a quarter of it.
    "paper/8": Method(paper(8), (2.5e-4, 5e-4, 1e-3), dense_factor=1),
    "paper_0.25/8": Method(paper(8), (2.5e-4, 5e-4, 1e-3), dense_factor=4),
    # All other leaves at the common rate; a factor of 0.25 then changes nothing else.
    "paper_common/8": Method(paper(8), (2.5e-4, 5e-4, 1e-3)),
    **{
        f"default/{share}": Method(
            ours(share),
            _ADAM_RATES,
            rate_of=None if share in _SEARCHED else "default/8",
        )
        for share in _SHARES
    },
    **{f"rank_one/{share}": Method(rank_one(share), _ADAM_RATES) for share in _SHARES},
    "paper_muon/8": Method(our_muon(8, moment=lp.AlgorithmOne()), _MUON_RATES),
    # Embedding and head factored too, with `RankOne()` second moments.
    **{
        f"default_all/{share}": Method(
            ours(share),
            _ADAM_RATES,
            embeddings=rank_one(share),
            rate_of=f"default/{share}",
        )
        for share in _SEARCHED
    },
    "rank_one_all/8": Method(rank_one(8), _ADAM_RATES, embeddings=rank_one(8)),
    "default_muon/8": Method(our_muon(8), _MUON_RATES),
    # The same bytes as at width / 8 in float32.
    "default_bf16/4": Method(
        ours(4, factor_dtype="bfloat16"), _ADAM_RATES, rate_of="default/8"
    ),
    "default_muon_bf16/4": Method(our_muon(4, factor_dtype="bfloat16"), _MUON_RATES),
    "default_muon/32": Method(our_muon(32), _MUON_RATES),
}
