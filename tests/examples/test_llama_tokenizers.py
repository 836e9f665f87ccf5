"""Tokenizers: encoding and decoding, their properties, and errors."""

import json
import os

import numpy as np
import pytest
import sentencepiece
from rich.console import Console
from tokenizers import Tokenizer, models

from examples.llama.config import DataConfig
from examples.llama.data import tokenizers
from examples.llama.data.documents import DataError
from examples.llama.data.text import open_source, open_text, read_texts
from examples.llama.data.tokenizers import (
    ByteTokenizer,
    load_file,
    load_saved,
    model_vocabulary,
    train_bpe,
)
from examples.llama.stop import Terminated
from examples.llama.using import continuation

QUIET = Console(quiet=True)
SAMPLE = ["the old dog sees a bird", "the cat", "and <|endoftext|> </s> the cat"]


@pytest.fixture(scope="module")
def texts(text_folder):
    return list(read_texts(open_source(DataConfig(text_folder)), "train"))


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory, texts):
    """Writes SentencePiece models like T5's and Llama's, and a tokenizer.json."""
    folder = tmp_path_factory.mktemp("models")
    kinds = {
        "t5": {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2}
        | {"bos_id": -1},
        "llama": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 300},
        "endless": {"model_type": "bpe", "eos_id": -1},
    }
    for name, settings in kinds.items():
        with (folder / f"{name}.model").open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=file,
                minloglevel=2,
                **{"vocab_size": 30, **settings},
            )
    train_bpe(texts, 290).save(folder)
    return folder


