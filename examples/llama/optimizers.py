"""The optimizers to compare, made from one configuration.

All share schedule, clipping and weight decay, and train the embedding, the head and
the norms by Adam. Only the rule for the matrices differs.
"""

import re
from typing import Any, NamedTuple

import jax
import optax

import lorapre_jax as lp
from examples.llama.config import OptimizerConfig, OptimizerName

MATRICES = r"^layers/(\d+/)?(attention|mlp)/\w+/kernel$"
EMBEDDINGS = r"^(embed/embedding|head/kernel)$"

MUON_BETA = 0.95
MUON_RMS = 0.2  # root mean square of Muon's update, about that of Adam's
GALORE_REFRESH = 100  # steps between two projections


class Rates(NamedTuple):
    """Peak learning rates; ``dense`` is for embedding, head and norms."""

    matrices: float
    dense: float


# The rates of benchmarks/quality at width 128, except that both AdamWs have one rate
# for all leaves. Tune them for other sizes.
DEFAULT_RATES: dict[OptimizerName, Rates] = {
    "adamw": Rates(2e-3, 2e-3),
    "lorapre_adamw": Rates(2e-3, 2e-3),
    "lorapre_muon": Rates(5e-3, 4e-3),
    "muon": Rates(5e-3, 4e-3),
    "galore": Rates(4e-3, 4e-3),
}


class _Given(NamedTuple):
    """What a rule needs besides its configuration."""

    rate: optax.Schedule
    dense_rate: optax.Schedule
    param_shardings: Any | None


def make_optimizer(
    config: OptimizerConfig, steps: int, param_shardings: Any | None = None
) -> optax.GradientTransformation:
    """Returns the named optimizer after clipping by the global norm, for ``steps``.

    With ``param_shardings`` every device orthogonalises its share of the matrices for
    lorapre_muon.
    """
    given = _Given(*schedules(config, steps), param_shardings)
    rule = _RULES[config.name](config, given)
    if config.clip_norm is None:
        return rule
    return optax.chain(clip(config.clip_norm), rule)


def clip(norm: float) -> optax.GradientTransformation:
    """Clips by the global norm, which is summed in float32, unlike optax's."""
    by_norm = optax.clip_by_global_norm(norm)

    def update(grads: Any, _: Any) -> Any:
        wide = optax.tree.cast(grads, "float32")
        clipped, _ = by_norm.update(wide, by_norm.init(wide))
        return jax.tree.map(lambda x, g: x.astype(g.dtype), clipped, grads)

    return optax.stateless(update)


def schedules(
    config: OptimizerConfig, steps: int
) -> tuple[optax.Schedule, optax.Schedule]:
    """Returns the learning rates of the matrices and of all other leaves."""
    defaults = DEFAULT_RATES[config.name]
    matrices = config.learning_rate or defaults.matrices
    dense = config.dense_learning_rate or defaults.dense
    return (
        schedule(matrices, config.warmup, steps),
        schedule(dense, config.warmup, steps),
    )


def schedule(peak: float, warmup: float, steps: int) -> optax.Schedule:
    """Returns a warm-up over ``warmup * steps`` steps, then a cosine to a tenth."""
    rise = round(warmup * steps)
    return optax.warmup_cosine_decay_schedule(
        # The rate of the first update is not zero, but that of the first step of the
        # rise.
        init_value=peak / (rise + 1),
        peak_value=peak,
        warmup_steps=rise,
        decay_steps=max(steps, rise + 1),
        end_value=peak / 10,
    )


def _patterns(config: OptimizerConfig) -> list[str]:
    return [MATRICES, EMBEDDINGS] if config.factor_embeddings else [MATRICES]


def _selection(*patterns: str) -> Any:
    """Selects the last two axes of each chosen leaf; an axis of layers is batch."""
    axes = lp.MatrixAxes(rows=-2, columns=-1)
    return lp.select_matrices(include=patterns, axes=axes)


