"""The run's folder: which run lives there, and its checkpoints."""

import json
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from examples.llama.config import Config, as_fields, differences


class RunMismatch(ValueError):
    """The folder holds a run with other settings or other data."""


class Checkpoints:
    """Orbax checkpoints in ``workdir/checkpoints``, by number of steps done."""

    def __init__(self, workdir: Path):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            # The next step donates the very buffers a background save would read.
            enable_async_checkpointing=False,
        )
        self._folder = workdir.resolve() / "checkpoints"
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        return self._folder / str(step)

    def save(self, step: int, state: Any) -> None:
        """Write ``state``, a pytree of arrays; nothing happens if it is there."""
        if step != self.latest_step:
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, abstract_state: Any) -> Any:
        """The latest state, with the shapes, dtypes and shardings asked for."""
        return self._manager.restore(
            self.latest_step, args=ocp.args.StandardRestore(abstract_state)
        )


def check_same_run(config: Config, data_fingerprint: str | None = None) -> None:
    """Raise ``RunMismatch`` unless ``config`` can go on with the run in its workdir.

    Without ``data_fingerprint`` only the settings are compared, which needs no data.
    """
    file = _record_file(config)
    if not file.exists():
        raise RunMismatch(f"{config.workdir} has checkpoints but no {file.name}")
    recorded = json.loads(file.read_text())
    here = _record_of(config, data_fingerprint)
    if data_fingerprint is None:
        here["data.fingerprint"] = recorded["data.fingerprint"]
    different = differences(recorded, here)
    if different:
        listed = "".join(
            f"\n  {name}: {there!r} there, {now!r} now"
            for name, (there, now) in different.items()
        )
        raise RunMismatch(
            f"{config.workdir} holds a run with other settings:{listed}\n"
            "Give the same settings to go on with it, or another --workdir."
        )


def record_run(config: Config, data_fingerprint: str) -> None:
    """Write ``workdir/config.json``, which later runs are compared with."""
    record = _record_of(config, data_fingerprint)
    _record_file(config).write_text(json.dumps(record, indent=2) + "\n")


def _record_of(config: Config, data_fingerprint: str | None) -> dict[str, Any]:
    return as_fields(config) | {"data.fingerprint": data_fingerprint}


def _record_file(config: Config) -> Path:
    return config.workdir / "config.json"
