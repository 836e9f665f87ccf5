"""What is told after a command that has not come to its end.

It needs nothing that takes time to import: Ctrl-C may come as early as that.
"""

from collections.abc import Sequence


def again(arguments: Sequence[str]) -> str:
    """What is told after the command ``arguments`` has not come to its end."""
    goes_on = arguments[:1] == ["train"] and "--dry-run" not in arguments
    return " Run the same command again to go on." if goes_on else ""


def interrupted(arguments: Sequence[str]) -> str:
    """The words for Ctrl-C."""
    return f"Interrupted.{again(arguments)}"
