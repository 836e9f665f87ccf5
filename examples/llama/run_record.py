"""Which run lives in a folder: ``config.yaml``, its settings, and ``data.json``."""

import json
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from examples.llama import files
from examples.llama.config import (
    Config,
    ModelConfig,
    as_groups,
    differences,
    file,
    flat,
)
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
    """The folder holds a run with other settings or other data."""


class DamagedRecord(ValueError):
    """A file about the run is not as it was written; the message names it."""


def check_same_run(config: Config, data: Mapping[str, Any] | None = None) -> None:
    """Raise ``RunMismatch`` unless ``config`` can go on with the run in its workdir.

    Without ``data`` only the settings are compared, which needs no data.
    """
    there, here = flat(settings_of(config.workdir)), flat(as_groups(config))
    different = differences(there, here)
    _require(there, different.keys() & here.keys(), config.workdir / _SETTINGS)
    if data is not None:
        there = data_of(config.workdir)
        _require(there, data, config.workdir / _DATA)
        there = {name: there[name] for name in data}
        different |= differences(flat({"data": there}), flat({"data": data}))
    if different:
        listed = "".join(
            f"\n  {name}: {there!r} there, {now!r} now"
            for name, (there, now) in different.items()
        )
        raise RunMismatch(
            f"{config.workdir} holds a run with other settings:{listed}\n"
            "Give the same settings to go on with it, or another --workdir."
        )


def require_own(workdir: Path) -> None:
    """Raise ``RunMismatch`` where a new run would take away files of others.

    It removes the tokenizer of a run that never got anywhere. Where no run has been,
    as in a Hugging Face folder, that is somebody else's.
    """
    tokenizer = saved_file(workdir)
    if tokenizer is not None and not (workdir / _SETTINGS).exists():
        raise RunMismatch(
            f"{tokenizer} is of no run, and a new one would remove it: give another "
            "--workdir"
        )


def record_run(config: Config, data: Mapping[str, Any]) -> None:
    """Write what later runs are compared with; `--config` reads the settings.

    Args:
      data: What tells its data from others, JSON values by name.
    """
    path, text = config.workdir / _SETTINGS, file.dump(as_groups(config))
    is_ours = not path.exists() or (config.workdir / _DATA).exists()
    if not is_ours and files.read_text(path) != text:
        raise RunMismatch(
            f"{path} is there, but no {_DATA}, so it is not of a run and is not "
            "overwritten: move it, or give another --workdir"
        )
    files.write(path, text)
    files.write(config.workdir / _DATA, json.dumps(data, indent=2) + "\n")


def record_weights(workdir: Path, model: ModelConfig, data: Mapping[str, Any]) -> None:
    """The same for imported weights, which have a model but no settings of a run."""
    files.write(workdir / _SETTINGS, file.dump({"model": as_groups(model)}))
    files.write(workdir / _DATA, json.dumps(data, indent=2) + "\n")


def settings_of(workdir: Path) -> dict[str, Any]:
    """In groups, that of the model complete.

    Raises ``RunMismatch`` where no run lives there, ``DamagedRecord`` where it is not
    known any more which.
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
    """Raises as ``settings_of`` does."""
    settings = settings_of(workdir)["model"]
    try:
        _check_kinds(settings)
        return ModelConfig(**settings)
    except (TypeError, ValueError) as error:
        raise _damaged(workdir / _SETTINGS, f"model: {error}") from error


def _check_kinds(settings: Mapping[str, Any]) -> None:
    """Raise ``TypeError`` for a value that the command line would not take."""
    for name, hint in get_type_hints(ModelConfig).items():
        value, allowed = settings[name], get_args(hint) or (hint,)
        kinds = [kind for kind in allowed if isinstance(kind, type)]
        is_good = type(value) in kinds if kinds else value in allowed
        if not is_good and not (float in kinds and type(value) is int):
            raise TypeError(f"{name} is {reprlib.repr(value)}")


def data_of(workdir: Path) -> dict[str, Any]:
    """What ``record_run`` was given. Raises as ``settings_of`` does."""
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
