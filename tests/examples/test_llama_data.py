"""Sources of text, their errors, and the settings that choose them."""

import io

import numpy as np
import pytest
from conftest import write_shard
from rich.console import Console

from examples.llama.config import DataConfig
from examples.llama.data.documents import BadLines, DataError
from examples.llama.data.library import StandardLibrary
from examples.llama.data.shards import Shards
from examples.llama.data.text import Text, open_source, open_text, read_texts
from examples.llama.data.tokenizers import ByteTokenizer

QUIET = Console(quiet=True)
SPLITS = ("train", "validation")


def texts_of(source):
    return [list(read_texts(source, split)) for split in SPLITS]


def test_standard_library_is_divided_by_name(tmp_path):
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "test").mkdir()
    topics = {f"topic{i}": f"About {i}.\n" for i in range(20)}
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}\n")
    (tmp_path / "test" / "test_a.py").write_text("left out\n")
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\n# \xe9\n")
    for i in range(60):
        (tmp_path / f"module{i}.py").write_text(f"x = {i // 2}\n")  # each text twice
    train, held_out = texts_of(StandardLibrary(tmp_path))
    texts = train + held_out
    expected = {f"x = {i}\n" for i in range(30)} | set(topics.values())
    expected |= {"# coding: latin-1\n# é\n"}
    assert len(texts) == len(set(texts)) == 51
    assert set(texts) == expected
    assert 1 <= len(held_out) <= 8

    # Another file moves no document from one part to the other.
    before = StandardLibrary(tmp_path).fingerprint("train")
    (tmp_path / "zz.py").write_text("y = 1\n")
    more_train, more_held_out = texts_of(StandardLibrary(tmp_path))
    assert set(train) <= set(more_train)
    assert set(held_out) <= set(more_held_out)
    changed = StandardLibrary(tmp_path).fingerprint("train") != before
    assert changed == (train != more_train)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.py", b"# \xe9\n"),
        ("odd.py", b"# coding: odd\n"),
        ("pydoc_data/topics.py", b"topics = {"),
        ("pydoc_data/topics.py", b"topics = {'a': b}"),
    ],
)
def test_a_file_of_the_library_that_cannot_be_read_is_named_or_skipped(
    tmp_path, name, content
):
    for i in range(60):
        (tmp_path / f"module{i}.py").write_text(f"x = {i}\n")
    before = {split: StandardLibrary(tmp_path).fingerprint(split) for split in SPLITS}
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    library, skipping = StandardLibrary(tmp_path), BadLines(skip=True)
    with pytest.raises(DataError, match=f"{name}: not Python that can be read"):
        texts_of(library)
    found = [x for split in SPLITS for x in library.documents(split, skipping)]
    assert (len(found), skipping.count) == (60, 1)
    changed = [library.fingerprint(split) != before[split] for split in SPLITS]
    assert sum(changed) == 1


def test_the_running_python_has_enough_to_learn_from():
    library = StandardLibrary()
    train, held_out = (sum(map(len, part)) for part in texts_of(library))
    assert train > 3e6
    assert 6e4 < held_out < 0.15 * train
    assert StandardLibrary().fingerprint("train") == library.fingerprint("train")


def test_shards_are_read_in_order_and_limited(text_folder, tmp_path):
    config = DataConfig(text_folder, seq_len=32, eval_tokens=100, cache=tmp_path)
    text = open_text(config, QUIET)
    data = text.load()
    corpus = texts_of(open_source(config))
    assert [len(part) for part in corpus] == [100, 4]
    assert bytes(data.train[0].inputs.tolist()).decode() == corpus[0][0][:32]
    assert text.vocab_size == 257
    assert data.tokens == sum(len(text) + 1 for text in corpus[0])
    assert sum(data.held_out[i].mask.sum() for i in range(len(data.held_out))) == 100


def test_few_training_tokens_are_the_first_ones(text_folder, tmp_path):
    config = DataConfig(text_folder, seq_len=8, train_tokens=1000, cache=tmp_path)
    data = open_text(config, QUIET).load()
    assert 1000 < data.tokens < 1400
    whole = open_text(DataConfig(text_folder, seq_len=8, cache=tmp_path), QUIET)
    np.testing.assert_array_equal(data.train[50], whole.load().train[50])
    assert open_text(config, QUIET).fingerprint != whole.fingerprint


def test_one_per_row_counts_what_a_row_can_hold(text_folder, tmp_path):
    config = DataConfig(
        text_folder,
        seq_len=50,
        train_tokens=1000,
        batching="one-per-row",
        cache=tmp_path,
    )
    data = open_text(config, QUIET).load()
    assert len(data.train) == 20  # Documents of 200 bytes, 50 of each.


def test_the_fingerprint_follows_all_that_decides_the_tokens(text_folder, tmp_path):
    def fingerprint(folder=text_folder, **settings):
        config = DataConfig(folder, cache=tmp_path / "cache", **settings)
        return open_text(config, QUIET).fingerprint

    same = fingerprint()
    assert same == fingerprint(seq_len=9, batch_size=3, workers=2)
    others = {
        fingerprint(eval_tokens=99),
        fingerprint(train_tokens=99),
        fingerprint(tokenizer="bpe", vocab_size=280),
        fingerprint(tokenizer="bpe", vocab_size=290),
    }
    write_shard(tmp_path / "c4-train.json.gz", ["one"])
    write_shard(tmp_path / "c4-validation.json.gz", ["two"])
    others.add(fingerprint(tmp_path))
    write_shard(tmp_path / "c4-validation.json.gz", ["three"])
    others.add(fingerprint(tmp_path))
    assert len(others | {same}) == 7


