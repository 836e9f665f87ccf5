"""The token cache is correct, complete, bounded, and shared by processes."""

import io
import json
import os
import pickle
import resource
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from examples.llama import files
from examples.llama.data import progress as progress_module
from examples.llama.data import token_cache
from examples.llama.data.documents import DataError, Document
from examples.llama.data.progress import TokenisingProgress
from examples.llama.data.token_cache import Limit, tokenise
from examples.llama.data.tokenizers import ByteTokenizer


class Given:
    """Given documents, which counts how many are read."""

    name = "given"

    def __init__(self, texts):
        self._texts, self.read = texts, 0

    def fingerprint(self, split):
        return str(hash(tuple(self._texts)))

    def documents(self, split, bad):
        for text in self._texts:
            self.read += 1
            yield Document(text, self.read / len(self._texts))


def tokens_of(source, cache, limit=None, tokenizer=None, **more):
    progress = TokenisingProgress("text", Console(quiet=True))
    tokenizer = tokenizer or ByteTokenizer()
    limit = limit or Limit()
    return tokenise(source, "train", tokenizer, limit, cache, progress, **more)


def test_documents_are_joined_by_an_end_of_text(tmp_path):
    tokens = tokens_of(Given(["ab", "c", "é"]), tmp_path)
    assert tokens.ids[:].tolist() == [97, 98, 256, 99, 256, 0xC3, 0xA9, 256]
    assert tokens.ends[:].tolist() == [3, 5, 8]
    assert tokens.ids[:].dtype == np.uint16


def test_it_is_done_once(tmp_path):
    source = Given(["ab", "c"])
    first = tokens_of(source, tmp_path)
    again = tokens_of(source, tmp_path)
    assert source.read == 2
    np.testing.assert_array_equal(first.ids[:], again.ids[:])
    tokens_of(Given(["ab", "d"]), tmp_path)
    tokens_of(source, tmp_path, Limit(1))
    other = ByteTokenizer()
    other.fingerprint = "another"
    tokens_of(source, tmp_path, tokenizer=other)
    assert len(list(tmp_path.iterdir())) == 4
    assert source.read == 5  # Of two documents, the limit needs one.


def test_a_large_vocabulary_has_wide_ids(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size = reach = 2**16 + 1
        end_of_text = 2**16
        end = (end_of_text,)

    tokens = tokens_of(Given(["a"]), tmp_path, tokenizer=Wide())
    assert tokens.ids[:].tolist() == [97, 2**16]


@pytest.mark.parametrize("at_once", [20, 1_000_000])
def test_reading_stops_at_the_limit(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(token_cache, "_CHARACTERS_AT_ONCE", at_once)
    source = Given(["x" * 10] * 1000)
    assert len(tokens_of(source, tmp_path, Limit(95)).ends) == 10
    assert source.read == 10
    cut = Limit(tokens=12, per_document=4)
    assert len(tokens_of(Given(["x" * 10] * 9), tmp_path, cut).ends) == 3


def test_the_text_is_never_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "_CHARACTERS_AT_ONCE", 100)
    sizes = []

    class Watched(ByteTokenizer):
        def encode(self, texts):
            sizes.append(sum(map(len, texts)))
            return super().encode(texts)

    tokens = tokens_of(Given(["x" * 30] * 100), tmp_path, tokenizer=Watched())
    assert max(sizes) <= 130
    assert len(tokens.ids) == 3100


def test_what_is_interrupted_is_done_again(tmp_path):
    class Failing(Given):
        def documents(self, split, bad):
            yield from super().documents(split, bad)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokens_of(Failing(["ab", "c"]), tmp_path)
    assert not list(tmp_path.iterdir())
    assert len(tokens_of(Given(["ab", "c"]), tmp_path).ids) == 5


def killed(*_):
    """Ends as by SIGKILL, without any cleanup."""
    raise SystemExit


@pytest.mark.parametrize(
    "fails", [(os, "fsync"), (Path, "rename")], ids=["writing", "naming"]
)
def test_what_a_killed_writer_left_is_never_read(tmp_path, monkeypatch, fails):
    source = Given(["ab", "c"])
    with monkeypatch.context() as context:
        context.setattr(token_cache.shutil, "rmtree", lambda *_, **__: None)
        context.setattr(*fails, killed)
        with pytest.raises(SystemExit):
            tokens_of(source, tmp_path)
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".part"
    assert len(tokens_of(source, tmp_path).ids) == 5
    assert left.exists()  # It might still be written to.
    (folder,) = (path for path in tmp_path.iterdir() if path != left)
    folder.rename(tmp_path / "away")
    for path in (left, *left.iterdir()):
        os.utime(path, (0, 0))
    tokens_of(source, tmp_path)
    assert not left.exists()


def test_several_may_write_the_same(tmp_path):
    """All start before one has finished."""
    count, found = 4, []
    barrier = threading.Barrier(count, timeout=60)

    class Together(Given):
        def documents(self, split, bad):
            barrier.wait()
            yield from super().documents(split, bad)
            barrier.wait()

    def work():
        found.append(tokens_of(Together(["ab", "c"]), tmp_path).ids[:].tolist())

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[97, 98, 256, 99, 256]] * count
    assert len(list(tmp_path.iterdir())) == 1


FILES = ["ids.bin", "ends.bin", "meta.json", "digests.json"]