@pytest.mark.parametrize(
    ("file", "size", "end", "pad"),
    [
        ("t5.model", 30, 1, 0),
        ("llama.model", 300, 2, 2),
        ("tokenizer.json", 290, 0, 0),
    ],
)
def test_a_file_is_a_tokenizer(models_folder, tmp_path, file, size, end, pad):
    tokenizer = load_file(models_folder / file)
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.pad) == (
        size,
        end,
        pad,
    )
    ids = list(tokenizer.encode(SAMPLE))
    assert all(end not in x and (x < size).all() for x in ids)
    assert len(ids[1]) < len(SAMPLE[1])
    # T5's pieces have no "<", so that one is lost.
    lossless = SAMPLE[: 2 if file == "t5.model" else 3]
    assert [tokenizer.decode(x) for x in ids[: len(lossless)]] == lossless
    tokenizer.save(tmp_path)
    again = load_saved(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(next(again.encode(SAMPLE)), ids[0])


@pytest.mark.parametrize("name", ["t5.model", "llama.model", "tokenizer.json"])
def test_what_goes_on_keeps_its_space(models_folder, name):
    tokenizer = load_file(models_folder / name)
    (ids,) = tokenizer.encode(["the old dog sees"])
    ids = ids.tolist()
    for i in range(1, len(ids)):
        begun = tokenizer.decode(ids[:i])
        assert begun + continuation(tokenizer, ids[:i], ids[i:]) == "the old dog sees"
    end = tokenizer.end_of_text
    assert continuation(tokenizer, [end], ids) == "the old dog sees"
    # A model may have more ids than its tokenizer.
    assert tokenizer.decode([*ids, tokenizer.vocab_size]) == "the old dog sees"


def test_the_last_one_saved_is_the_one(models_folder, tmp_path):
    sentences, pieces = (
        load_file(models_folder / name) for name in ("t5.model", "tokenizer.json")
    )
    for tokenizer in (sentences, pieces, sentences, ByteTokenizer(), pieces, pieces):
        tokenizer.save(tmp_path)
        assert load_saved(tmp_path).fingerprint == tokenizer.fingerprint


def test_bytes_are_a_tokenizer(tmp_path):
    tokenizer = ByteTokenizer()
    (ids,) = tokenizer.encode(["né"])
    assert ids.tolist() == [110, 0xC3, 0xA9]
    assert tokenizer.decode([*ids, tokenizer.end_of_text]) == "né"
    tokenizer.save(tmp_path)
    assert load_saved(tmp_path).fingerprint == tokenizer.fingerprint


def test_settings_in_a_tokenizer_json_do_not_cut_documents(models_folder, tmp_path):
    pieces = Tokenizer.from_file(str(models_folder / "tokenizer.json"))
    pieces.enable_truncation(3)
    pieces.enable_padding(length=50)
    pieces.save(str(tmp_path / "tokenizer.json"))
    there = load_file(models_folder / "tokenizer.json")
    here = load_file(tmp_path / "tokenizer.json")
    pairs = zip(there.encode(SAMPLE), here.encode(SAMPLE), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_ids_may_be_missing(tmp_path):
    words = {"a": 0, "b": 7, "</s>": 3}
    pieces = Tokenizer(models.WordLevel(words, unk_token="a"))
    pieces.add_special_tokens(["</s>"])
    pieces.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_file(tmp_path / "tokenizer.json")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (8, 3)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["b"] = 2**31
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="ids up to 2,147,483,648, over 31 bits"):
        load_file(tmp_path / "tokenizer.json")


def test_the_end_of_text_may_be_named_beside_it(models_folder, tmp_path):
    pieces = Tokenizer.from_file(str(models_folder / "tokenizer.json"))
    pieces.add_special_tokens(["[END]"])
    pieces.save(str(tmp_path / "tokenizer.json"))
    for value in ("[END]", {"content": "[END]"}):
        settings = {"eos_token": value}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        assert load_file(tmp_path / "tokenizer.json").end_of_text == 290
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "[STOP]"}')
    with pytest.raises(DataError, match=r"none of \[STOP\] is among its added tokens"):
        load_file(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.model", b""),
        ("text.model", b"no such format"),
        ("text.json", b"no such format"),
        ("other.json", b'{"version": "1.0"}'),
        ("list.json", b"[]"),
        ("deep.json", b'{"model": ' + 100_000 * b"["),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: not a tokenizer that can be used"):
        load_file(tmp_path / name)
    with pytest.raises(DataError, match=r"nowhere\.model: no such file"):
        load_file(tmp_path / "nowhere.model")
    for end in (".model", ".json"):
        os.mkfifo(tmp_path / f"pipe{end}")
        with pytest.raises(DataError, match=rf"pipe\{end}: not .* not a regular file"):
            load_file(tmp_path / f"pipe{end}")


def test_a_signal_while_one_is_read_is_no_fault_of_the_file(tmp_path, monkeypatch):
    def read(_):
        raise Terminated

    (tmp_path / "x.model").write_bytes(b"x")
    monkeypatch.setattr(tokenizers.files, "read_bytes", read)
    with pytest.raises(Terminated):
        load_file(tmp_path / "x.model")


def test_an_end_of_text_is_needed(models_folder):
    with pytest.raises(DataError, match=r"endless\.model: .* no end of text"):
        load_file(models_folder / "endless.model")


def test_a_bpe_is_trained_once_for_each_text(tmp_path, text_folder, texts):
    config = DataConfig(
        text_folder, tokenizer="bpe", vocab_size=290, cache=tmp_path / "cache"
    )
    tokenizer = open_text(config, QUIET).tokenizer
    assert tokenizer.vocab_size == 290
    assert tokenizer.fingerprint == train_bpe(texts, 290).fingerprint
    (file,) = (tmp_path / "cache").glob("bpe-290-*/tokenizer.json")
    written = file.stat().st_mtime_ns
    assert open_text(config, QUIET).tokenizer.fingerprint == tokenizer.fingerprint
    assert file.stat().st_mtime_ns == written
    source = open_source(DataConfig(None))
    assert source.fingerprint("train")[:16] not in file.parent.name


def test_too_few_ids_are_refused_before_anything_is_tokenised(tmp_path, text_folder):
    assert model_vocabulary(ByteTokenizer(), None) == 257
    assert model_vocabulary(ByteTokenizer(), 320) == 320
    config = DataConfig(text_folder, vocab_size=256, cache=tmp_path / "cache")
    with pytest.raises(DataError, match="has 257 ids for texts, the model only 256"):
        open_text(config, QUIET)
    assert not (tmp_path / "cache").exists()


def test_the_published_recipe_has_t5s_pieces(shared_data):
    tokenizer = load_file(shared_data / "tokenizers" / "t5_base_spiece.model")
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.pad) == (32000, 1, 0)
    (ids,) = tokenizer.encode(["The cat sat."])
    assert tokenizer.decode(ids) == "The cat sat."
    assert model_vocabulary(tokenizer, 32_100) == 32_100
