"""Which option of the command line sets what: the one place where both names meet."""

import dataclasses
import re
from typing import Annotated, Any, get_type_hints

import tyro

from examples.llama.config import Config, kinds

_NAMES = {
    "data.path": "data",
    "data.workers": "data-workers",
    "data.cache": "token-cache",
    "optimizer.name": "optimizer",
}
"""Of settings; any other has its own name, without the group."""
_SETTING = re.compile(r"`([a-z]\w*(?:\.\w+)?)(?:: ([^`\n]*))?`")


def unchecked(group: type, prefix: str = "") -> Any:
    """The dataclass ``group`` with the names of its options for tyro, without checks.

    What a file says need not be possible without the options given beside it: all is
    checked together once all is known.
    """
    hints, fields = get_type_hints(group, include_extras=True), []
    for field in dataclasses.fields(group):
        kind, default_factory = hints[field.name], field.default_factory
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            kind = unchecked(kind, "" if kind is Config else f"{field.name}.")
            default_factory = kind
        elif name := _NAMES.get(f"{prefix}{field.name}"):
            kind = Annotated[kind, tyro.conf.arg(name=name)]
        default: Any = dataclasses.field(
            default=field.default, default_factory=default_factory
        )
        fields.append((field.name, kind, default))
    own = {"__doc__": group.__doc__, "__post_init__": lambda _: None}
    # A subclass, since tyro finds the texts for --help below the fields of its bases.
    return dataclasses.make_dataclass(
        group.__name__, fields, bases=(group,), namespace=own, frozen=True
    )


def told(message: str, command: type | None) -> str:
    """``message`` with options of ``command`` in place of the settings in backquotes.

    A setting for which it has no option stays as it is.
    """
    options = {} if command is None else _options_of(command)

    def option(match: re.Match[str]) -> str:
        setting, value = match.groups()
        name = options.get(setting)
        if name is None:
            return match[0]
        if value in (None, "true"):
            return f"--{name}"
        return f"--no-{name}" if value == "false" else f"--{name} {value}"

    return _SETTING.sub(option, message)


def _options_of(command: type) -> dict[str, str]:
    """By the names of the settings: those of a run, or what else has such an option."""
    fields = dataclasses.fields(command)
    is_run = any(field.type is Config for field in fields)
    # A field without a default is a positional argument, not an option.
    own = {f.name for f in fields if f.default is not dataclasses.MISSING}
    names = {x: _NAMES.get(x, x.rpartition(".")[2].replace("_", "-")) for x in _ALL}
    return {x: y for x, y in names.items() if is_run or y.replace("-", "_") in own}


_ALL = tuple(kinds(Config))
