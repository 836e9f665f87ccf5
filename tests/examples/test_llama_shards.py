"""Files of text: which are read, and their errors."""

import errno
import gzip
import hashlib
import json
import os
import shutil

import pytest
from conftest import write_shard
from rich.console import Console

from examples.llama.config import DataConfig
from examples.llama.data.documents import BadLines, DataError
from examples.llama.data.shards import Shards, digest_of
from examples.llama.data.text import open_text, read_texts

QUIET = Console(quiet=True)


def texts_of(folder):
    shards = Shards(folder, folder / "memory")
    return [list(read_texts(shards, split)) for split in ("train", "validation")]


def write_shards(folder, *names):
    """Writes shards with one document each, the name of the shard."""
    for name in names:
        write_shard(folder / f"{name}.json.gz", [name])


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("pretrain_train", "pretrain_validation"),
        ("c4-train.00000-of-01024", "c4-validation.00000-of-00008"),
        ("Train", "VALIDATION"),
        ("a.train2", "trained_validation.2"),
        ("train-invalidation", "pretraining validation"),
    ],
)
def test_each_file_is_of_the_split_that_its_name_has_as_a_word(
    tmp_path, train, held_out
):
    write_shards(tmp_path, train, held_out)
    assert texts_of(tmp_path) == [[train], [held_out]]


@pytest.mark.parametrize(
    ("name", "has"),
    [
        ("train_validation", "both train and validation"),
        ("pretrain", "neither train nor validation"),
        ("test", "neither train nor validation"),
    ],
)
def test_a_file_of_no_split_or_of_both_is_named(tmp_path, name, has):
    write_shards(tmp_path, "a-train", "a-validation", name)
    for split in ("train", "validation"):
        with pytest.raises(DataError, match=rf"/{name}\.json\.gz: .* {has} as a word"):
            Shards(tmp_path, tmp_path).fingerprint(split)


def test_a_file_in_both_splits_is_named(tmp_path):
    write_shards(tmp_path, "a-train", "b-train", "a-validation")
    Shards(tmp_path, tmp_path).fingerprint("train")
    shutil.copyfile(tmp_path / "a-train.json.gz", tmp_path / "b-validation.json.gz")
    for split in ("train", "validation"):
        with pytest.raises(DataError, match=r"must not be trained on") as error:
            Shards(tmp_path, tmp_path).fingerprint(split)
        for name in ("a-train", "b-validation"):
            assert f"{name}.json.gz" in str(error.value)


def test_what_others_leave_beside_the_shards_is_no_data(tmp_path):
    names = [f"c4-train.{number:05}-of-00002" for number in (0, 1)]
    write_shards(tmp_path, *names, "c4-validation")
    expected = texts_of(tmp_path)
    assert expected == [names, ["c4-validation"]]
    for name in (
        f"._{names[0]}.json.gz",
        ".pretrain.json.gz",
        f"{names[0]} (1).json.gz",
        f"{names[0]}(2).json.gz",
        f"{names[1]} copy.json.gz",
        f"{names[1]} copy 2.json.gz",
        f"{names[1]} - Copy.json.gz",
        f"{names[1]} - Copy (2).json.gz",
        f"Copy of {names[1]}.json.gz",
        "c4-validation (1).json.gz",
        f"{names[1]}.json.gz.bak",
        f"{names[1]}.json.gz.part",
        f"{names[1]}.json.gz~",
        f"#{names[1]}.json.gz#",
        "c4-train.00003-of-00002.json.gz.1",
    ):
        write_shard(tmp_path / name, ["left over"])
    assert texts_of(tmp_path) == expected
    write_shard(tmp_path / "b-train (1).json.gz", ["the only one of its name"])
    with pytest.raises(DataError, match=r"b-train \(1\)\.json\.gz: .* copy of b-train"):
        texts_of(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((0, 1, 3), r"/c4-train\.00002-of-00009\.json\.gz: missing, though .*00003"),
        ((1,), r"/c4-train\.00000-of-00009\.json\.gz: missing, though .*00001"),
        ((0, 2, "other-train"), r"/c4-train\.00001-of-00009\.json\.gz: missing"),
        (
            (0, "c4-train.00001-of-00512"),
            r"00001-of-00512.*one of 00512 .*one of 00009",
        ),
        ((0, "c4-train-00000-of-00009"), r"00000-of-00009.*has the same number"),
        ((*range(9), 9), r"/c4-train\.00009-of-00009\.json\.gz: numbers go from"),
    ],
)
def test_numbers_that_are_not_those_of_one_data_set(tmp_path, names, message):
    write_shards(
        tmp_path,
        *(x if isinstance(x, str) else f"c4-train.{x:05}-of-00009" for x in names),
    )
    with pytest.raises(DataError, match=message):
        Shards(tmp_path, tmp_path).fingerprint("train")


