"""The published recipe of each size, with the source of every value."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from examples.llama.config.optimizer import OptimizerConfig

_LORAPRE = "LoRA-Pre, arXiv 2602.24283"
_GALORE = "GaLore, arXiv 2403.03507"
_SCRIPTS = "GaLore's scripts; LoRA-Pre names a grid only"


class Setting(NamedTuple):
    value: Any
    source: str


# Of each size: steps, rank of LoRA-Pre, peak learning rate.
_SIZES = {
    "60m": (10_000, 128, 0.01),
    "130m": (20_000, 256, 0.01),
    "350m": (60_000, 256, 0.01),
    "1b": (100_000, 512, 0.01),
    "7b": (150_000, 1024, 0.005),
}


def paper(preset: str, optimizer: str | None = None) -> dict[str, Setting]:
    """Returns the paper's settings for ``preset``, by their names.

    The ``optimizer`` is lorapre_adamw by default. Others have the settings that all
    share, and lorapre_muon those of Algorithm 1 too. The file of the tokenizer, T5's,
    is not included. Raises ``ValueError`` for a size that was not published.
    """
    if preset not in _SIZES:
        raise ValueError(
            f"recipe paper is for the presets {', '.join(_SIZES)}, not for {preset}"
        )
    steps, rank, rate = _SIZES[preset]
    shared = {
        "optimizer.warmup": Setting(0.1, f"{_GALORE}; then a cosine to a tenth"),
        "optimizer.weight_decay": Setting(0.0, _GALORE),
        "optimizer.clip_norm": Setting(
            1.0 if preset == "7b" else None, f"{_GALORE}: for 7B alone"
        ),
        "optimizer.b1": Setting(0.9, _LORAPRE),
        "optimizer.b2": Setting(0.95, _LORAPRE),
        "data.batching": Setting("one-per-row", _GALORE),
        "data.vocab_size": Setting(32_000, f"{_GALORE}; T5's pieces"),
        "data.seq_len": Setting(256, _GALORE),
        "data.batch_size": Setting(512, _GALORE),
        "steps": Setting(steps, _GALORE),
        "model.param_dtype": Setting("bfloat16", f"{_GALORE}: all in bfloat16"),
        "model.compute_dtype": Setting("bfloat16", f"{_GALORE}: all in bfloat16"),
    }
    low_rank = {
        "optimizer.name": Setting(optimizer or "lorapre_adamw", _LORAPRE),
        "optimizer.algorithm": Setting("paper", f"{_LORAPRE}, Algorithm 1"),
        "optimizer.rank": Setting(rank, _LORAPRE),
    }
    if optimizer == "lorapre_muon":
        return shared | low_rank
    if optimizer not in (None, "lorapre_adamw"):
        return shared
    return shared | {
        **low_rank,
        "optimizer.update_scale": Setting(0.25, _GALORE),
        "optimizer.learning_rate": Setting(rate, _SCRIPTS),
    }


UNCLIPPED = (
    "the recipe paper clips gradients at 7b only, as published: after a single "
    "gradient 30 times as large as the others, an update of Algorithm 1 is over a "
    "hundred times as large as those (python -m benchmarks.spike). "
    "`optimizer.clip_norm: 1` prevents it."
)

GRID = (1e-2, 5e-3, 1e-3, 5e-4, 1e-4)
UNTUNED = (
    "the recipe paper has no learning rate for {}: it was the best of "
    f"{', '.join(f'{rate:g}' for rate in GRID)}, and not published which. This run has "
    "the trainer's own; try these as `optimizer.learning_rate`."
)


def notes(recipe: Mapping[str, Setting], optimizer: OptimizerConfig) -> list[str]:
    """Returns notes about the recipe to print at the start of a run."""
    if not recipe:
        return []
    unclipped = optimizer.algorithm == "paper" and optimizer.clip_norm is None
    untuned = optimizer.learning_rate is None
    return [UNCLIPPED] * unclipped + [UNTUNED.format(optimizer.name)] * untuned


RECIPES = {"paper": paper}
