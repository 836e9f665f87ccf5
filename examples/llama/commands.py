"""The command line: what can be asked for, and how the settings come together."""

import argparse
import dataclasses
import functools
import operator
import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from examples.llama.config import (
    PRESETS,
    Config,
    as_groups,
    expand_home,
    file,
    flat,
    override,
)
from examples.llama.config.recipes import RECIPES, Setting
from examples.llama.data import tokenizers
from examples.llama.run_record import data_of, model_of

PROGRAM = "python -m examples.llama"


@dataclasses.dataclass(frozen=True)
class Train:
    """Pretrain. The same command again goes on with an interrupted run."""

    config: Config = dataclasses.field(default_factory=Config)
    recipe: tyro.conf.Suppress[dict[str, Setting]] = dataclasses.field(
        default_factory=dict
    )
    dry_run: bool = False
    """Print the plan, compute nothing."""


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
    """Held-out tokens to predict (none: as many as the run does)."""
    seq_len: int | None = None
    """Tokens per row that are predicted (none: as many as the run does)."""
    batch_size: int | None = None
    """Rows at a time, over all devices (none: as many as the run's steps)."""
    skip_bad_lines: bool = False
    """Leave out lines without a document, and say how many and where."""
    mesh: str | None = None
    """Devices along data, fsdp and tensor (none: all along data)."""
    distributed: str | None = None
    """As for train: one job of several processes."""

    def __post_init__(self) -> None:
        expand_home(self, "workdir", "data")


@dataclasses.dataclass(frozen=True)
class Generate:
    """Text from a run's last checkpoint."""

    workdir: tyro.conf.Positional[Path]
    """Folder of the run."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to go on with; may be given several times (none: a new document)."""
    max_new_tokens: int = 64
    """Tokens to add at most; the end of a text ends it before."""
    temperature: float = 0.0
    """Of the distribution that tokens are drawn from (0: the likeliest one always)."""
    top_p: float = 1.0
    """Draw from the likeliest tokens alone that have this much of the probability."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        expand_home(self, "workdir")


@dataclasses.dataclass(frozen=True)
class Import:
    """Make a run's folder of a pretrained model, for train, eval and generate."""

    source: tyro.conf.Positional[Path]
    """A Hugging Face folder (config.json, *.safetensors), or a GGUF file."""
    workdir: tyro.conf.Positional[Path]
    """New folder; train --init-from takes it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the parameters are kept."""
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
    """Of the files (none: the parameters' own)."""

    def __post_init__(self) -> None:
        expand_home(self, "workdir", "target")


Command = Train | Eval | Generate | Describe | Import | Export
_KINDS = {kind.__name__.lower(): kind for kind in get_args(Command)}
_ANY: Any = functools.reduce(
    operator.or_,
    (Annotated[kind, tyro.conf.subcommand(name)] for name, kind in _KINDS.items()),
)


def parse(arguments: list[str]) -> Command:
    """What is asked for; prints help or what is wrong, and exits, where it must.

    Raises ``ValueError`` for settings that cannot be.
    """
    # One command alone once it is known: errors then name its settings, no union's.
    name = arguments[0] if arguments else ""
    options = tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes
    if name not in _KINDS:
        about = "Llamas with low-rank momentum: pretrain, look at, use."
        return tyro.cli(
            _ANY, args=arguments, prog=PROGRAM, config=options, description=about
        )
    kind, rest, more = _KINDS[name], arguments[1:], {}
    if kind in (Train, Describe):
        config, recipe, rest = _configured(rest)
        more["default"] = kind(config, recipe)
        more["description"] = f"{kind.__doc__}\n\n{_DEFAULTS}"
    return tyro.cli(kind, args=rest, prog=f"{PROGRAM} {name}", config=options, **more)


def _configured(arguments: list[str]) -> tuple[Config, dict[str, Setting], list[str]]:
    """The defaults that some options ask for, their recipe, and the other options."""
    options, rest = _defaults_parser().parse_known_args(arguments)
    content = file.load(options.config) if options.config else {}
    config, recipe = Config(PRESETS[options.preset]), dict[str, Setting]()
    if options.recipe:
        optimizer = options.optimizer or flat(content).get("optimizer.name")
        recipe = RECIPES[options.recipe](options.preset, optimizer)
        config = override(config, {name: x.value for name, x in recipe.items()})
    if options.init_from not in (None, "None"):
        config = override(config, _defaults_of(_path(options.init_from)))
    # Before what was given beside it, which wins.
    rest = file.options_of(content, options.config) + rest
    rest += ["--optimizer", options.optimizer] if options.optimizer else []
    rest += ["--init-from", options.init_from] if options.init_from else []
    return config, recipe, rest


def _defaults_parser() -> argparse.ArgumentParser:
    """Of the options that the defaults of all others hang on."""
    parser = argparse.ArgumentParser(PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="9m")
    parser.add_argument("--recipe", choices=RECIPES)
    parser.add_argument("--config", type=_path)
    parser.add_argument("--optimizer")
    parser.add_argument("--init-from")
    return parser


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def _defaults_of(folder: Path) -> dict[str, Any]:
    """Settings that parameters there ask for, by their dotted names."""
    values = flat({"model": as_groups(model_of(folder))})
    tokenizer = tokenizers.saved_file(folder)
    if tokenizer is not None:
        values["data.tokenizer"] = str(tokenizer)
    vocab_size = data_of(folder)["vocab_size"]
    return values | {"data.vocab_size": vocab_size, "init_from": folder}


def config_of(run: Path) -> Config:
    """The settings of a run, its tokenizer the one that it has kept.

    Of imported weights, the default settings with their model and tokenizer.
    """
    own = _defaults_of(run)  # First, as it says best where there is no run.
    path = run / "config.yaml"
    try:
        command = parse(["train", "--config", str(path)])
    except SystemExit as error:  # It has told what cannot be, but not where.
        raise ValueError(f"{path}: not the settings of a run") from error
    assert isinstance(command, Train)
    return override(command.config, own)


_DEFAULTS = (
    "The defaults are those of --preset {"
    + ",".join(PRESETS)
    + "}; of --recipe {"
    + ",".join(RECIPES)
    + "}, the published way to train that size; and of --config FILE, YAML as a run "
    "writes it. Each of these wins over those before it, and every option over them."
)
