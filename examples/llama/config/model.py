"""Shapes of Llamas, the published ones among them."""

import dataclasses
from typing import ClassVar, Literal

from examples.llama.config._checks import require, require_finite, require_positive


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of the Llama; the vocabulary comes from the tokenizer."""

    GROUP: ClassVar[str] = "model."

    width: int = 128
    """Features per token in the residual stream."""
    ffn_width: int = 352
    """Hidden features of each feed-forward block."""
    num_layers: int = 4
    """Transformer blocks."""
    num_heads: int = 4
    """Query heads; width / num_heads features each."""
    num_kv_heads: int | None = None
    """Key and value heads, a divisor of num_heads (none: as many as num_heads)."""
    tie_embeddings: bool = False
    """Whether the head uses the embedding's matrix instead of its own."""
    norm_eps: float = 1e-6
    """Added to the mean square by which RMSNorm divides."""
    rope_base: float = 1e4
    """Base of the rotary angles; a larger one rotates more slowly."""
    scan_layers: bool = True
    """Stack the layers' parameters on a leading axis and compile one block."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the activations."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the parameters; low-rank factors are float32."""
    remat: Literal["nothing", "all but products", "all"] = "nothing"
    """What the backward pass of a block recomputes instead of keeping it."""
    loss_chunk: int | None = None
    """Positions of each row whose logits are in memory at once (none: all)."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_positive(self, "width", "ffn_width", "num_layers", "num_heads")
        for name in ("num_kv_heads", "loss_chunk"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        require(
            self.width % (2 * self.num_heads) == 0,
            f"`model.width` ({self.width}) must be a multiple of `model.num_heads` "
            f"({self.num_heads}), with an even number of features per head",
        )
        require(
            self.num_heads % self.kv_heads == 0,
            f"`model.num_heads` ({self.num_heads}) must be a multiple of "
            f"`model.num_kv_heads` ({self.kv_heads})",
        )
        require(
            self.norm_eps >= 0, f"`model.norm_eps` must be >= 0, got {self.norm_eps}"
        )
        require(
            self.rope_base > 0, f"`model.rope_base` must be > 0, got {self.rope_base}"
        )

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


def _published(width: int, ffn_width: int, num_heads: int, num_layers: int):
    return ModelConfig(
        width,
        ffn_width,
        num_layers,
        num_heads,
        compute_dtype="bfloat16",
        remat="all but products",
        loss_chunk=64,
    )


PRESETS: dict[str, ModelConfig] = {
    # Named by their size with a vocabulary of 32,000. Small ones, for small machines:
    "9m": ModelConfig(128, 352, num_layers=4, num_heads=4),
    "20m": ModelConfig(256, 688, num_layers=4, num_heads=4),
    # GaLore's Llamas (arXiv 2403.03507), which LoRA-Pre takes over.
    "60m": _published(512, 1376, 8, 8),
    "130m": _published(768, 2048, 12, 12),
    "350m": _published(1024, 2736, 16, 24),
    "1b": _published(2048, 5461, 32, 24),
    "7b": _published(4096, 11008, 32, 32),
}