def halved(content):
    return content[: len(content) // 2]


def with_a_flipped_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def emptied(content):
    return b""


@pytest.mark.parametrize("damage", [halved, with_a_flipped_bit, emptied])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_one_is_named(tmp_path, file, damage):
    source = Given(["ab", "c"])
    tokens_of(source, tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(DataError, match=f"{folder.name}: damaged.*remove the folder"):
        tokens_of(source, tmp_path)
    shutil.rmtree(folder)
    assert tokens_of(source, tmp_path).ids[:].tolist() == [97, 98, 256, 99, 256]


@pytest.mark.parametrize("file", FILES)
def test_one_with_a_file_missing_is_named(tmp_path, file):
    source = Given(["ab", "c"])
    tokens_of(source, tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / file).unlink()
    with pytest.raises(DataError, match=f"{folder.name}: damaged: .*{file}"):
        tokens_of(source, tmp_path)


def test_a_file_in_its_place_is_named(tmp_path):
    source = Given(["ab", "c"])
    tokens_of(source, tmp_path)
    (folder,) = tmp_path.iterdir()
    shutil.rmtree(folder)
    folder.touch()
    with pytest.raises(DataError, match=f"{folder.name}: damaged.*Not a directory"):
        tokens_of(source, tmp_path)


META = {"documents": 2, "tokens": 5, "bad_lines": 0, "first_bad_lines": []}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("ids.bin", np.asarray([97, 98, 257, 99, 256], "<u2"), "the id 257"),
        ("ends.bin", np.asarray([5, 3], "<i8"), "ends before it begins"),
        ("ends.bin", np.asarray([0, 5], "<i8"), "ends before it begins"),
        ("ends.bin", np.asarray([3, 3, 5], "<i8"), "ends before it begins"),
        ("ends.bin", np.asarray([-3, 5], "<i8"), "ends before it begins"),
        ("ends.bin", np.asarray([3, 6], "<i8"), "not of the same text"),
        ("ends.bin", np.asarray([2, 3, 5], "<i8"), "not of the same text"),
        ("meta.json", json.dumps([META]).encode(), "list indices"),
        ("meta.json", b"{}", "documents|tokens"),
        ("meta.json", b"3", "not subscriptable"),
        ("meta.json", json.dumps(META | {"tokens": "5"}).encode(), "same text"),
        ("meta.json", json.dumps(META | {"tokens": 6}).encode(), "same text"),
        ("meta.json", b"\xff", "decode"),
        ("meta.json", b"[" * 200_000, "recursion"),
        ("digests.json", b"[" * 200_000, "recursion"),
        ("digests.json", b"[]", "not what was written"),
    ],
    ids=lambda x: str(x)[:12] if isinstance(x, str) else "",
)
def test_one_that_was_made_wrong_is_named(tmp_path, file, content, message):
    """Its digests are correct, and its content is not."""
    source = Given(["ab", "c"])
    tokens_of(source, tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / file).write_bytes(bytes(content))
    if file != "digests.json":
        (folder / "digests.json").unlink()
        digests = json.dumps(files.digests(folder))
        (folder / "digests.json").write_text(digests)
    with pytest.raises(DataError, match=rf"{folder.name}: damaged: .*({message})"):
        tokens_of(source, tmp_path)


def test_an_id_beyond_the_vocabulary_is_never_written(tmp_path):
    class Small(ByteTokenizer):
        reach = 99  # Of 257, most of them for special tokens.
        end_of_text = 98
        end = (end_of_text,)

    assert len(tokens_of(Given(["ab"]), tmp_path, tokenizer=Small()).ids) == 3
    with pytest.raises(DataError, match="the id 99, where texts get 99 ids alone"):
        tokens_of(Given(["abc"]), tmp_path, tokenizer=Small())
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("space", "texts", "file"),
    [
        (8192, ["x" * 8000], "ids.bin"),
        (8192, ["x"] * 1500, "ends.bin"),
        (64, ["x"], "meta.json"),
    ],
    ids=FILES[:3],
)
def test_a_full_disk_names_the_file(tmp_path, space, texts, file):
    """A limit on the size of files makes writing fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (space, hard))
    try:
        with pytest.raises(OSError, match=rf"File too large: .*\.part/{file}'"):
            tokens_of(Given(texts), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_an_array_is_opened_where_it_is_sent(tmp_path):
    tokens = tokens_of(Given(["ab" * 1000]), tmp_path)
    sent = pickle.dumps(tokens.ids)
    assert len(sent) < 500
    np.testing.assert_array_equal(pickle.loads(sent)[:], tokens.ids[:])


def test_what_it_says_of_itself(tmp_path):
    tokens_of(Given(["ab", "c"]), tmp_path)
    (folder,) = tmp_path.iterdir()
    meta = json.loads((folder / "meta.json").read_text())
    assert meta == {
        "documents": 2,
        "tokens": 5,
        "dtype": "<u2",
        "bad_lines": 0,
        "first_bad_lines": [],
    }


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_seen(tmp_path, monkeypatch, terminal):
    monkeypatch.setattr(token_cache, "_CHARACTERS_AT_ONCE", 2)
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", -1)
    output = io.StringIO()
    console = Console(file=output, width=120, force_terminal=terminal)
    progress = TokenisingProgress("text", console)
    source = Given(["ab", "c", "de", "f"])
    tokenise(source, "train", ByteTokenizer(), Limit(), tmp_path, progress)
    printed = output.getvalue()
    assert "tokenised the text: 4 documents, 10 tokens in " in printed
    if not terminal:
        assert "tokenising the text (25%): 1 documents, 3 tokens" in printed
        assert "\r" not in printed
