"""One frozen tree of settings, without the command line, which is in ``commands``.

The field docstrings are its help texts. Values are checked when an object is made, so a
bad setting is reported before anything is read or compiled. Messages name a setting in
backquotes with its group, as `data.path`, or with a value, as `data.batching: packed`;
``options`` has what the command line shows instead.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from examples.llama.config._checks import (
    expand_home,
    require,
    require_finite,
    require_positive,
    setting,
)
from examples.llama.config.data import DataConfig
from examples.llama.config.model import PRESETS, ModelConfig
from examples.llama.config.optimizer import OptimizerConfig, OptimizerName
from examples.llama.config.structure import as_groups, flat, kinds, override
from examples.llama.hosts import parse_job
from examples.llama.layout import parse_mesh

__all__ = [
    "PRESETS",
    "Config",
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OptimizerName",
    "as_groups",
    "differences",
    "expand_home",
    "flat",
    "kinds",
    "override",
    "parse_steps",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. The same settings and workdir resume it."""

    GROUP: ClassVar[str] = ""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    steps: int = 300
    """Optimizer steps of the whole run."""
    micro_batch_size: int | None = None
    """Rows, over all devices, whose gradient is computed at once; a divisor of
    batch_size (none: all of them)."""
    z_loss: float = 0.0
    """Weight in the loss of the squared log of the softmax's denominator."""
    init_from: Path | None = None
    """Folder of a run or of imported weights, whose parameters the run starts from;
    their model and tokenizer are then the defaults (none: random parameters)."""
    seed: int = 0
    """Seed of the initial weights and of the order of the rows."""
    mesh: str | None = None
    """Devices along data, fsdp and tensor: fsdp=4,tensor=2 (none: all along data)."""
    distributed: str | None = None
    """One job of several processes: auto (TPU pods, SLURM, Kubernetes), or
    host:port,processes,own number (none: this process alone)."""
    workdir: Path = Path("runs/llama")
    """Folder for checkpoints, metrics and plot; a run in it is resumed."""
    skip_nonfinite: int = 0
    """How many steps in a row may be skipped, and counted in the log, because their
    loss, gradient or new state is not finite, before the run stops."""
    extend_to: int | None = None
    """Steps of a run that continues beyond its steps, at its last learning rate."""
    eval_every: int = 100
    """Steps between evaluations on held-out text."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    diagnostics_every: int = 100
    """Steps between diagnostics of the factors (lorapre_adamw, lorapre_muon)."""
    log_every: int = 20
    """Steps between printed lines if the output is not a terminal."""
    time_limit: float | None = None
    """Minutes until the run saves and stops; the same command resumes it."""
    profile: str | None = None
    """Steps to trace, first:last, into workdir/profile, for TensorBoard or XProf."""
    peak_tflops: float | None = None
    """Peak of one device in teraflops per second, of which the log has the share used
    (none: that of the data sheet if it is known)."""

    def __post_init__(self) -> None:
        expand_home(self, "init_from", "workdir")
        require_finite(self)
        require_positive(self, "steps", "eval_every", "checkpoint_every")
        require_positive(self, "diagnostics_every", "log_every")
        require(
            self.skip_nonfinite >= 0,
            f"`skip_nonfinite` must not be negative, got {self.skip_nonfinite}",
        )
        require(
            self.extend_to is None or self.extend_to > self.steps,
            f"`extend_to` ({self.extend_to}) must be more than `steps` ({self.steps})",
        )
        parse_mesh(self.mesh or "")
        if self.distributed is not None:
            parse_job(self.distributed)
        if self.profile is not None:
            last = parse_steps(self.profile)[-1]
            require(
                last <= self.last_step,
                f"`profile` ({self.profile}) is beyond the last step "
                f"({self.last_step})",
            )
        for name in ("time_limit", "peak_tflops"):
            value = getattr(self, name)
            require(
                value is None or value > 0,
                f"{setting(self, name)} must be > 0, got {value}",
            )
        require(self.z_loss >= 0, f"`z_loss` must not be negative, got {self.z_loss}")
        micro, batch = self.micro_batch_size, self.data.batch_size
        require(
            micro is None or (micro >= 1 and batch % micro == 0),
            f"`micro_batch_size` ({micro}) must divide `data.batch_size` ({batch})",
        )
        require(
            0 <= self.seed < 2**32, f"`seed` must be in [0, 2**32), got {self.seed}"
        )
        chunk, length = self.model.loss_chunk, self.data.seq_len
        require(
            chunk is None or chunk >= length or length % chunk == 0,
            f"`model.loss_chunk` ({chunk}) must divide `data.seq_len` ({length})",
        )
        require(
            not (self.optimizer.name == "galore" and self.model.scan_layers),
            "optax's galore cannot take stacked layers: it needs "
            "`model.scan_layers: false`",
        )

    @property
    def last_step(self) -> int:
        """The last step of the run; the learning rate falls until ``steps``."""
        return self.extend_to or self.steps


# What may change between the parts of one run: none of it alters an update, except by
# rounding on another mesh. Where text and tokenizer are may, because their fingerprint
# is compared.
_FREE = (
    "workdir",
    "mesh",
    "distributed",
    "eval_every",
    "checkpoint_every",
    "diagnostics_every",
    "log_every",
    "skip_nonfinite",
    "extend_to",
    "time_limit",
    "profile",
    "peak_tflops",
    "micro_batch_size",
    "optimizer.layers_at_once",
    "data.path",
    "data.hub",
    "data.tokenizer",
    "data.skip_bad_lines",
    "data.workers",
    "data.cache",
)


def parse_steps(text: str) -> range:
    """`"10:13"`: steps 10, 11, 12 and 13."""
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ValueError(f"`profile`: {text!r} is not first:last, like 10:13")
    return range(int(first), int(last) + 1)


def differences(
    there: Mapping[str, Any], here: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Returns fields that decide the result of a run and differ, with both values."""
    names = sorted((there.keys() | here.keys()) - set(_FREE))
    pairs = {name: (there.get(name), here.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
