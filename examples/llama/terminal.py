"""Prints text on the terminal as it is, without markup."""

from typing import NoReturn

from rich.console import Console


class Terminal(Console):
    """Raises ``BrokenPipeError`` if the reader of the output has ended.

    Rich would end the process with the exit code of bad data.
    """

    def on_broken_pipe(self) -> NoReturn:
        raise


def say(console: Console, *lines: str) -> None:
    """Prints each text on its own line; brackets and colons are not markup."""
    for line in lines:
        console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
