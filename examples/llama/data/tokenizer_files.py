"""A tokenizer's file, and the files beside it in Hugging Face folders.

It goes wherever the tokenizer goes, as it is: the settings decide what is put around a
text, and whoever uses the weights after us has the rest from us alone.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from examples.llama import files

PIECES, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
SETTINGS, GENERATION = "tokenizer_config.json", "generation_config.json"
_NAMES = "special_tokens_map.json"
_TEMPLATES = "chat_template.jinja", "chat_template.json"
_MORE_TEMPLATES = "additional_chat_templates"
_BESIDE = (SETTINGS, GENERATION, _NAMES, *_TEMPLATES)


class Beside(NamedTuple):
    """The files beside a tokenizer: contents by name, and two of them parsed."""

    contents: Mapping[str, bytes] = {}
    settings: Mapping[str, Any] = {}
    names: Mapping[str, Any] = {}

    def token(self, role: str) -> str | None:
        """Returns the token with a ``role`` such as "eos_token", if one is named."""
        named = self.settings.get(role) or self.names.get(role)
        found = named.get("content") if isinstance(named, dict) else named
        if found is not None and not isinstance(found, str):
            raise files.BadFile(f"{role} is {named!r}, not the text of a token")
        return found

    def save(self, folder: Path) -> None:
        for name, content in self.contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            files.write(folder / name, content)


NOTHING = Beside()


def read_beside(path: Path) -> Beside:
    """Reads the files beside the tokenizer's file ``path``."""
    folder = path.parent
    names = [*_BESIDE, *_more_templates(folder)]
    if path.name == PIECES:  # Which is the tokenizer, wherever both are.
        names.append(SENTENCEPIECE)
    there = [name for name in names if (folder / name).exists()]
    settings, tokens = (
        files.read_json(folder / name) if name in there else {}
        for name in (SETTINGS, _NAMES)
    )
    contents = {name: files.read_bytes(folder / name) for name in there}
    return Beside(contents, settings, tokens)


def saved_file(folder: Path) -> Path | None:
    """Returns the tokenizer's file in a folder, if any."""
    paths = (folder / name for name in (PIECES, SENTENCEPIECE))
    return next((path for path in paths if path.exists()), None)


def save(folder: Path, name: str, content: bytes, beside: Beside) -> None:
    """Saves it as the only tokenizer there, also if an unstarted run left one."""
    clear(folder, but=[name, *beside.contents])
    beside.save(folder)
    files.write(folder / name, content)


def clear(folder: Path, but: Collection[str] = ()) -> None:
    """Removes the files, except those to write again, which others may be reading."""
    for name in (PIECES, SENTENCEPIECE, *_BESIDE, *_more_templates(folder)):
        if name not in but:
            (folder / name).unlink(missing_ok=True)


def _more_templates(folder: Path) -> list[str]:
    paths = (folder / _MORE_TEMPLATES).glob("*.jinja")
    return sorted(f"{_MORE_TEMPLATES}/{path.name}" for path in paths)


def copy(source: Path, target: Path) -> None:
    """Copies the tokenizer, if any, and the files beside it, to another folder."""
    path = saved_file(source)
    beside = read_beside(path or source / PIECES)
    if path is None:
        beside.save(target)
    else:
        save(target, path.name, files.read_bytes(path), beside)
