"""What each command does, and how its outcome is told."""

import sys
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console

from examples.llama import commands, hosts
from examples.llama.commands import Describe, Train
from examples.llama.data.text import planned_vocab_size
from examples.llama.plan import plan
from examples.llama.stop import Stopped
from examples.llama.train import train


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
        return _failed(
            console,
            error,
            "What was saved is kept. Run the same command again to go on.",
            code=74,  # EX_IOERR of sysexits.h
        )
    except Stopped as stopped:
        console.quiet = not hosts.is_first()
        console.print(f"{stopped} Run the same command again to go on.")
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
    result = train(config, console)
    console.quiet = not hosts.is_first()
    _say(console, "\n".join(f"{name:<17}{x}" for name, x in result.lines().items()))


def _describe(command: Describe, console: Console) -> None:
    _say(console, _plan_of(command, every_leaf=True))


def _plan_of(command: Train | Describe, every_leaf: bool) -> str:
    config = command.config
    vocab_size = planned_vocab_size(config.data)
    return plan(config, vocab_size, command.recipe, jax.device_count(), every_leaf)


_COMMANDS: dict[type, Callable[[Any, Console], None]] = {
    Train: _train,
    Describe: _describe,
}

if __name__ == "__main__":
    sys.exit(main())
