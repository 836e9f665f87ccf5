"""Text streamed from the Hugging Face hub by ``datasets``, which is an extra."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from examples.llama.data.documents import (
    BadLine,
    BadLines,
    DataError,
    Document,
    Split,
    text_of,
)
from examples.llama.data.shards import digest_of

_NAME = re.compile(r"(?P<path>[^:@]+)(?::(?P<config>[^:@]+))?(?:@(?P<revision>[^@]+))?")


class Hub:
    """``owner/name[:config][@revision]``, or a folder laid out like such a repository.

    Nothing but what is read is fetched, from the first document of the split on.
    """

    def __init__(self, name: str, memory: Path):
        match = _NAME.fullmatch(name)
        if match is None:
            raise DataError(f"--hub {name}: not like owner/name:config@revision")
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                "--hub needs the package datasets: pip install '.[hub]'"
            ) from error
        self._datasets: Any = datasets
        self._path, self._config, self._revision = match.group(
            "path", "config", "revision"
        )
        self._memory = memory
        self.name = f"--hub {name}"

    def fingerprint(self, split: Split) -> str:
        """Of the repository's commit, which from here on is the one that is read."""
        folder = Path(self._path)
        if folder.is_dir():
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            at = " ".join(digest_of(path, self._memory) for path in paths)
        else:
            at = self._revision = self._commit()
        identity = f"{self._path if self._revision else ''} {self._config} {split} {at}"
        return hashlib.sha256(identity.encode()).hexdigest()

    def documents(self, split: Split, bad: BadLines) -> Iterator[Document]:
        number = 0
        with self._failure_named(lambda: f"{split}, after document {number}"):
            records = self._datasets.load_dataset(
                self._path,
                self._config,
                split=split,
                revision=self._revision,
                streaming=True,
            )
            for number, record in enumerate(records, start=1):
                try:
                    text = text_of(record)
                except BadLine as why:
                    bad.add(f"{self.name}, {split}, document {number}", why)
                else:
                    yield Document(text, None)

    def _commit(self) -> str:
        if self._revision and re.fullmatch("[0-9a-f]{40}", self._revision):
            return self._revision  # Needs no network, where all is tokenised already.
        import huggingface_hub

        with self._failure_named(lambda: "its commit"):
            api = huggingface_hub.HfApi()
            sha = api.dataset_info(self._path, revision=self._revision).sha
        assert sha is not None
        return sha

    @contextmanager
    def _failure_named(self, where: Any) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except Exception as error:  # Of the network, the format, a missing split, ...
            raise DataError(f"{self.name}, {where()}: {error}") from error
