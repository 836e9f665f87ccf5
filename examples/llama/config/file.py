"""Settings as YAML: what a run writes beside its checkpoints, and `--config` reads.

A file is read as the options that it stands for, so that the command line's own checks
and messages hold for it, and options given after it win.
"""

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from examples.llama import files
from examples.llama.config import Config, flat

# Settings are some thousand bytes, in groups.
_LARGEST, _DEEPEST = 2**16, 8


class ConfigFileError(ValueError):
    """The file cannot be read as settings; the message names it and the place."""


class _Loader(yaml.SafeLoader):
    """YAML's own takes the last of two values of a name, and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"{name} is given twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


def dump(groups: Mapping[str, Any]) -> str:
    """As YAML; `load` and `options_of` read it back."""
    return yaml.safe_dump(groups, sort_keys=False)


def load(path: Path) -> Any:
    """The file's content, a mapping; ``ConfigFileError`` where it is not one."""
    try:
        text = files.read_text(path, _LARGEST)
    except OSError as error:
        raise ConfigFileError(f"{path}: {error.strerror}") from error
    except files.BadFile as error:
        raise ConfigFileError(str(error)) from error
    try:
        _check_plain(text)
        content = yaml.load(text, _Loader)
    except Exception as error:  # PyYAML's constructors raise what they come across.
        raise ConfigFileError(f"{path}: not YAML that can be read: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigFileError(
            f"{path}: holds no settings by name, but one {type(content).__name__}"
        )
    return content


def _check_plain(text: str) -> None:
    """Raise ``yaml.YAMLError`` for what a few bytes can make endless."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            problem = "nested too deeply for settings"
        elif isinstance(event, yaml.AliasEvent):
            problem = f"*{event.anchor} stands for another value: write that one out"
        else:
            continue
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def options_of(content: Mapping[str, Any], path: Path | None) -> list[str]:
    """What to write on the command line for the content of ``path``."""
    names = dict(_option_names(Config))
    options = []
    for setting, value in flat(content).items():
        if setting not in names:
            near = difflib.get_close_matches(setting, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigFileError(f"{path}: {setting} is no setting{hint}")
        if isinstance(value, bool):
            options.append(f"--{'' if value else 'no-'}{names[setting]}")
        else:
            options.append(f"--{names[setting]}={value}")  # It may begin with a dash.
    return options


def _option_names(group: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Of every setting: its name in the file, and its option's."""
    hints = typing.get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _option_names(hint, f"{prefix}{field.name}.")
            continue
        marks = getattr(hint, "__metadata__", ())  # of tyro.conf.arg
        given = [mark.name for mark in marks if getattr(mark, "name", None)]
        name = given[0] if given else field.name.replace("_", "-")
        yield f"{prefix}{field.name}", name
