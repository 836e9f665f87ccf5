"""Streaming from a folder with the layout of a repository on the hub."""

import gzip
import sys

import pytest
from conftest import write_shard
from rich.console import Console

from examples.llama.config import DataConfig
from examples.llama.data.documents import BadLines, DataError
from examples.llama.data.hub import Hub
from examples.llama.data.text import open_source, open_text, read_texts

QUIET = Console(quiet=True)
CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
- config_name: other
  data_files:
  - split: train
    path: en/c4-validation.*.json.gz
- config_name: both
  data_files:
  - split: train
    path: en/*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Returns a folder with C4's layout, whose card names configurations."""
    pytest.importorskip("datasets", reason="datasets (the extra hub) is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cached")
    monkeypatch.setattr("datasets.config.HF_MODULES_CACHE", tmp_path / "modules")
    folder = tmp_path / "c4"
    (folder / "en").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    texts = [f"document {i}" for i in range(30)]
    write_shard(folder / "en" / "c4-train.00000-of-00002.json.gz", texts[:20])
    write_shard(folder / "en" / "c4-train.00001-of-00002.json.gz", texts[20:])
    write_shard(folder / "en" / "c4-validation.00000-of-00001.json.gz", ["held out"])
    return folder


@pytest.fixture
def config(repository, tmp_path):
    return DataConfig(
        hub=f"{repository}:en",
        train_tokens=200,
        eval_tokens=5,
        seq_len=8,
        cache=tmp_path / "tokens",
    )


def test_a_stream_has_the_text_of_the_files(config, repository, tmp_path):
    from_hub, from_files = (
        [list(read_texts(source, split)) for split in ("train", "validation")]
        for source in (
            open_source(config),
            open_source(DataConfig(repository / "en", cache=tmp_path)),
        )
    )
    assert from_hub == from_files


def test_it_is_kept_as_tokens_as_far_as_asked_for(config, monkeypatch):
    data = open_text(config, QUIET).load()
    assert bytes(data.train[0].inputs.tolist()) == b"document"
    assert 200 <= data.tokens < 250  # Of 340.

    def unreachable(*_):
        raise AssertionError("it is all there")

    monkeypatch.setattr(Hub, "documents", unreachable)
    assert open_text(config, QUIET).load().tokens == data.tokens


def test_its_fingerprint_is_that_of_its_content(config, repository, tmp_path):
    first = open_text(config, QUIET).fingerprint
    assert open_text(config, QUIET).fingerprint == first
    moved = repository.rename(tmp_path / "moved")
    there = Hub(f"{moved}:en", tmp_path)
    assert there.fingerprint("train") == Hub(f"{moved}:en", tmp_path).fingerprint(
        "train"
    )
    assert there.fingerprint("train") != there.fingerprint("validation")
    assert there.fingerprint("train") != Hub(f"{moved}:x", tmp_path).fingerprint(
        "train"
    )
    before = there.fingerprint("train")
    write_shard(moved / "en" / "c4-train.00001-of-00002.json.gz", ["another"])
    assert there.fingerprint("train") != before


def test_a_commit_needs_no_network(tmp_path):
    pytest.importorskip("datasets", reason="datasets (the extra hub) is not installed")
    first, second = (Hub(f"allenai/c4:en@{x * 40}", tmp_path) for x in "ab")
    assert first.fingerprint("train") != second.fingerprint("train")


def test_bad_documents_are_named_or_skipped(repository, tmp_path):
    write_shard(repository / "en" / "c4-train.00000-of-00002.json.gz", ["a", " ", "b"])
    hub = Hub(f"{repository}:en", tmp_path)
    with pytest.raises(DataError, match="train, document 2: an empty document"):
        list(hub.documents("train", BadLines(skip=False)))
    bad = BadLines(skip=True)
    assert len(list(hub.documents("train", bad))) == 12
    assert bad.count == 1


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_file_of_both_splits_is_refused(repository, tmp_path, split):
    hub = Hub(f"{repository}:both", tmp_path)
    message = (
        r"both: .*c4-validation.00000-of-00001.json.gz is both in train and in val"
    )
    with pytest.raises(DataError, match=message):
        list(hub.documents(split, BadLines(skip=True)))
    (repository / "README.md").unlink()  # Then names decide.
    (repository / "en" / "train_validation.json.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"train_validation.json.gz is both in train"):
        list(Hub(str(repository), tmp_path).documents(split, BadLines(skip=True)))


def test_its_names_are_in_the_fingerprint(repository, tmp_path):
    hub = Hub(f"{repository}:en", tmp_path)
    before = hub.fingerprint("train")
    shard = repository / "en" / "c4-train.00001-of-00002.json.gz"
    shard.rename(shard.with_name("c4-unused.json.gz"))  # In the same order.
    assert hub.fingerprint("train") != before


@pytest.mark.parametrize("content", [b"", gzip.compress(b"")], ids=["bytes", "text"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_file_without_documents_is_named_or_skipped(
    repository, tmp_path, content, number
):
    name = f"c4-train.0000{number}-of-00002.json.gz"
    (repository / "en" / name).write_bytes(content)
    hub = Hub(f"{repository}:en", tmp_path)
    with pytest.raises(DataError, match=f"train, .*/{name}: no document"):
        list(hub.documents("train", BadLines(skip=False)))
    bad = BadLines(skip=True)
    assert len(list(hub.documents("train", bad))) == (10 if number == 0 else 20)
    assert bad.count == 1


def test_a_file_that_ends_early_is_refused(repository, tmp_path):
    shard = repository / "en" / "c4-train.00001-of-00002.json.gz"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(DataError, match="train, after document 20: "):
        list(Hub(f"{repository}:en", tmp_path).documents("train", BadLines(True)))


def test_what_datasets_refuses_is_said_with_its_place(repository, tmp_path):
    shard = repository / "en" / "c4-train.00001-of-00002.json.gz"
    shard.write_bytes(gzip.compress(b"{oops\n"))
    hub = Hub(f"{repository}:en", tmp_path)
    with pytest.raises(DataError, match=r"c4:en, train, after document 20: "):
        list(hub.documents("train", BadLines(skip=True)))
    with pytest.raises(DataError, match=r"c4:x, train, after document 0: .*x"):
        list(Hub(f"{repository}:x", tmp_path).documents("train", BadLines(False)))
    other = Hub(f"{repository}:other", tmp_path)
    with pytest.raises(DataError, match=r"validation, after document 0: .*validation"):
        list(other.documents("validation", BadLines(False)))
    with pytest.raises(DataError, match="not like owner/name:config@revision"):
        Hub("a:b:c", tmp_path)
    with pytest.raises(DataError, match="c4 is a folder, without revisions"):
        Hub(f"{repository}:en@main", tmp_path)


def test_without_datasets_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install '\.\[hub\]'"):
        Hub("allenai/c4:en", tmp_path)
