"""Which run lives in a folder: ``workdir/config.json``."""

import json
from pathlib import Path
from typing import Any

from examples.llama import files
from examples.llama.config import Config, as_fields, differences


class RunMismatch(ValueError):
    """The folder holds a run with other settings or other data."""


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
    files.write(_record_file(config), json.dumps(record, indent=2) + "\n")


def _record_of(config: Config, data_fingerprint: str | None) -> dict[str, Any]:
    return as_fields(config) | {"data.fingerprint": data_fingerprint}


def _record_file(config: Config) -> Path:
    return config.workdir / "config.json"
