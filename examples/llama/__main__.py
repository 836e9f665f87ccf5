"""What each command does, and how its outcome is told."""

import sys
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console

from examples.llama import commands, hosts
from examples.llama.commands import (
    Describe,
    Eval,
    Export,
    Generate,
    Import,
    Train,
)
from examples.llama.config import recipes
from examples.llama.data.text import planned_vocabulary
from examples.llama.divergence import Diverged
from examples.llama.plan import plan
from examples.llama.stop import Stopped
from examples.llama.train import train
from examples.llama.using import evaluate, go_on
from examples.llama.weights.folder import export_weights, import_weights


def main() -> int:
    console = Console()
    try:
        command = commands.parse(sys.argv[1:])
    except ValueError as error:
        return _failed(console, error, code=2)  # as for options that do not exist
    try:
        _COMMANDS[type(command)](command, console)
    except ValueError as error:  # bad data, or not this run's: the message is enough
        return _failed(console, error, code=1)
    except OSError as error:  # a full disk, above all
        more = ["What was saved is kept. Run the same command again to go on."]
        more = more if isinstance(command, Train) else []
        return _failed(console, error, *more, code=74)  # EX_IOERR of sysexits.h
    except Diverged as error:
        return _failed(console, error, code=76)
    except Stopped as stopped:
        console.quiet = not hosts.is_first()
        _say(console, f"{stopped} Run the same command again to go on.")
        # EX_TEMPFAIL, or 128 + SIGTERM as a shell reports it.
        return 75 if stopped.in_time else 143
    except KeyboardInterrupt:
        console.print("Interrupted. Run the same command again to go on.")
        return 130
    return 0


def _failed(console: Console, error: Exception, *more: str, code: int) -> int:
    console.stderr = True
    for line in (f"error: {error}", *more):
        _say(console, line)
    return code


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _train(command: Train, console: Console) -> None:
    config = command.config
    if command.dry_run:
        _say(console, _plan_of(command, every_leaf=False))
        return
    if config.distributed is not None:
        hosts.join(config.distributed)
    for note in recipes.notes(command.recipe, config.optimizer):
        if hosts.is_first():
            _say(console, note)
    result = train(config, console)
    console.quiet = not hosts.is_first()
    _say(console, "\n".join(f"{name:<17}{x}" for name, x in result.lines().items()))


def _describe(command: Describe, console: Console) -> None:
    _say(console, _plan_of(command, every_leaf=True))


def _plan_of(command: Train | Describe, every_leaf: bool) -> str:
    vocab_size, notes = planned_vocabulary(command.config.data)
    devices = jax.device_count()
    text = plan(command.config, vocab_size, command.recipe, devices, every_leaf)
    notes = [*notes, *recipes.notes(command.recipe, command.config.optimizer)]
    return "\n".join([*notes, text])


def _eval(command: Eval, console: Console) -> None:
    if command.distributed is not None:
        hosts.join(command.distributed)
    console.quiet = not hosts.is_first()
    found = evaluate(command, console)
    _say(console, f"held-out loss    {found.loss:.4f} nats per token")
    _say(console, f"perplexity       {found.perplexity:.3f}")
    _say(console, f"tokens           {found.tokens:,}")


def _generate(command: Generate, console: Console) -> None:
    for prompt, text in go_on(command):
        _say(console, f"{prompt}{text}\n")


def _import(command: Import, console: Console) -> None:
    made = import_weights(
        command.source,
        command.workdir,
        command.dtype,
        scan_layers=command.scan_layers,
    )
    _say(console, f"{command.workdir}: {made.config}, {made.vocab_size:,} pieces")
    if made.without_tokenizer:
        _say(console, f"without a tokenizer: {made.without_tokenizer}")


def _export(command: Export, console: Console) -> None:
    export_weights(command.workdir, command.target, command.dtype)
    _say(console, f"written to {command.target}")


_COMMANDS: dict[type, Callable[[Any, Console], None]] = {
    Train: _train,
    Eval: _eval,
    Generate: _generate,
    Describe: _describe,
    Import: _import,
    Export: _export,
}

if __name__ == "__main__":
    sys.exit(main())
