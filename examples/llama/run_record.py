"""Which run lives in a folder: ``config.yaml``, its settings, and ``data.json``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.llama import files
from examples.llama.config import Config, as_groups, differences, file, flat


class RunMismatch(ValueError):
    """The folder holds a run with other settings or other data."""


def check_same_run(config: Config, data: Mapping[str, Any] | None = None) -> None:
    """Raise ``RunMismatch`` unless ``config`` can go on with the run in its workdir.

    Without ``data`` only the settings are compared, which needs no data.
    """
    settings, of_data = _settings_file(config.workdir), _data_file(config.workdir)
    for path in (settings, of_data):
        if not path.exists():
            raise RunMismatch(f"{config.workdir} has checkpoints but no {path.name}")
    different = differences(flat(file.load(settings)), flat(as_groups(config)))
    if data is not None:
        different |= differences(
            {f"data.{name}": x for name, x in json.loads(of_data.read_text()).items()},
            {f"data.{name}": x for name, x in data.items()},
        )
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
    files.write(_settings_file(config.workdir), file.dump(config))
    files.write(_data_file(config.workdir), json.dumps(data, indent=2) + "\n")


def _settings_file(workdir: Path) -> Path:
    return workdir / "config.yaml"


def _data_file(workdir: Path) -> Path:
    return workdir / "data.json"
