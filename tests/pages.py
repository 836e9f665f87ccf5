"""The pages of the documentation, and how to run their code."""

import contextlib
import difflib
import doctest
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = (".", "benchmarks", "docs", "docs/*", "examples/llama")
PAGES = sorted(
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in ROOT.glob(f"{folder}/*.md")
)


class Block(NamedTuple):
    language: str
    text: str
    line: int
    """Of its first line in the page, from 0."""


def blocks(page: str) -> list[Block]:
    """Returns the fenced blocks of a page, from top to bottom."""
    text = (ROOT / page).read_text()
    fences = re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(x[1], x[2], text.count("\n", 0, x.start(2))) for x in fences]


def run(page: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Runs a page's Python; a `text` block is what was printed since the last one.

    A line `...` in it stands for any number of lines.
    """
    names = {"__name__": "page"} | (names or {})
    printed = io.StringIO()
    for block in blocks(page):
        if block.language == "python":
            # Tracebacks and warnings name the line of the page.
            code = compile("\n" * block.line + block.text, str(ROOT / page), "exec")
            with contextlib.redirect_stdout(printed):
                exec(code, names)
        elif block.language == "text":
            check_output(page, block, printed.getvalue())
            printed = io.StringIO()
    return names


def check_output(page: str, block: Block, printed: str) -> None:
    same = doctest.OutputChecker().check_output(block.text, printed, doctest.ELLIPSIS)
    if not same:
        lines = block.text.splitlines(), printed.splitlines()
        found = "\n".join(difflib.unified_diff(*lines, "page", "printed", lineterm=""))
        raise AssertionError(
            f"{page}, line {block.line + 1}, prints something else:\n{found}"
        )
