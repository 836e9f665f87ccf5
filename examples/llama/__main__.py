"""The entry point, which handles Ctrl-C before it imports JAX."""

import os
import signal
import sys
from functools import partial

from examples.llama.again import interrupted
from examples.llama.ending import Code, again_if_dropped


def main() -> int:
    arguments = sys.argv[1:]
    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    is_heeded = before is signal.default_int_handler
    if is_heeded:
        signal.signal(signal.SIGINT, lambda *_: _end_now(arguments))
    try:
        from examples.llama.main import run  # Takes seconds.

        if is_heeded:
            sys.unraisablehook = partial(again_if_dropped, hook)
            signal.signal(signal.SIGINT, before)
        return run(arguments)
    except KeyboardInterrupt:
        print(interrupted(arguments))
        return Code.INTERRUPTED
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, before)


def _end_now(arguments: list[str]) -> None:
    """Ends at once; a module being imported would take an exception for its own."""
    print(interrupted(arguments), flush=True)
    os._exit(Code.INTERRUPTED)


if __name__ == "__main__":
    code = main()
    if code == Code.INTERRUPTED:  # Another Ctrl-C needs no words.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)
