"""The command line: its commands, and how settings are combined."""

import argparse
import dataclasses
import functools
import operator
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import tyro

from examples.llama.config import (
    PRESETS,
    Config,
    expand_home,
    file,
    flat,
    override,
)
from examples.llama.config.recipes import RECIPES, Setting
from examples.llama.options import told, unchecked
from examples.llama.run_record import defaults_of

PROGRAM = "python -m examples.llama"


@dataclasses.dataclass(frozen=True)
class Train:
    """Pretrain. The same command resumes an interrupted run."""

    config: Config = dataclasses.field(default_factory=Config)
    recipe: tyro.conf.Suppress[dict[str, Setting]] = dataclasses.field(
        default_factory=dict
    )
    dry_run: bool = False
    """Print the plan, and compute nothing."""


@dataclasses.dataclass(frozen=True)
class Describe:
    """Print the plan of a run, and how the optimizer keeps every parameter."""

    config: Config = dataclasses.field(default_factory=Config)
    recipe: tyro.conf.Suppress[dict[str, Setting]] = dataclasses.field(
        default_factory=dict
    )


@dataclasses.dataclass(frozen=True)
class Eval:
    """Loss and perplexity of a run's last checkpoint on held-out text."""

    workdir: tyro.conf.Positional[Path]
    """Folder of the run."""
    data: Path | None = None
    """Folder of *validation*.json.gz (none: the run's own text)."""
    eval_tokens: int | None = None
    """Held-out tokens to predict (none: as many as in the run)."""
    seq_len: int | None = None
    """Predicted tokens per row (none: as many as in the run)."""
    batch_size: int | None = None
    """Rows at once, over all devices (none: as many as in a step of the run)."""
    skip_bad_lines: bool = False
    """Skip lines without a document, and say how many and where."""
    mesh: str | None = None
    """Devices along data, fsdp and tensor (none: all along data)."""
    distributed: str | None = None
    """One job of several processes, as for train."""

    def __post_init__(self) -> None:
        expand_home(self, "workdir", "data")

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that differ from the run's, by their dotted names."""
        names = ("eval_tokens", "seq_len", "batch_size")
        given = {f"data.{name}": getattr(self, name) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        if self.data is not None:
            given |= {"data.path": self.data, "data.hub": None}
        if self.skip_bad_lines:
            given["data.skip_bad_lines"] = True
        return given


@dataclasses.dataclass(frozen=True)
class Generate:
    """Generate text from a run's last checkpoint."""

    workdir: tyro.conf.Positional[Path]
    """Folder of the run."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; may be given several times (none: a new document)."""
    max_new_tokens: int = 64
    """Most tokens to add; an end of text stops earlier."""
    temperature: float = 0.0
    """Temperature of sampling (0: always the likeliest token)."""
    top_p: float = 1.0
    """Sample only from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of sampling."""

    def __post_init__(self) -> None:
        expand_home(self, "workdir")


@dataclasses.dataclass(frozen=True)
class Import:
    """Make a run's folder of a pretrained model, for train, eval and generate."""

    source: tyro.conf.Positional[Path]
    """A Hugging Face folder (config.json, *.safetensors), or a GGUF file."""
    workdir: tyro.conf.Positional[Path]
    """New folder, for train --init-from."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the stored parameters."""
    scan_layers: bool = True
    """Stack the layers' parameters, as train does by default."""

    def __post_init__(self) -> None:
        expand_home(self, "source", "workdir")


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a run's last parameters as a Hugging Face folder."""

    workdir: tyro.conf.Positional[Path]
    """Folder of the run."""
    target: tyro.conf.Positional[Path]
    """New folder, for transformers' from_pretrained."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the files (none: that of the parameters)."""

    def __post_init__(self) -> None:
        expand_home(self, "workdir", "target")


Command = Train | Eval | Generate | Describe | Import | Export
_KINDS = {kind.__name__.lower(): kind for kind in get_args(Command)}
_ANY: Any = functools.reduce(
    operator.or_,
    (Annotated[kind, tyro.conf.subcommand(name)] for name, kind in _KINDS.items()),
)
_CONFIG = tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes


def kind_of(arguments: list[str]) -> type[Command] | None:
    """Returns the name of the command; None if it is missing or unknown."""
    return _KINDS.get(arguments[0]) if arguments else None


def parse(arguments: list[str]) -> Command:
    """Parses the command line; prints help or an error and exits if necessary.

    Raises ``ValueError`` if a file that is named is invalid.
    """
    # One command alone once it is known: errors then name its settings, no union's.
    kind = kind_of(arguments)
    if kind is None:
        about = "Llamas with low-rank momentum: pretrain, look at, use."
        return tyro.cli(
            _ANY, args=arguments, prog=PROGRAM, config=_CONFIG, description=about
        )
    program, rest = f"{PROGRAM} {arguments[0]}", arguments[1:]
    if kind is Train or kind is Describe:
        return _of_a_run(kind, rest, program)
    return tyro.cli(kind, args=rest, prog=program, config=_CONFIG)


def _of_a_run(
    kind: type[Train] | type[Describe], arguments: list[str], program: str
) -> Train | Describe:
    """Returns the command with checked settings from defaults, file and options."""
    defaults = _defaults(arguments)
    start = unchecked(kind)()
    given = tyro.cli(
        type(start),
        args=defaults.rest,
        prog=program,
        config=_CONFIG,
        description=f"{kind.__doc__}\n\n{_DEFAULTS}",
        default=dataclasses.replace(
            start, config=override(start.config, defaults.values)
        ),
    )
    try:
        config = override(Config(), flat(dataclasses.asdict(given.config)))
    except ValueError as error:
        origin = f" (with the settings in {defaults.file})" if defaults.file else ""
        print(f"error: {told(str(error), kind)}{origin}", file=sys.stderr)
        print(f"For all options: {program} --help", file=sys.stderr)
        sys.exit(2)
    if kind is Train:
        return Train(config, defaults.recipe, given.dry_run)
    return Describe(config, defaults.recipe)


class _Defaults(NamedTuple):
    """The defaults that some options and the file set, and the other options."""

    values: dict[str, Any]  # By the settings' names.
    recipe: dict[str, Setting]
    file: Path | None
    rest: list[str]


def _defaults(arguments: list[str]) -> _Defaults:
    options, rest = _defaults_parser().parse_known_args(arguments)
    of_file = file.read(options.config) if options.config else {}
    values = flat({"model": dataclasses.asdict(PRESETS[options.preset])})
    recipe = dict[str, Setting]()
    if options.recipe:
        optimizer = options.optimizer or of_file.get("optimizer.name")
        recipe = RECIPES[options.recipe](options.preset, optimizer)
        values |= {name: setting.value for name, setting in recipe.items()}
    if options.init_from not in (None, "None"):
        values |= defaults_of(_path(options.init_from))
    rest += ["--optimizer", options.optimizer] if options.optimizer else []
    rest += ["--init-from", options.init_from] if options.init_from else []
    return _Defaults(values | of_file, recipe, options.config, rest)


def _defaults_parser() -> argparse.ArgumentParser:
    """Returns a parser of the options that decide the defaults of all others."""
    parser = argparse.ArgumentParser(PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="9m")
    parser.add_argument("--recipe", choices=RECIPES)
    parser.add_argument("--config", type=_path)
    parser.add_argument("--optimizer")
    parser.add_argument("--init-from")
    return parser


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


_DEFAULTS = (
    "The defaults are those of --preset {"
    + ",".join(PRESETS)
    + "}; of --recipe {"
    + ",".join(RECIPES)
    + "}, the published way to train that size; and of --config FILE, YAML as a run "
    "writes it. Each of these wins over those before it, and every option over them."
)