def test_missing_or_short_text_is_named(tmp_path, text_folder):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        Shards(tmp_path / "nowhere", tmp_path)
    with pytest.raises(DataError, match=r"no \*train\*\.json\.gz shard"):
        Shards(tmp_path, tmp_path).fingerprint("train")
    write_shard(tmp_path / "c4-train.0.json.gz", ["fine"])
    write_shard(tmp_path / "c4-validation.0.json.gz", ["x"])
    config = DataConfig(tmp_path, seq_len=2, eval_tokens=1, cache=tmp_path / "cache")
    assert len(open_text(config, QUIET).load().held_out) == 1
    config = DataConfig(text_folder, seq_len=99_999, cache=tmp_path)
    with pytest.raises(DataError, match="seq_len 99999 needs 100000"):
        open_text(config, QUIET).load()


def test_held_out_text_alone_can_be_measured_on(tmp_path):
    write_shard(tmp_path / "c4-validation.0.json.gz", ["fine"])
    text = open_text(DataConfig(tmp_path, seq_len=4, cache=tmp_path), QUIET)
    assert text.held_out().rows[0].mask.sum() == 4
    with pytest.raises(DataError, match=r"no \*train\*\.json\.gz shard"):
        text.load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 0}, "`data.seq_len` must be at least 1, got 0"),
        ({"batch_size": -1}, "`data.batch_size` must be at least 1"),
        ({"vocab_size": 0}, "`data.vocab_size` must be at least 1, got 0"),
        ({"train_tokens": 0}, "`data.train_tokens` must be at least 1"),
        ({"workers": -1}, "`data.workers` must be 0 or more"),
        (
            {"tokenizer": "bpe"},
            "`data.tokenizer: bpe` needs a `data.vocab_size` of at least 257",
        ),
        ({"tokenizer": "bpe", "vocab_size": 256}, "at least 257"),
        (
            {"tokenizer": "bytes"},
            "`data.tokenizer: bytes` is neither byte, bpe, a .model nor",
        ),
        ({"hub": "allenai/c4:en"}, "`data.hub` needs `data.train_tokens`"),
        ({"hub": "allenai/c4:en", "path": "c4"}, "two texts"),
    ],
)
def test_impossible_data_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_a_cache_that_is_a_file_is_named(tmp_path, text_folder):
    (tmp_path / "cache").touch()
    with pytest.raises(DataError, match=r"`data.cache: .*/cache`: not a folder"):
        open_text(DataConfig(text_folder, cache=tmp_path / "cache"), QUIET)


@pytest.mark.parametrize("batching", ["packed", "one-per-row"])
def test_text_that_the_tokenizer_drops_is_refused(tmp_path, text_folder, batching):
    class Deaf(ByteTokenizer):
        begin: tuple[int, ...] = (7, 8)

        def encode(self, texts):
            return (np.empty(0, np.uint8) for _ in texts)

    config = DataConfig(text_folder, batching=batching, cache=tmp_path)
    text = Text(config, open_source(config), Deaf(), QUIET)
    for part, what in ((text.train, "training"), (text.held_out, "held-out")):
        with pytest.raises(DataError, match=f"no ids for any of the {what} text"):
            part()


@pytest.mark.parametrize("file", ["tokenizer.json", "fingerprint"])
@pytest.mark.parametrize("damage", ["changed", "emptied", "removed"])
def test_a_damaged_bpe_is_named_or_trained_again(tmp_path, text_folder, file, damage):
    cache = tmp_path / "cache"
    config = DataConfig(text_folder, tokenizer="bpe", vocab_size=260, cache=cache)
    expected = open_text(config, QUIET).tokenizer.fingerprint
    assert open_text(config, QUIET).tokenizer.fingerprint == expected
    (folder,) = cache.glob("bpe-*")
    content = (folder / file).read_bytes()
    if damage == "removed":
        (folder / file).unlink()
    else:
        changed = content.replace(b"1", b"2", 1) if damage == "changed" else b""
        (folder / file).write_bytes(changed)
    if (file, damage) == ("fingerprint", "removed"):  # Its writer was killed.
        assert open_text(config, QUIET).tokenizer.fingerprint == expected
        return
    with pytest.raises(DataError, match=f"{folder.name}: damaged: .*remove the folder"):
        open_text(config, QUIET)


def test_genuine_c4(shared_data, tmp_path):
    output = io.StringIO()
    config = DataConfig(shared_data / "c4", eval_tokens=1000, cache=tmp_path)
    data = open_text(config, Console(file=output, width=200)).load()
    train, held_out = texts_of(open_source(config))
    assert [len(train), len(held_out)] == [4775, 200]
    assert data.tokens == sum(len(text.encode()) + 1 for text in train)
    assert "training text: 4,775 documents" in output.getvalue()
