"""The run's folder: which run lives there, and its checkpoints."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from examples.llama import hosts
from examples.llama.config import Config, as_fields, differences

_UNFINISHED = "its saving was interrupted"


class RunMismatch(ValueError):
    """The folder holds a run with other settings or other data."""


class DamagedCheckpoint(ValueError):
    """No checkpoint of the run is what was saved."""


class Checkpoints:
    """Orbax checkpoints in ``workdir/checkpoints``, by number of steps done.

    Orbax commits one by renaming its folder, but keeps no checksums of arrays. So the
    digests of all files are written after the commit, and compared before anything is
    restored. A checkpoint that differs, or has none because the process was killed just
    there, is moved to ``workdir/damaged``, and the one before it is the latest.

    Attributes:
      set_aside: What was moved there and why, one line each.
    """

    def __init__(self, workdir: Path):
        self._folder = workdir.resolve() / "checkpoints"
        self._digests = workdir.resolve() / "digests"
        damaged = workdir.resolve() / "damaged"
        self.set_aside = hosts.on_first(lambda: self._set_aside(damaged)) or []
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            # The next step donates the very buffers a background save would read.
            enable_async_checkpointing=False,
        )
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
        if step == self.latest_step:
            return
        self._manager.save(step, args=ocp.args.StandardSave(state))
        if not hosts.is_first():
            return
        self._digests.mkdir(exist_ok=True)
        _write(self._digests / f"{step}.json", _digests_of(self.path(step)))
        for file in self._digests.glob("*.json"):
            if int(file.stem) not in self._manager.all_steps():
                file.unlink()

    def restore(self, abstract_state: Any) -> Any:
        """The latest state, with the shapes, dtypes and shardings asked for."""
        return self._manager.restore(
            self.latest_step, args=ocp.args.StandardRestore(abstract_state)
        )

    def _set_aside(self, damaged: Path) -> list[str]:
        steps = [path for path in self._folder.glob("*") if path.name.isdigit()]
        newest = max(steps, key=lambda path: int(path.name), default=None)
        faults = {path: self._fault(path, path == newest) for path in steps}
        faults = {path: fault for path, fault in faults.items() if fault}
        lines = [f"checkpoint {path} refused: {why}" for path, why in faults.items()]
        # The very first one may have been interrupted: then nothing is lost.
        if len(faults) == len(steps) and list(faults.values()) not in (
            [],
            [_UNFINISHED],
        ):
            raise DamagedCheckpoint(
                "\n".join([*lines, "None is left. Remove the folder to start anew."])
            )
        for path in faults:
            damaged.mkdir(exist_ok=True)
            shutil.rmtree(damaged / path.name, ignore_errors=True)
            path.rename(damaged / path.name)
        return [f"{line}; moved to {damaged}" for line in lines]

    def _fault(self, path: Path, is_newest: bool) -> str:
        """Why the checkpoint is not what was saved; empty where it is."""
        file = self._digests / f"{path.name}.json"
        if not file.exists():
            return _UNFINISHED if is_newest else f"{file} is missing"
        try:
            recorded = json.loads(file.read_text())
        except ValueError:
            return f"{file} cannot be read"
        names = ", ".join(sorted(differences(recorded, _digests_of(path))))
        return f"{names} changed since it was saved" if names else ""


def _digests_of(folder: Path) -> dict[str, str]:
    """SHA-256 by path below ``folder``, of every file."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests[str(path.relative_to(folder))] = digest
    return digests


def _write(path: Path, content: Any) -> None:
    """All of it or nothing, also when the machine stops."""
    part = path.with_suffix(".part")
    with part.open("w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


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
    _write(_record_file(config), record)


def _record_of(config: Config, data_fingerprint: str | None) -> dict[str, Any]:
    return as_fields(config) | {"data.fingerprint": data_fingerprint}


def _record_file(config: Config) -> Path:
    return config.workdir / "config.json"
