"""Text streamed from the Hugging Face hub by ``datasets``, which is an extra."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
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

    Only what is read is fetched, from the first document of the split on.
    """

    def __init__(self, name: str, memory: Path):
        match = _NAME.fullmatch(name)
        if match is None:
            raise DataError(f"`data.hub: {name}`: not like owner/name:config@revision")
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                "`data.hub` needs the package datasets: pip install '.[hub]'"
            ) from error
        self._datasets: Any = datasets
        self._path, self._config, self._revision = match.group(
            "path", "config", "revision"
        )
        if self._revision and Path(self._path).is_dir():
            raise DataError(
                f"`data.hub: {name}`: {self._path} is a folder, without revisions"
            )
        self._memory = memory
        self.name = f"hub {name}"

    def fingerprint(self, split: Split) -> str:
        """Returns a hash of the repository's commit, which is read from now on.

        For a folder, it is of all files and their names, which may decide the split.
        """
        folder = Path(self._path)
        if folder.is_dir():
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            at = " ".join(
                f"{path.relative_to(folder)} {digest_of(path, self._memory)}"
                for path in paths
            )
        else:
            at = self._revision = self._commit()
        identity = f"{self._path if self._revision else ''} {self._config} {split} {at}"
        return hashlib.sha256(os.fsencode(identity)).hexdigest()

    def documents(self, split: Split, bad: BadLines) -> Iterator[Document]:
        number = 0
        with self._failure_named(lambda: f"{split}, after document {number}"):
            builder = self._datasets.load_dataset_builder(
                self._path, self._config, revision=self._revision
            )
            files = builder.config.data_files or {}
            self._check_splits(files)
            records = builder.as_streaming_dataset(split=split)
            count, names = records.num_shards, list(files.get(split, ()))
            if len(names) != count:  # Archives of several, or one that is not divided.
                names = [f"part {part} of {count}" for part in range(1, count + 1)]
            # One file at a time, since datasets skips empty files silently.
            for part, name in enumerate(names):
                before = number
                for record in records.shard(count, part):
                    number += 1
                    try:
                        text = text_of(record)
                    except BadLine as why:
                        bad.add(f"{self.name}, {split}, document {number}", why)
                    else:
                        yield Document(text, None)
                if number == before:
                    bad.add(f"{self.name}, {split}, {name}", BadLine("no document"))

    def _check_splits(self, files: Mapping[str, Iterable[str]]) -> None:
        """Checks that no held-out text is trained on, whatever names and card say."""
        both = set(files.get("train", ())) & set(files.get("validation", ()))
        if both:
            raise DataError(
                f"{self.name}: {min(both)} is both in train and in validation; name "
                "the files of each in the card, or choose another configuration"
            )

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
