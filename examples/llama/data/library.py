"""Text that is always available: Python's own standard library."""

import ast
import functools
import hashlib
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from examples.llama.data.documents import BadLine, BadLines, DataError, Document, Split

# One document in HELD_OUT_ONE_IN is held out, chosen by its name alone.
HELD_OUT_ONE_IN = 25
_TOPICS = "pydoc_data/topics.py"
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


class StandardLibrary:
    """Python sources and help topics below ``root``, each distinct text once.

    A document's place depends on the hash of its name: held-out or not, and where
    in the order, so that any stretch of the text is a mixture of all of it. There are
    some 20 MB of it, which are held in memory.
    """

    def __init__(self, root: Path | None = None):
        self._root = root or Path(sysconfig.get_path("stdlib"))
        self.name = f"the Python library in {self._root}"

    @functools.cached_property
    def texts(self) -> dict[Split, list[str | BadLine]]:
        found = _distinct(_named_texts(self._root))
        by_rank = {hashlib.sha256(name.encode()).digest(): text for name, text in found}
        texts: dict[Split, list[str | BadLine]] = {"train": [], "validation": []}
        for digest in sorted(by_rank):
            held_out = int.from_bytes(digest[-4:]) % HELD_OUT_ONE_IN == 0
            texts["validation" if held_out else "train"].append(by_rank[digest])
        if not all(texts.values()):
            raise DataError(
                f"{self._root}: not enough Python sources to learn from; give a folder "
                "of text as `data.path`"
            )
        return texts

    def fingerprint(self, split: Split) -> str:
        digest = hashlib.sha256()
        for text in self.texts[split]:
            digest.update(hashlib.sha256(str(text).encode()).digest())
        return digest.hexdigest()

    def documents(self, split: Split, bad: BadLines) -> Iterator[Document]:
        texts = self.texts[split]
        for number, text in enumerate(texts, start=1):
            if isinstance(text, BadLine):
                bad.add(self.name, text)
            else:
                yield Document(text, number / len(texts))


def _named_texts(root: Path) -> Iterator[tuple[str, str | BadLine]]:
    """Yields names with texts, or with the reason why a file has none."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if _LEFT_OUT.intersection(name.split("/")):
            continue
        try:
            with tokenize.open(path) as file:  # in the encoding that it declares
                text = file.read()
            texts = list(_help_topics(text)) if name == _TOPICS else [(name, text)]
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            texts = [(name, BadLine(f"{name}: not Python that can be read: {error}"))]
        yield from texts


def _help_topics(source: str) -> Iterator[tuple[str, str]]:
    """The manual pages behind ``help("...")``: one dict literal of English text."""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for name, text in ast.literal_eval(statement.value).items():
                yield f"{_TOPICS}/{name}", text


def _distinct(
    named_texts: Iterable[tuple[str, str | BadLine]],
) -> Iterator[tuple[str, str | BadLine]]:
    seen: set[str | BadLine] = set()
    for name, text in named_texts:
        if text and text not in seen:
            seen.add(text)
            yield name, text
