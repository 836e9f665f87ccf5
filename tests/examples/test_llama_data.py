"""Text, tokens and batches."""

import gzip
import itertools
import json

import numpy as np
import pytest

from examples.llama.config import DataConfig
from examples.llama.corpus import DataError, json_shards, standard_library
from examples.llama.data import (
    Rows,
    TextData,
    held_out_batches,
    join,
    load_text,
    train_batches,
)
from examples.llama.tokenizer import ByteTokenizer, train_bpe

TOKENS = np.arange(1000, dtype=np.uint16)


def test_documents_are_joined_by_an_end_of_text():
    stream = join(["ab", "", "é"], ByteTokenizer())
    assert stream.tolist() == [97, 98, 256, 256, 0xC3, 0xA9, 256]


def test_every_token_is_predicted_once_per_epoch():
    rows = Rows(TOKENS, seq_len=9)
    assert len(rows) == 111
    targets = np.concatenate([rows[i].targets for i in range(len(rows))])
    np.testing.assert_array_equal(targets, TOKENS[1:])


def test_a_batch_depends_on_seed_and_step_alone():
    def batches(seed, steps):
        batches = train_batches(TOKENS, seq_len=9, batch_size=4, seed=seed)
        return [batches[step].inputs for step in steps]

    in_order = batches(3, range(60))
    assert in_order[0].shape == (4, 9)
    assert in_order[0].dtype == np.int32
    some = (59, 0, 31)  # in any order, from a fresh data set
    np.testing.assert_array_equal(batches(3, some), [in_order[step] for step in some])
    assert not np.array_equal(batches(4, [0])[0], in_order[0])
    starts = np.concatenate(in_order)[:, 0]
    assert len(set(starts[:111])) == 111  # an epoch without repetition
    assert not np.array_equal(starts[:111], starts[111:222])  # the next in new order


@pytest.mark.parametrize("count", [2, 36, 37, 38, 100])
def test_held_out_tokens_are_each_a_target_once(count):
    batches = list(held_out_batches(TOKENS[:count], seq_len=9, batch_size=4))
    assert {part.shape for batch in batches for part in batch} == {(4, 9)}
    real = [batch.targets[batch.mask == 1] for batch in batches]
    np.testing.assert_array_equal(np.concatenate(real), TOKENS[1:count])
    inputs = [batch.inputs[batch.mask == 1] for batch in batches]
    np.testing.assert_array_equal(np.concatenate(inputs), TOKENS[: count - 1])


