"""Begins with little, so that Ctrl-C has its words before JAX is imported."""

import os
import signal
import sys
from typing import Any

from examples.llama.ending import Code, interrupted, raise_from_signal


def main() -> int:
    arguments = sys.argv[1:]
    before = signal.getsignal(signal.SIGINT)
    is_heeded = before is signal.default_int_handler
    if is_heeded:
        signal.signal(signal.SIGINT, lambda *_: _end_now(arguments))
    try:
        from examples.llama.main import run  # Takes seconds.

        if is_heeded:
            signal.signal(signal.SIGINT, _interrupt)
        return run(arguments)
    except KeyboardInterrupt:
        print(interrupted(arguments))
        return Code.INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before)


def _end_now(arguments: list[str]) -> None:
    """A module that begins would take an exception for an error of its own."""
    print(interrupted(arguments), flush=True)
    os._exit(Code.INTERRUPTED)


def _interrupt(signum: int, frame: Any) -> None:
    raise_from_signal(KeyboardInterrupt(), signum, frame)


if __name__ == "__main__":
    code = main()
    if code == Code.INTERRUPTED:  # Another Ctrl-C needs no words.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)
