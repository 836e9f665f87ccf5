"""What is printed after a command that did not finish.

This module imports nothing that takes time, since Ctrl-C may come early.
"""

from collections.abc import Sequence


def again(arguments: Sequence[str]) -> str:
    """Returns what to print after the command ``arguments`` did not finish."""
    goes_on = arguments[:1] == ["train"] and "--dry-run" not in arguments
    return " Run the same command again to go on." if goes_on else ""


def interrupted(arguments: Sequence[str]) -> str:
    """Returns the message for Ctrl-C."""
    return f"Interrupted.{again(arguments)}"
