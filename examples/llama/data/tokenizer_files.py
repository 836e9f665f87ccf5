"""A tokenizer's file, and what Hugging Face's folders have beside it.

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
    """Contents by name, and what two of the files say."""

    contents: Mapping[str, bytes] = {}
    settings: Mapping[str, Any] = {}
    names: Mapping[str, Any] = {}

    def token(self, role: str) -> str | None:
        """The token that has the ``role``, such as "eos_token", where one is named."""
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
    """What is beside the tokenizer's file ``path``."""
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
    """The tokenizer there, if any."""
    paths = (folder / name for name in (PIECES, SENTENCEPIECE))
    return next((path for path in paths if path.exists()), None)


def save(folder: Path, name: str, content: bytes, beside: Beside) -> None:
    """As the one tokenizer there, also where a run that never got anywhere left one."""
    clear(folder, but=[name, *beside.contents])
    beside.save(folder)
    files.write(folder / name, content)


def clear(folder: Path, but: Collection[str] = ()) -> None:
    """What is to be written anew stays till then: another process may be reading it."""
    for name in (PIECES, SENTENCEPIECE, *_BESIDE, *_more_templates(folder)):
        if name not in but:
            (folder / name).unlink(missing_ok=True)


def _more_templates(folder: Path) -> list[str]:
    paths = (folder / _MORE_TEMPLATES).glob("*.jinja")
    return sorted(f"{_MORE_TEMPLATES}/{path.name}" for path in paths)


def copy(source: Path, target: Path) -> None:
    """From folder to folder: the tokenizer, if any, and all beside it or its place."""
    path = saved_file(source)
    beside = read_beside(path or source / PIECES)
    if path is None:
        beside.save(target)
    else:
        save(target, path.name, files.read_bytes(path), beside)
