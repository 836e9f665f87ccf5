"""What each command does, and how its outcome is reported."""

import contextlib
import os
import traceback
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console

from examples.llama import commands, hosts
from examples.llama.again import again, interrupted
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
from examples.llama.ending import Code
from examples.llama.generate import Sampling
from examples.llama.lock import WorkdirInUse, require_free
from examples.llama.options import told
from examples.llama.plan import plan
from examples.llama.stop import Stopped, Terminated, terminable
from examples.llama.terminal import Terminal, say
from examples.llama.train import train
from examples.llama.using import evaluate, go_on
from examples.llama.weights.folder import export_weights, import_weights

_LESS_MEMORY = {
    "train": "A smaller --micro-batch-size or --batch-size takes less, and so do "
    "--remat all, --loss-chunk, --layers-at-once and a --mesh with fsdp; train "
    "--dry-run says how much.",
    "eval": "A smaller --batch-size takes less, and so does a --mesh with fsdp.",
    "generate": "Fewer prompts at once and a smaller --max-new-tokens take less.",
}


def run(arguments: list[str]) -> int:
    """Returns the exit code. In a job of several, a failed process ends here."""
    try:
        code = _outcome(arguments, Terminal())
    except BrokenPipeError:
        # Nor could Python write what it still holds.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = Code.OUTPUT_CLOSED
        with contextlib.suppress(BrokenPipeError):
            _failed(
                arguments,
                f"what reads the output is gone.{again(arguments)}",
                code=code,
            )
    except KeyboardInterrupt:
        print(interrupted(arguments))
        code = Code.INTERRUPTED
    if hosts.others is not None:
        hosts.others.leave(code)
    return code


def _outcome(arguments: list[str], console: Console) -> int:
    """Returns the exit code, and prints the reason."""
    try:
        command = commands.parse(arguments)
    except ValueError as error:
        return _failed(arguments, error, code=Code.BAD_SETTINGS)
    try:
        _COMMANDS[type(command)](command, console)
    except hosts.FirstFailed as error:
        code = hosts.others.code_of_first() if hosts.others else Code.REFUSED
        return _failed(arguments, error, code=code)
    except WorkdirInUse as error:
        return _failed(arguments, error, code=Code.IN_USE)
    except Diverged as error:
        return _failed(arguments, error, code=Code.DIVERGED)
    except ValueError as error:  # bad data, or not this run's: the message is enough
        return _failed(arguments, error, code=Code.REFUSED)
    except (Stopped, Terminated) as stopped:
        console.quiet = not hosts.is_first()
        say(console, f"{stopped}{again(arguments)}")
        in_time = isinstance(stopped, Stopped) and stopped.in_time
        return Code.TIME_IS_UP if in_time else Code.TERMINATED
    except BrokenPipeError:
        raise
    except Exception as error:
        if hosts.others is not None:
            hosts.others.settle()
        return _failed_at_work(error, arguments)
    return Code.DONE


def _failed_at_work(error: Exception, arguments: list[str]) -> int:
    if isinstance(error, OSError):  # a full disk, above all
        more = again(arguments)
        more = f"What was saved is kept.{more}" if more else ""
        return _failed(arguments, error, more, code=Code.IO_FAILED)
    of_devices = isinstance(error, jax.errors.JaxRuntimeError)
    if isinstance(error, MemoryError) or (
        of_devices and "RESOURCE_EXHAUSTED" in str(error)
    ):
        what = str(error).partition("\n")[0] or "out of memory"
        mend = _LESS_MEMORY.get(arguments[0], "")
        return _failed(arguments, what, mend, code=Code.OUT_OF_MEMORY)
    traceback.print_exception(error)
    return Code.UNFORESEEN


def _failed(arguments: list[str], error: Exception | str, *more: str, code: int) -> int:
    notes = getattr(error, "__notes__", ())  # What failed besides.
    message = told(str(error), commands.kind_of(arguments))
    # On a terminal of its own: the other may hold what could not be written.
    say(Terminal(stderr=True), f"error: {message}", *notes, *filter(None, more))
    return code


def _train(command: Train, console: Console) -> None:
    config = command.config
    if command.dry_run:
        say(console, _plan_of(command, every_leaf=False))
        return
    notes = recipes.notes(command.recipe, config.optimizer)
    say(console, *(told(note, Train) for note in notes))
    if config.distributed is not None:
        require_free(config.workdir)
        hosts.join(config.distributed)  # From here on JAX waits for SIGTERM.
        result = train(config, console)
    else:
        with terminable():
            result = train(config, console)
    console.quiet = not hosts.is_first()
    say(console, "\n".join(f"{name:<17}{x}" for name, x in result.lines().items()))


def _describe(command: Describe, console: Console) -> None:
    say(console, _plan_of(command, every_leaf=True))


def _plan_of(command: Train | Describe, every_leaf: bool) -> str:
    vocab_size, notes = planned_vocabulary(command.config.data)
    devices = jax.device_count()
    text = plan(command.config, vocab_size, command.recipe, devices, every_leaf)
    notes = [*notes, *recipes.notes(command.recipe, command.config.optimizer)]
    return "\n".join([*(told(note, type(command)) for note in notes), text])


def _eval(command: Eval, console: Console) -> None:
    if command.distributed is not None:
        hosts.join(command.distributed)
    console.quiet = not hosts.is_first()
    found = evaluate(command.workdir, command.settings, command.mesh, console)
    say(console, f"held-out loss    {found.loss:.4f} nats per token")
    say(console, f"perplexity       {found.perplexity:.3f}")
    say(console, f"tokens           {found.tokens:,}")


def _generate(command: Generate, console: Console) -> None:
    sampling = Sampling(command.temperature, command.top_p)
    asked = command.prompt, command.max_new_tokens, sampling, command.seed
    for prompt, text in go_on(command.workdir, *asked):
        print(f"{prompt}{text}\n")  # Tabs and all.


def _import(command: Import, console: Console) -> None:
    with terminable():  # Else the half of a folder would stay.
        made = import_weights(
            command.source,
            command.workdir,
            command.dtype,
            scan_layers=command.scan_layers,
        )
    say(console, f"{command.workdir}: {made.config}, {made.vocab_size:,} pieces")
    if made.without_tokenizer:
        say(console, f"without a tokenizer: {made.without_tokenizer}")


def _export(command: Export, console: Console) -> None:
    with terminable():
        export_weights(command.workdir, command.target, command.dtype)
    say(console, f"written to {command.target}")


_COMMANDS: dict[type, Callable[[Any, Console], None]] = {
    Train: _train,
    Eval: _eval,
    Generate: _generate,
    Describe: _describe,
    Import: _import,
    Export: _export,
}