def test_the_last_shards_may_be_missing(tmp_path):
    names = [f"c4-train.{number:05}-of-00009" for number in range(3)]
    write_shards(tmp_path, *names, "c4-validation.00000-of-00001")
    assert texts_of(tmp_path)[0] == names


def make_folder(path):
    path.mkdir()


def make_pipe(path):
    os.mkfifo(path)


def make_dangling(path):
    path.symlink_to("nowhere")


def make_empty(path):
    path.touch()


def holding(content):
    return lambda path: path.write_bytes(gzip.compress(content))


NO_FILE, EMPTY = "not a regular file", "an empty file, so a gzip file that ends early"


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_folder, NO_FILE),
        (make_pipe, NO_FILE),
        (make_dangling, NO_FILE),
        (make_empty, EMPTY),
        (holding(b""), "no document in it"),
        (holding(b"\n \n"), "no document in it, its lines are all blank"),
    ],
    ids=["folder", "pipe", "dangling", "no bytes", "no text", "blank"],
)
def test_a_shard_that_gives_nothing_is_named(tmp_path, make, message, skip):
    names = [f"c4-train.{number:05}-of-00003" for number in range(3)]
    write_shards(tmp_path, names[0], names[2], "c4-validation")
    make(tmp_path / f"{names[1]}.json.gz")
    config = DataConfig(tmp_path, skip_bad_lines=skip, cache=tmp_path / "cache")
    with pytest.raises(DataError, match=f"/{names[1]}.json.gz: {message}"):
        open_text(config, QUIET).load()
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_shard_of_bad_lines_alone_is_named(tmp_path):
    holding(b'{"text": " "}\n[1]\n')(tmp_path / "a-train.json.gz")
    bad = BadLines(skip=True)
    message = r'train.json.gz: no document in it, .* bad \(line 2: no "text" field'
    with pytest.raises(DataError, match=message):
        list(Shards(tmp_path, tmp_path).documents("train", bad))
    assert bad.count == 2


def test_shards_beyond_a_limit_are_not_read(tmp_path):
    write_shards(tmp_path, "c4-train.00000-of-00002", "c4-validation")
    holding(b"\n")(tmp_path / "c4-train.00001-of-00002.json.gz")
    config = DataConfig(tmp_path, seq_len=4, train_tokens=9, cache=tmp_path / "cache")
    assert open_text(config, QUIET).load().tokens == 24


def test_a_digest_is_computed_again_where_the_file_has_changed(tmp_path):
    file, memory = tmp_path / "file", tmp_path / "memory"
    file.write_text("a")
    first = digest_of(file, memory)
    (note,) = memory.iterdir()
    remembered = "0123456789abcdef" * 4
    note.write_text(remembered)
    assert digest_of(file, memory) == remembered
    file.write_text("ab")
    assert digest_of(file, memory) not in (first, remembered)


@pytest.mark.parametrize("content", [b"", b"0" * 63, b"0" * 64 + b"\n", b"\xff" * 64])
def test_a_note_that_is_no_digest_is_written_again(tmp_path, content):
    file, memory = tmp_path / "file", tmp_path / "memory"
    file.write_text("a")
    expected = hashlib.sha256(b"a").hexdigest()
    assert digest_of(file, memory) == expected
    (note,) = memory.iterdir()
    note.write_bytes(content)
    assert digest_of(file, memory) == expected
    assert note.read_text() == expected


GOOD = b'{"text": "fine"}\n'
BAD_LINES = [
    (b"{oops\n", "not JSON"),
    (b'{"url": "x"}\n', 'no "text" field'),
    (b"[1]\n", 'no "text" field'),
    (b'{"text": 3}\n', 'no "text" field'),
    (b'{"text": " \\n"}\n', "an empty document"),
    (b"\xff\n", "not UTF-8"),
    (b'{"text": "\\ud83d"}\n', "not Unicode text"),
    (b"[" * 200_000 + b"\n", "not JSON that can be read: nested too deeply"),
    (b'{"a":' * 200_000 + b"\n", "not JSON that can be read: nested too deeply"),
    (b'{"text": "fine", "n": ' + b"9" * 5000 + b"}\n", "not JSON: Exceeds the limit"),
]


