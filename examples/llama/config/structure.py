"""Settings as dataclasses, in groups of plain values, and by their dotted names.

The types are checked by a function of our own: cattrs takes 128.0 for an int and dacite
takes True; msgspec and pydantic would need as many lines around them for unknown names,
for a file that has only some of the settings, and for messages about both.
"""

import contextlib
import dataclasses
import difflib
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    NoneType: "null",
}


class BadSetting(ValueError):
    """A setting or its value is invalid; the message names it."""


def of_file(error: ValueError) -> str:
    """Returns the message about settings in a file, for which options are not named."""
    return str(error).replace("`", "")


def as_groups(config: Any) -> Any:
    """Returns nested ``{"model": {"width": 128, ...}, ...}`` of JSON values."""
    if dataclasses.is_dataclass(config):
        fields = dataclasses.fields(config)
        return {field.name: as_groups(getattr(config, field.name)) for field in fields}
    return str(config) if isinstance(config, Path) else config


def flat(groups: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the same as ``{"model.width": 128, ...}``."""
    return dict(_entries(groups))


def kinds(group: type) -> dict[str, Any]:
    """Returns the types of all fields of the dataclass ``group``, by dotted names."""
    hints = get_type_hints(group)
    found = {}
    for field in dataclasses.fields(group):
        kind = hints[field.name]
        is_group = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        found[field.name] = kinds(kind) if is_group else kind
    return flat(found)


def typed(group: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """``values``, some of ``group`` as `as_groups` has them, for `override`.

    Raises ``BadSetting``.
    """
    known, found = kinds(group), dict[str, Any]()
    for name, value in _entries(values):
        inside = [other for other in known if other.startswith(f"{name}.")]
        if inside and isinstance(value, Mapping):
            continue  # An empty group.
        if inside:
            raise BadSetting(f"{name} is a group of settings, such as {inside[0]}")
        if name in found:
            raise BadSetting(f"{name} is given twice")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise BadSetting(f"{name} is no setting{hint}")
        found[name] = _typed(name, value, known[name])
    return found


def override(config: Any, values: Mapping[str, Any]) -> Any:
    """Returns `config` with values by dotted names, all set before any check."""
    own, groups = {}, dict[str, dict[str, Any]]()
    for name, value in values.items():
        group, _, rest = name.rpartition(".")
        if group:
            groups.setdefault(group, {})[rest] = value
        else:
            own[name] = value
    for group, inner in groups.items():
        own[group] = dataclasses.replace(getattr(config, group), **inner)
    return dataclasses.replace(config, **own)


def _entries(groups: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in groups.items():
        if isinstance(value, Mapping) and value:
            yield from _entries(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Converts a value to its type; YAML and JSON have no paths, and 1 for 1.0."""
    choices = get_args(kind) or (kind,)  # Of an Optional, or values of a Literal.
    for choice in choices:
        if type(value) is choice or (type(value) is str and value == choice):
            return value
        if choice is float and type(value) is int:
            with contextlib.suppress(OverflowError):
                return float(value)
        if choice is Path and type(value) is str:
            return Path(value)
    *words, last = (str(_WORDS.get(choice, choice)) for choice in choices)
    wanted = f"{', '.join(words)} or {last}" if words else last
    # YAML takes 10:13 for a number of base 60, and yes for a truth value.
    is_text = str in choices or Path in choices
    is_plain = value is not None and not isinstance(value, (list, Mapping))
    mend = "; put it in quotes" if is_text and is_plain else ""
    raise BadSetting(f"{name} must be {wanted}, got {reprlib.repr(value)}{mend}")