def _matching(patterns: list[str], params: Any) -> Any:
    """Returns a tree of bools: which leaves of ``params`` have such a path."""

    def chosen(path: Any, _: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return any(re.search(pattern, name) for pattern in patterns)

    return jax.tree_util.tree_map_with_path(chosen, params)


def _is_matrix(config: OptimizerConfig, params: Any) -> Any:
    """Returns which leaves the rule for matrices takes."""
    return _matching(_patterns(config), params)


def _adamw(config: OptimizerConfig, given: _Given) -> Any:
    return optax.adamw(
        given.rate,
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=lambda params: _is_matrix(config, params),
    )


def _lorapre_adamw(config: OptimizerConfig, given: _Given) -> Any:
    return lp.lorapre_adamw(
        given.rate,
        config.rank,
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=lambda params: _is_matrix(config, params),
        matrices=_selection(*_patterns(config)),
        update_scale=config.update_scale,
        slices_at_once=config.layers_at_once,
        **_moments(config, "first_moment", "second_moment"),
    )


def _lorapre_muon(config: OptimizerConfig, given: _Given) -> Any:
    return lp.lorapre_muon(
        given.rate,
        config.rank,
        beta=MUON_BETA,
        weight_decay=config.weight_decay,
        consistent_rms=MUON_RMS,
        matrices=_selection(*_patterns(config)),
        adam_learning_rate=given.dense_rate,
        adam_b1=config.b1,
        adam_b2=config.b2,
        update_scale=config.update_scale,
        slices_at_once=config.layers_at_once,
        param_shardings=given.param_shardings,
        **_moments(config, "moment"),
    )


def _moments(config: OptimizerConfig, *names: str) -> dict[str, Any]:
    """Returns no arguments, or those of the paper's moments."""
    if config.algorithm == "default":
        return {}
    return dict.fromkeys(names, lp.AlgorithmOne())


def _muon(config: OptimizerConfig, given: _Given) -> Any:
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    matrix_rule = optax.contrib.muon(
        given.rate,
        beta=MUON_BETA,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(
            lambda _: axes, params
        ),
        consistent_rms=MUON_RMS,
    )
    return _with_dense_adam(matrix_rule, config, given)


def _galore(config: OptimizerConfig, given: _Given) -> Any:
    axes = optax.contrib.GaLoreDimensionNumbers(reduction_axis=0, output_axis=1)
    matrix_rule = optax.contrib.galore(
        given.rate,
        rank=config.rank,
        update_proj_gap=GALORE_REFRESH,
        base_optimizer=optax.scale_by_adam(b1=config.b1, b2=config.b2),
        weight_decay=config.weight_decay,
        weight_dimension_numbers=axes,
    )
    return _with_dense_adam(matrix_rule, config, given)


def _with_dense_adam(matrix_rule: Any, config: OptimizerConfig, given: _Given) -> Any:
    """Returns ``matrix_rule`` for the matrices with plain Adam for all other leaves.

    Their own fallbacks are not used: muon's is Nesterov Adam, and galore's has
    zero-size arrays, which Orbax does not save.
    """
    dense_rule = optax.adam(given.dense_rate, b1=config.b1, b2=config.b2)
    return _divided(_patterns(config), {"matrix": matrix_rule, "dense": dense_rule})


def _divided(patterns: list[str], rules: dict[Any, Any]) -> Any:
    """Returns the first rule for the leaves that match, the second for all others."""
    inside, outside = rules

    def labels(params: Any) -> Any:
        chosen = _matching(patterns, params)
        return jax.tree.map(lambda yes: inside if yes else outside, chosen)

    return optax.partition(rules, labels)


_RULES = {
    "adamw": _adamw,
    "lorapre_adamw": _lorapre_adamw,
    "lorapre_muon": _lorapre_muon,
    "muon": _muon,
    "galore": _galore,
}
