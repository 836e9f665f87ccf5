"""The record of a run in its folder: ``config.yaml`` and ``data.json``."""

import dataclasses
import json
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from examples.llama import files
from examples.llama.config import (
    Config,
    ModelConfig,
    as_groups,
    differences,
    file,
    flat,
    override,
)
from examples.llama.config.structure import of_file, typed
from examples.llama.data.tokenizer_files import saved_file

_SETTINGS, _DATA = "config.yaml", "data.json"
_KINDS: dict[str, Any] = {
    "vocab_size": int,
    "context": int | None,
    "tokenizer": str | None,
    "stops": list | None,
    "token_ids": dict | None,
}
"""Of what others than this module take from the data."""


class RunMismatch(ValueError):
    """The folder has a run with other settings or other data."""


class DamagedRecord(ValueError):
    """A file of the record is damaged; the message names it."""


class RunRecord(NamedTuple):
    """The record of a run in ``workdir``."""

    workdir: Path
    settings: Mapping[str, Any]  # All of them, in groups, as JSON has them.

    def check_same(self, data: Mapping[str, Any] | None = None) -> None:
        """Raises ``RunMismatch`` unless these settings can resume the run there.

        Without ``data`` only the settings are compared, which needs no data.
        """
        there, here = flat(settings_of(self.workdir)), flat(self.settings)
        different = differences(there, here)
        _require(there, different.keys() & here.keys(), self.workdir / _SETTINGS)
        if data is not None:
            there = data_of(self.workdir)
            _require(there, data, self.workdir / _DATA)
            there = {name: there[name] for name in data}
            different |= differences(flat({"data": there}), flat({"data": data}))
        if different:
            listed = "".join(
                f"\n  {name}: {there!r} there, {now!r} now"
                for name, (there, now) in different.items()
            )
            raise RunMismatch(
                f"{self.workdir} holds a run with other settings:{listed}\n"
                "Give the same settings to go on with it, or another `workdir`."
            )

    def require_own(self) -> None:
        """Raises ``RunMismatch`` if a new run would remove files that are not a run's.

        It removes the tokenizer of a run that never got anywhere. Where no run has
        been, as in a Hugging Face folder, that is somebody else's.
        """
        tokenizer = saved_file(self.workdir)
        if tokenizer is not None and not (self.workdir / _SETTINGS).exists():
            raise RunMismatch(
                f"{tokenizer} is of no run, and a new one would remove it: give "
                "another `workdir`"
            )

    def write(self, data: Mapping[str, Any]) -> None:
        """Writes the record that later runs are compared with.

        Args:
          data: What tells its data from others, JSON values by name.
        """
        path, text = self.workdir / _SETTINGS, file.dump(self.settings)
        is_ours = not path.exists() or (self.workdir / _DATA).exists()
        if not is_ours and files.read_text(path) != text:
            raise RunMismatch(
                f"{path} is there, but no {_DATA}, so it is not of a run and is not "
                "overwritten: move it, or give another `workdir`"
            )
        files.write(path, text)
        files.write(self.workdir / _DATA, json.dumps(data, indent=2) + "\n")


def record_weights(workdir: Path, model: ModelConfig, data: Mapping[str, Any]) -> None:
    """Records imported weights, which have a model but no settings of a run."""
    files.write(workdir / _SETTINGS, file.dump({"model": as_groups(model)}))
    files.write(workdir / _DATA, json.dumps(data, indent=2) + "\n")


def settings_of(workdir: Path) -> dict[str, Any]:
    """Returns the settings in groups, with that of the model complete.

    Raises ``RunMismatch`` if there is no run, and ``DamagedRecord`` if it is not
    known which run it is.
    """
    path = _existing(workdir, _SETTINGS)
    try:
        settings = file.load(path)
    except file.ConfigFileError as error:
        raise _damaged(path, str(error).removeprefix(f"{path}: ")) from error
    model = settings.get("model")
    if not isinstance(model, Mapping):
        raise _damaged(path, "without model")
    _require(model, as_groups(ModelConfig()), path, "model.")
    return settings


def model_of(workdir: Path) -> ModelConfig:
    """Returns the model; raises as ``settings_of`` does."""
    groups = settings_of(workdir)
    try:
        values = typed(Config, {"model": groups["model"]})
        return ModelConfig(
            **{x.partition(".")[2]: value for x, value in values.items()}
        )
    except ValueError as error:
        raise _damaged(workdir / _SETTINGS, of_file(error)) from error


def defaults_of(folder: Path) -> dict[str, Any]:
    """Returns the settings that the parameters there need, by their dotted names."""
    values = flat({"model": dataclasses.asdict(model_of(folder))})
    tokenizer = saved_file(folder)
    if tokenizer is not None:
        values["data.tokenizer"] = str(tokenizer)
    vocab_size = data_of(folder)["vocab_size"]
    return values | {"data.vocab_size": vocab_size, "init_from": folder}


def config_of(workdir: Path) -> Config:
    """Returns the settings of a run, with the tokenizer that it has saved.

    Of imported weights, the default settings with their model and tokenizer. Raises as
    ``settings_of`` does, and ``ValueError`` for settings that no run can have.
    """
    own = defaults_of(workdir)  # First, as it says best where there is no run.
    path = workdir / _SETTINGS
    settings = file.read(path) | own
    try:
        return override(Config(), settings)
    except ValueError as error:
        why = of_file(error)
        raise ValueError(f"{path}: not the settings of a run: {why}") from error


def data_of(workdir: Path) -> dict[str, Any]:
    """Returns what ``RunRecord.write`` was given; raises as ``settings_of`` does."""
    path = _existing(workdir, _DATA)
    try:
        data = files.read_json(path)
    except files.BadFile as error:
        raise _damaged(path, str(error).removeprefix(f"{path}: ")) from error
    _require(data, ("vocab_size", "end_of_text", "context"), path)
    for name, kind in _KINDS.items():
        if not isinstance(data.get(name), kind):
            raise _damaged(path, f"{name} is {reprlib.repr(data[name])}")
    return data


def _require(
    there: Mapping[str, Any], names: Iterable[str], path: Path, prefix: str = ""
) -> None:
    missing = [f"{prefix}{name}" for name in sorted(names) if name not in there]
    if missing:
        raise _damaged(path, f"without {', '.join(missing)}")


def _damaged(path: Path, why: str) -> DamagedRecord:
    return DamagedRecord(
        f"{path} is damaged: {why}\nPut back a copy of it. The command that made "
        f"{path.parent} writes the same file at its start: give it another folder, and "
        "take it from there."
    )


def _existing(workdir: Path, name: str) -> Path:
    if workdir.is_file():
        raise RunMismatch(f"{workdir} is a file, not the folder of a run")
    if not (workdir / name).is_file():
        raise RunMismatch(f"{workdir}: no {name}, so neither a run nor weights")
    return workdir / name
