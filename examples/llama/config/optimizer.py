"""Which optimizer, and its hyperparameters."""

import dataclasses
from typing import ClassVar, Literal

from examples.llama.config._checks import (
    require,
    require_finite,
    require_positive,
    setting,
)

OptimizerName = Literal["lorapre_adamw", "lorapre_muon", "adamw", "muon", "galore"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The rule for attention and MLP matrices; all other parameters use Adam."""

    GROUP: ClassVar[str] = "optimizer."

    name: OptimizerName = "lorapre_adamw"
    """Rule for the attention and MLP matrices."""
    learning_rate: float | None = None
    """Peak learning rate of the matrices (none: the optimizer's own default)."""
    dense_learning_rate: float | None = None
    """Peak rate of all other leaves, for lorapre_muon, muon, galore (none: default)."""
    rank: int = 16
    """Rank of the low-rank state (lorapre_adamw, lorapre_muon, galore)."""
    warmup: float = 0.1
    """Share of the steps, 0 to 1, for the warm-up; then a cosine to a tenth."""
    b1: float = 0.9
    """Decay rate of Adam's first moment (Muon's is 0.95)."""
    b2: float = 0.95
    """Decay rate of Adam's second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices; nothing else decays."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient (none: no clipping)."""
    factor_embeddings: bool = False
    """Treat the embedding and the head as matrices too, instead of by Adam."""
    algorithm: Literal["default", "paper"] = "default"
    """Moments of the library's default, or of the paper's Algorithm 1 (lorapre_adamw,
    lorapre_muon)."""
    update_scale: float = 1.0
    """Factor on the updates of the matrices (lorapre_adamw, lorapre_muon)."""
    layers_at_once: int | None = None
    """How many stacked layers are updated at once (none: all; lorapre_adamw,
    lorapre_muon)."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_positive(self, "rank")
        if self.layers_at_once is not None:
            require_positive(self, "layers_at_once")
        for name in ("algorithm", "update_scale", "layers_at_once"):
            default = type(self).__dataclass_fields__[name].default
            require(
                self.name.startswith("lorapre") or getattr(self, name) == default,
                f"{setting(self, name)} is for lorapre_adamw and lorapre_muon, not "
                f"{self.name}",
            )
        for name in (
            "learning_rate",
            "dense_learning_rate",
            "clip_norm",
            "update_scale",
        ):
            value = getattr(self, name)
            require(
                value is None or value > 0,
                f"{setting(self, name)} must be > 0, got {value}",
            )
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(
                0 <= value < 1,
                f"{setting(self, name)} must be in [0, 1), got {value}",
            )
        require(
            0 <= self.warmup <= 1,
            f"`optimizer.warmup` must be in [0, 1], got {self.warmup}",
        )
        require(
            self.weight_decay >= 0,
            f"`optimizer.weight_decay` must not be negative, got {self.weight_decay}",
        )
        require(
            self.dense_learning_rate is None or not self.name.endswith("adamw"),
            f"{self.name} has one learning rate; `optimizer.dense_learning_rate` is "
            "for lorapre_muon, muon and galore",
        )
        require(
            not (self.factor_embeddings and self.name == "adamw"),
            "adamw treats all parameters alike; `optimizer.factor_embeddings` means "
            "nothing to it",
        )
