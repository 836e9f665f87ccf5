"""Text on the terminal as it is, whatever is in it."""

from typing import NoReturn

from rich.console import Console


class Terminal(Console):
    """Raises ``BrokenPipeError`` where what reads the output is gone.

    Rich would end the process there, with the code of bad data.
    """

    def on_broken_pipe(self) -> NoReturn:
        raise


def say(console: Console, *lines: str) -> None:
    """Each on a line of its own; brackets and colons have no meaning in them."""
    for line in lines:
        console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
