"""Settings as YAML files, which runs write and read."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from examples.llama import files
from examples.llama.config import Config
from examples.llama.config.structure import BadSetting, typed

# Settings are some thousand bytes, in groups.
_LARGEST, _DEEPEST = 2**16, 8


class ConfigFileError(ValueError):
    """The file cannot be read as settings; the message names it and the place."""


class _Loader(yaml.SafeLoader):
    """Raises an error if a name is given twice; YAML would take the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"{name} is given twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that ``_Loader`` would take for a number."""


for _kind in (_Loader, _Dumper):  # 1e-3, which is text to YAML 1.1 for want of a dot.
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def dump(groups: Mapping[str, Any]) -> str:
    """Returns the settings as YAML, which `load` reads."""
    return yaml.dump(groups, Dumper=_Dumper, sort_keys=False)


def read(path: Path) -> dict[str, Any]:
    """Returns the settings in the file, some or all, by their dotted names.

    It checks their types; the dataclasses check whether they fit together. Raises
    ``ConfigFileError``.
    """
    try:
        return typed(Config, load(path))
    except BadSetting as error:
        raise ConfigFileError(f"{path}: {error}") from error


def load(path: Path) -> Any:
    """Returns the file's content; ``ConfigFileError`` if it is not a mapping."""
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
    """Raises ``yaml.YAMLError`` for content that a few bytes can make endless."""
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
