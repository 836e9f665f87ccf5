"""One frozen tree of settings; nothing below ``__main__`` knows the command line.

The field docstrings are the ``--help`` texts. Values are checked when an object
is made, so a bad setting is reported before anything is read or compiled.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from examples.llama.hosts import parse_job
from examples.llama.layout import parse_mesh

OptimizerName = Literal["lorapre_adamw", "lorapre_muon", "adamw", "muon", "galore"]
LOW_RANK: tuple[OptimizerName, ...] = ("lorapre_adamw", "lorapre_muon", "galore")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= 1, f"{name} must be at least 1, got {value}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of the Llama; the vocabulary comes from the tokenizer."""

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
    scan_layers: bool = True
    """Stack the layers' parameters on a leading axis and compile one block."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of activations; parameters and optimizer state are float32."""
    remat: Literal["nothing", "all but products", "all"] = "nothing"
    """What the backward pass of a block computes again instead of keeping it."""
    loss_chunk: int | None = None
    """Positions of each row whose logits exist at once (none: all of them)."""

    def __post_init__(self) -> None:
        names = ("width", "ffn_width", "num_layers", "num_heads", "kv_heads")
        _require_positive(self, *names)
        _require(
            self.width % (2 * self.num_heads) == 0,
            f"width ({self.width}) must be a multiple of num_heads "
            f"({self.num_heads}), with an even number of features per head",
        )
        _require(
            self.num_heads % self.kv_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
            f"({self.kv_heads})",
        )
        if self.loss_chunk is not None:
            _require_positive(self, "loss_chunk")

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
    "demo": ModelConfig(),
    # GaLore's Llamas (arXiv 2403.03507), which LoRA-Pre takes over.
    "60m": _published(512, 1376, 8, 8),
    "130m": _published(768, 2048, 12, 12),
    "350m": _published(1024, 2736, 16, 24),
    "1b": _published(2048, 5461, 32, 24),
    "7b": _published(4096, 11008, 32, 32),
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text, as which tokens, in which shape.

    A folder of text is laid out as C4 is: one JSON object with a "text" per line. The
    text that is always there is Python's own standard library: sources and help.
    """

    path: Annotated[Path | None, tyro.conf.arg(name="data")] = None
    """Folder of *train*.json.gz and *validation*.json.gz (none: Python's library)."""
    tokenizer: Literal["byte", "bpe"] = "byte"
    """Bytes, or a byte-level BPE trained on the training text."""
    vocab_size: int | None = None
    """Pieces of the BPE vocabulary, with --tokenizer bpe."""
    seq_len: int = 256
    """Tokens per row that are predicted."""
    batch_size: int = 16
    """Rows per step, over all devices."""
    eval_tokens: int = 65_536
    """Held-out tokens to predict at an evaluation, always the same ones."""

    def __post_init__(self) -> None:
        _require_positive(self, "seq_len", "batch_size", "eval_tokens")
        if self.tokenizer == "byte":
            _require(self.vocab_size is None, "vocab_size is for --tokenizer bpe only")
        else:
            _require(
                self.vocab_size is not None and self.vocab_size >= 257,
                "--tokenizer bpe needs a vocab_size of at least 257 "
                f"(256 bytes and the end of text), got {self.vocab_size}",
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The rule for attention and MLP matrices; all other parameters use Adam."""

    name: Annotated[OptimizerName, tyro.conf.arg(name="optimizer")] = "lorapre_adamw"
    """Rule for the attention and MLP matrices."""
    learning_rate: float | None = None
    """Peak rate, for the matrices (none: the optimizer's own default)."""
    dense_learning_rate: float | None = None
    """Peak rate of all else, for lorapre_muon, muon and galore (none: default)."""
    rank: int = 16
    """Rank of the low-rank state (lorapre_adamw, lorapre_muon, galore)."""
    warmup: float = 0.1
    """Part of all steps, 0 to 1, of rising rate; a cosine to a tenth follows."""
    b1: float = 0.9
    """Adam's first moment: what a step keeps (Muon's momentum keeps 0.95)."""
    b2: float = 0.95
    """Adam's second moment: what a step keeps."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices; nothing else decays."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient (none: no clipping)."""
    factor_embeddings: bool = False
    """Treat the embedding and the head as matrices too, instead of by Adam."""
    layers_at_once: int | None = None
    """Stacked layers whose low-rank update is in memory at once (none: all;
    lorapre_adamw, lorapre_muon)."""

    def __post_init__(self) -> None:
        _require_positive(self, "rank")
        if self.layers_at_once is not None:
            _require_positive(self, "layers_at_once")
            _require(
                self.name.startswith("lorapre"),
                "layers_at_once is for lorapre_adamw and lorapre_muon",
            )
        for name in ("learning_rate", "dense_learning_rate", "clip_norm"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} must be > 0, got {value}")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name} must be in [0, 1), got {value}")
        _require(0 <= self.warmup <= 1, f"warmup must be in [0, 1], got {self.warmup}")
        _require(
            self.weight_decay >= 0,
            f"weight_decay must not be negative, got {self.weight_decay}",
        )
        _require(
            self.dense_learning_rate is None or not self.name.endswith("adamw"),
            f"{self.name} has one learning rate; dense_learning_rate is for "
            "lorapre_muon, muon and galore",
        )
        _require(
            not (self.factor_embeddings and self.name == "adamw"),
            "adamw treats all parameters alike; factor_embeddings means nothing to it",
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. The same settings and workdir again: the run goes on."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = 300
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Seed of the initial weights and of the order of the rows."""
    mesh: str | None = None
    """Devices along data, fsdp and tensor: fsdp=4,tensor=2 (none: all along data)."""
    distributed: str | None = None
    """One job of several processes: auto (TPU pods, SLURM, Kubernetes), or
    host:port,processes,own number (none: this process alone)."""
    workdir: Path = Path("runs/llama")
    """Folder for checkpoints, metrics and plot; a run found there goes on."""
    eval_every: int = 100
    """Steps between evaluations on held-out text."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    diagnostics_every: int = 100
    """Steps between looks at the low-rank state (lorapre_adamw, lorapre_muon)."""
    log_every: int = 20
    """Steps between printed lines where the output is not a terminal."""

    def __post_init__(self) -> None:
        _require_positive(self, "steps", "eval_every", "checkpoint_every")
        _require_positive(self, "diagnostics_every", "log_every")
        parse_mesh(self.mesh or "")
        if self.distributed is not None:
            parse_job(self.distributed)
        _require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        chunk, length = self.model.loss_chunk, self.data.seq_len
        _require(
            chunk is None or chunk >= length or length % chunk == 0,
            f"loss_chunk ({chunk}) must divide seq_len ({length})",
        )
        _require(
            not (self.optimizer.name == "galore" and self.model.scan_layers),
            "optax's galore cannot take stacked layers: add --no-scan-layers",
        )


# What may change between the parts of one run: none of it alters an update, but for
# rounding by the mesh. The path of the data may, because its fingerprint is compared.
_FREE = (
    "workdir",
    "mesh",
    "distributed",
    "eval_every",
    "checkpoint_every",
    "diagnostics_every",
    "log_every",
    "optimizer.layers_at_once",
    "data.path",
)


def as_fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flat ``{"model.width": 128, ...}`` of JSON values."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            fields |= as_fields(value, name + ".")
        else:
            fields[name] = str(value) if isinstance(value, Path) else value
    return fields


def differences(
    there: Mapping[str, Any], here: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Fields that decide the result of a run and differ: name to both values."""
    names = sorted((there.keys() | here.keys()) - set(_FREE))
    pairs = {name: (there.get(name), here.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
