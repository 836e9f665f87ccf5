"""The display while text is tokenised."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from examples.llama.terminal import say

_SECONDS_BETWEEN_LINES = 10


class TokenisingProgress:
    """A live bar on a terminal, a line now and then elsewhere, and one at the end."""

    def __init__(self, what: str, console: Console):
        self._what, self._console = what, console
        self._began = self._said = time.perf_counter()
        self._text = ""
        self._bar = Progress(
            TextColumn(f"tokenising the {what}", markup=False),
            BarColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> "TokenisingProgress":
        self._bar.start()
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._bar.stop()
        if error is None and self._text:
            seconds = time.perf_counter() - self._began
            say(
                self._console,
                f"tokenised the {self._what}: {self._text} in {seconds:.1f} s",
            )

    def update(self, done: float | None, documents: int, tokens: int) -> None:
        """``done`` is a part from 0 to 1, None where it is not known."""
        self._text = f"{documents:,} documents, {tokens:,} tokens"
        total = None if done is None else 1.0
        self._bar.update(
            self._task, total=total, completed=done or 0, description=self._text
        )
        now = time.perf_counter()
        if now - self._said > _SECONDS_BETWEEN_LINES and not self._console.is_terminal:
            self._said = now
            part = "" if done is None else f" ({done:.0%})"
            say(self._console, f"tokenising the {self._what}{part}: {self._text}")