def test_standard_library_is_divided_by_name(tmp_path):
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "test").mkdir()
    topics = {f"topic{i}": f"About {i}.\n" for i in range(20)}
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}\n")
    (tmp_path / "test" / "test_a.py").write_text("left out\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    for i in range(60):
        (tmp_path / f"module{i}.py").write_text(f"x = {i // 2}\n")  # each text twice
    corpus = standard_library(tmp_path)
    texts = corpus.train + corpus.held_out
    expected = {f"x = {i}\n" for i in range(30)} | set(topics.values())
    assert len(texts) == len(set(texts)) == 50
    assert set(texts) == expected
    assert 1 <= len(corpus.held_out) <= 8

    # Another file moves no document from one part to the other.
    (tmp_path / "zz.py").write_text("y = 1\n")
    more = standard_library(tmp_path)
    assert set(corpus.train) <= set(more.train)
    assert set(corpus.held_out) <= set(more.held_out)


def test_the_running_python_has_enough_to_learn_from():
    corpus = standard_library()
    train, held_out = (sum(map(len, part)) for part in corpus)
    assert train > 3e6
    assert 6e4 < held_out < 0.15 * train
    assert corpus == standard_library()


def test_shards_are_read_in_order_and_limited(text_folder, tmp_path):
    config = DataConfig(text_folder, seq_len=32, eval_tokens=100)
    data = load_text(config, tmp_path)
    corpus = json_shards(text_folder)
    assert [len(part) for part in corpus] == [100, 4]
    assert bytes(data.train[:50].tolist()).decode() == corpus.train[0][:50]
    assert data.vocab_size == 257
    assert len(data.held_out) == 101


def test_fingerprint_follows_the_tokens():
    def fingerprint(train, held_out):
        streams = (np.asarray(x, np.uint16) for x in (train, held_out))
        return TextData(*streams, vocab_size=9).fingerprint()

    assert fingerprint([1, 2], [3]) == fingerprint([1, 2], [3])
    assert fingerprint([1, 2], [3]) != fingerprint([1, 2], [4])
    assert fingerprint([1, 2], [3]) != fingerprint([1], [2, 3])


def break_shard(folder, content: bytes):
    path = folder / "c4-train.0.json.gz"
    path.write_bytes(content)
    good = gzip.compress(json.dumps({"text": "fine"}).encode())
    (folder / "c4-validation.0.json.gz").write_bytes(good)


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(GOOD + b"{oops\n"), "line 2: not JSON"),
        (gzip.compress(GOOD + b'{"url": "x"}\n'), 'line 2: no "text" field'),
        (gzip.compress(GOOD + b"[1]\n"), 'line 2: no "text" field'),
        (gzip.compress(GOOD + b'{"text": 3}\n'), 'line 2: no "text" field'),
        (gzip.compress(GOOD * 999)[:-9], "broken gzip"),
        (b"plain text", "line 1: broken gzip"),
        (gzip.compress(b"\xff\n"), "line 1: not UTF-8"),
    ],
    # Of the content itself pytest would make names that hold the time of compression.
    ids=["not json", "no text", "list", "number", "cut off", "plain", "latin-1"],
)
def test_unreadable_shards_name_file_and_line(tmp_path, content, message):
    break_shard(tmp_path, content)
    with pytest.raises(DataError, match=f"c4-train.0.json.gz.*{message}"):
        json_shards(tmp_path)


def test_missing_or_empty_text_is_named(tmp_path, text_folder):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        json_shards(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no \*train\*\.json\.gz shard"):
        json_shards(tmp_path)
    break_shard(tmp_path, gzip.compress(b"\n"))
    with pytest.raises(DataError, match="hold no text"):
        json_shards(tmp_path)
    with pytest.raises(DataError, match="seq_len 99999 needs 100000"):
        load_text(DataConfig(text_folder, seq_len=99_999), tmp_path)


def test_bpe_gives_the_text_back_and_is_cached(tmp_path, text_folder):
    texts = json_shards(text_folder).train
    tokenizer = train_bpe(texts, 290, tmp_path)
    assert tokenizer.vocab_size == 290
    sample = ["the old dog <|endoftext|> naïve\n", "", "the cat"]
    ids = list(tokenizer.encode(sample))
    assert [tokenizer.decode(x) for x in ids] == sample
    assert all(tokenizer.end_of_text not in x for x in ids)
    assert len(ids[2]) < len(sample[2])
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    again = train_bpe(texts, 290, tmp_path)
    assert file.stat().st_mtime_ns == written
    pairs = itertools.zip_longest(again.encode(sample), ids)
    assert all(np.array_equal(a, b) for a, b in pairs)
    train_bpe(texts[:50], 290, tmp_path)  # other text, another file
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        ({"vocab_size": 300}, "vocab_size is for --tokenizer bpe only"),
        ({"tokenizer": "bpe"}, "needs a vocab_size of at least 257"),
        ({"tokenizer": "bpe", "vocab_size": 256}, "at least 257"),
    ],
)
def test_impossible_data_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_genuine_c4(shared_data, tmp_path):
    corpus = json_shards(shared_data / "c4")
    assert [len(part) for part in corpus] == [4775, 200]
    data = load_text(DataConfig(shared_data / "c4", eval_tokens=1000), tmp_path)
    sizes = [len(text.encode()) + 1 for text in corpus.train]
    assert len(data.train) == sum(sizes)
    assert (data.train == 256).sum() == 4775