def break_shard(folder, content: bytes):
    path = folder / "c4-train.0.json.gz"
    path.write_bytes(content)
    write_shard(folder / "c4-validation.0.json.gz", ["fine"])


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=lambda x: str(x)[:12])
def test_a_bad_line_is_named_or_skipped(tmp_path, line, message):
    break_shard(tmp_path, gzip.compress(GOOD + line + b"\n" + GOOD))  # One is blank.
    shards = Shards(tmp_path, tmp_path)
    with pytest.raises(DataError, match=rf"c4-train.0.json.gz, line 2: {message}"):
        list(shards.documents("train", BadLines(skip=False)))
    bad = BadLines(skip=True)
    documents = list(shards.documents("train", bad))
    assert [document.text for document in documents] == ["fine", "fine"]
    assert documents[-1].read == 1
    assert bad.count == 1
    assert f"c4-train.0.json.gz, line 2: {message}" in bad.first[0]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(GOOD * 999)[:-9], r"line \d+: broken gzip"),
        (b"plain text", "line 1: broken gzip"),
        (gzip.compress(GOOD) + b"\x1f\x8b more", "line 2: broken gzip"),
        (gzip.compress(GOOD) + b"x", "line 2: broken gzip"),
        (gzip.compress(GOOD) + gzip.compress(GOOD)[:-1], "line 3: broken gzip"),
        (gzip.compress(GOOD) + gzip.compress(GOOD)[:5], "line 2: broken gzip"),
        (gzip.compress(GOOD)[:-8] + bytes(8), "line 2: broken gzip"),
        (gzip.compress(GOOD)[:10] + b"\xff" * 20, "line 1: broken gzip"),
    ],
    # Of the content itself pytest would make names that hold the time of compression.
    ids=["cut off", "plain", "tail", "byte", "end", "second", "checksum", "bits"],
)
def test_a_broken_file_is_refused_also_where_lines_are_skipped(
    tmp_path, content, message, skip
):
    break_shard(tmp_path, content)
    with pytest.raises(DataError, match=f"c4-train.0.json.gz, {message}"):
        list(Shards(tmp_path, tmp_path).documents("train", BadLines(skip)))


def test_what_memory_does_not_hold_is_named(tmp_path, monkeypatch):
    break_shard(tmp_path, gzip.compress(GOOD * 3))
    shards, loads, bad = Shards(tmp_path, tmp_path), json.loads, BadLines(skip=True)
    lines = iter((loads, exhausted, loads))
    monkeypatch.setattr(json, "loads", lambda line: next(lines)(line))
    assert len(list(shards.documents("train", bad))) == 2
    assert "c4-train.0.json.gz, line 2: too much for the memory" in bad.first[0]
    monkeypatch.setattr(gzip.GzipFile, "readline", exhausted)
    with pytest.raises(DataError, match=r"train.0.json.gz, line 1: too much"):
        list(shards.documents("train", bad))


def exhausted(*_):
    raise MemoryError


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    break_shard(tmp_path, gzip.compress(GOOD))
    shards = Shards(tmp_path, tmp_path)
    with monkeypatch.context() as context:
        context.setattr(hashlib, "file_digest", broken)
        with pytest.raises(OSError, match=r"Input/output error: .*train.0.json.gz"):
            shards.fingerprint("train")
    monkeypatch.setattr(gzip.GzipFile, "readline", broken)
    with pytest.raises(OSError, match=r"Input/output error: .*train.0.json.gz"):
        list(shards.documents("train", BadLines(skip=True)))


def test_skipped_lines_are_reported_also_from_the_cache(tmp_path):
    break_shard(tmp_path, gzip.compress(GOOD * 40 + b"{oops\n" * 7))

    def config(skip):
        return DataConfig(tmp_path, seq_len=4, skip_bad_lines=skip, cache=tmp_path)

    with pytest.raises(
        DataError, match=r"line 41: not JSON.*`data.skip_bad_lines: true` leaves"
    ):
        open_text(config(False), QUIET).load()
    first = open_text(config(True), QUIET).load()
    assert first.tokens == 40 * 5
    assert first.notes[0] == "7 bad lines of the training text left out; the first 5:"
    assert "line 45: not JSON" in first.notes[-1]
    assert open_text(config(True), QUIET).load().notes == first.notes
    # What such a run has left does not hide them from one that wants them all.
    with pytest.raises(
        DataError, match=r"line 41: not JSON.*`data.skip_bad_lines: true` leaves"
    ):
        open_text(config(False), QUIET).load()
