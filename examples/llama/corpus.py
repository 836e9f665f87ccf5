"""Text to train on: documents, divided into training and held-out ones."""

import ast
import gzip
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# One document in HELD_OUT_ONE_IN is held out, chosen by its name alone.
HELD_OUT_ONE_IN = 25
_TOPICS = "pydoc_data/topics.py"
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


class DataError(ValueError):
    """The text cannot be read; the message names file and line."""


class Corpus(NamedTuple):
    train: list[str]
    held_out: list[str]


def load_corpus(path: Path | None) -> Corpus:
    """Documents of the folder ``path``, or of the standard library."""
    return standard_library() if path is None else json_shards(path)


def standard_library(root: Path | None = None) -> Corpus:
    """Python sources and help topics below ``root``, each distinct text once.

    A document's place depends on the hash of its name: held-out or not, and where
    in the order, so that any stretch of the corpus is a mixture of all of it.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    ranked = sorted(
        (hashlib.sha256(name.encode()).digest(), text)
        for name, text in _distinct(_named_texts(root))
    )
    corpus = Corpus([], [])
    for digest, text in ranked:
        held_out = int.from_bytes(digest[-4:]) % HELD_OUT_ONE_IN == 0
        (corpus.held_out if held_out else corpus.train).append(text)
    if not corpus.train or not corpus.held_out:
        raise DataError(
            f"{root}: not enough Python sources to learn from; give a folder of text "
            "with --data"
        )
    return corpus


def _named_texts(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _LEFT_OUT.intersection(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few old files use another encoding
            continue
        if relative.as_posix() == _TOPICS:
            yield from _help_topics(text)
        else:
            yield relative.as_posix(), text


def _help_topics(source: str) -> Iterator[tuple[str, str]]:
    """The manual pages behind ``help("...")``: one dict literal of English text."""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for name, text in ast.literal_eval(statement.value).items():
                yield f"{_TOPICS}/{name}", text


def _distinct(named_texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for name, text in named_texts:
        if text and text not in seen:
            seen.add(text)
            yield name, text


def json_shards(folder: Path) -> Corpus:
    """``*train*.json.gz`` and ``*validation*.json.gz`` in ``folder``, like C4's."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    return Corpus(*(_split_of(folder, split) for split in ("train", "validation")))


def _split_of(folder: Path, split: str) -> list[str]:
    shards = sorted(folder.glob(f"*{split}*.json.gz"))
    if not shards:
        raise DataError(f"{folder}: no *{split}*.json.gz shard there")
    texts = [text for shard in shards for text in _texts_of(shard)]
    if not texts:
        raise DataError(f"{folder}: the *{split}*.json.gz shards hold no text")
    return texts


def _texts_of(shard: Path) -> Iterator[str]:
    number = 0
    try:
        with gzip.open(shard, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _text_of(line, f"{shard}, line {number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        where = f"{shard}, line {number + 1}"
        raise DataError(f"{where}: broken gzip file: {error}") from error
    except UnicodeDecodeError as error:
        where = f"{shard}, line {number + 1}"
        raise DataError(f"{where}: not UTF-8: {error}") from error


def _text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where}: no "text" field with a string')
    return text
