"""One frozen tree of settings; nothing below ``__main__`` knows the command line.

The field docstrings are the ``--help`` texts. Values are checked when an object
is made, so a bad setting is reported before anything is read or compiled.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.llama.config._checks import require, require_positive
from examples.llama.config.data import DataConfig
from examples.llama.config.model import PRESETS, ModelConfig
from examples.llama.config.optimizer import OptimizerConfig, OptimizerName
from examples.llama.hosts import parse_job
from examples.llama.layout import parse_mesh

__all__ = [
    "PRESETS",
    "Config",
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OptimizerName",
    "as_fields",
    "differences",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. The same settings and workdir again: the run goes on."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
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
        require_positive(self, "steps", "eval_every", "checkpoint_every")
        require_positive(self, "diagnostics_every", "log_every")
        parse_mesh(self.mesh or "")
        if self.distributed is not None:
            parse_job(self.distributed)
        require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        chunk, length = self.model.loss_chunk, self.data.seq_len
        require(
            chunk is None or chunk >= length or length % chunk == 0,
            f"loss_chunk ({chunk}) must divide seq_len ({length})",
        )
        require(
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
