"""Which run lives in a folder: ``config.yaml``, its settings, and ``data.json``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.llama import files
from examples.llama.config import (
    Config,
    ModelConfig,
    as_groups,
    differences,
    file,
    flat,
)

_SETTINGS, _DATA = "config.yaml", "data.json"


class RunMismatch(ValueError):
    """The folder holds a run with other settings or other data."""


def check_same_run(config: Config, data: Mapping[str, Any] | None = None) -> None:
    """Raise ``RunMismatch`` unless ``config`` can go on with the run in its workdir.

    Without ``data`` only the settings are compared, which needs no data.
    """
    settings = settings_of(config.workdir)
    different = differences(flat(settings), flat(as_groups(config)))
    if data is not None:
        there = {"data": data_of(config.workdir)}
        different |= differences(flat(there), flat({"data": data}))
    if different:
        listed = "".join(
            f"\n  {name}: {there!r} there, {now!r} now"
            for name, (there, now) in different.items()
        )
        raise RunMismatch(
            f"{config.workdir} holds a run with other settings:{listed}\n"
            "Give the same settings to go on with it, or another --workdir."
        )


def record_run(config: Config, data: Mapping[str, Any]) -> None:
    """Write what later runs are compared with; `--config` reads the settings.

    Args:
      data: What tells its data from others, JSON values by name.
    """
    files.write(config.workdir / _SETTINGS, file.dump(as_groups(config)))
    files.write(config.workdir / _DATA, json.dumps(data, indent=2) + "\n")


def record_weights(workdir: Path, model: ModelConfig, data: Mapping[str, Any]) -> None:
    """The same of parameters that no run has made."""
    files.write(workdir / _SETTINGS, file.dump({"model": as_groups(model)}))
    files.write(workdir / _DATA, json.dumps(data, indent=2) + "\n")


def settings_of(workdir: Path) -> dict[str, Any]:
    """In groups. Raises ``RunMismatch`` where no run lives there."""
    return file.load(_existing(workdir, _SETTINGS))


def data_of(workdir: Path) -> dict[str, Any]:
    """What ``record_run`` was given. Raises as ``settings_of`` does."""
    return json.loads(_existing(workdir, _DATA).read_text())


def _existing(workdir: Path, name: str) -> Path:
    if not (workdir / name).is_file():
        raise RunMismatch(f"{workdir}: no {name}, so neither a run nor weights")
    return workdir / name
