"""What tokenizers put around a text, and the files that are copied with them."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import sentencepiece
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from examples.llama import files
from examples.llama.config import DataConfig
from examples.llama.data.documents import DataError
from examples.llama.data.text import open_text
from examples.llama.data.token_cache import with_ends
from examples.llama.data.tokenizers import (
    ByteTokenizer,
    load_file,
    load_saved,
    model_vocabulary,
)

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory):
    """SentencePiece models like Llama's, and like T5's, which have no begin of text."""
    folder = tmp_path_factory.mktemp("models")
    for name, settings in {"llama": {}, "t5": {"bos_id": -1}}.items():
        with (folder / f"{name}.model").open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(["the cat sees the old dog"]),
                model_writer=file,
                model_type="bpe",
                vocab_size=20,
                minloglevel=2,
                **settings,
            )
    return folder


WORDS = {"cat": 0, "dog": 1}
SPECIAL = [("<s>", 2), ("</s>", 3), ("[X]", 4)]


def template(single):
    return processors.TemplateProcessing(single=single, special_tokens=SPECIAL)


def words(folder, post_processor=None, settings=None, names=None):
    """Writes a tokenizer.json of words, and the files that belong to it."""
    pieces = Tokenizer(models.WordLevel(WORDS, unk_token="cat"))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pieces.add_special_tokens([word for word, _ in SPECIAL])
    if post_processor is not None:
        pieces.post_processor = post_processor
    pieces.save(str(folder / "tokenizer.json"))
    beside = {"tokenizer_config.json": settings, "special_tokens_map.json": names}
    for name, content in beside.items():
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder / "tokenizer.json"


ROBERTA = processors.RobertaProcessing(("</s>", 3), ("<s>", 2))


@pytest.mark.parametrize(
    ("post_processor", "begin", "end"),
    [
        (None, (), (3,)),
        (processors.ByteLevel(), (), (3,)),
        (template("<s> $A"), (2,), (3,)),
        (template("$A </s>"), (), (3,)),  # as T5's
        (template("<s> [X] $A </s>"), (2, 4), (3,)),
        (template("$A [X]"), (), (4, 3)),
        (ROBERTA, (2,), (3,)),
        (
            processors.Sequence([processors.ByteLevel(), template("<s> $A")]),
            (2,),
            (3,),
        ),
    ],
)
def test_what_a_post_processor_puts_around_a_text(tmp_path, post_processor, begin, end):
    path = words(tmp_path, post_processor)
    tokenizer = load_file(path)
    assert (tokenizer.begin, tokenizer.end) == (begin, end)
    assert tokenizer.end_of_text == 3
    assert next(tokenizer.encode(["dog cat"])).tolist() == [1, 0]
    (stream,) = with_ends(["dog cat"], tokenizer)
    assert stream.tolist() == [*begin, 1, 0, *end]
    assert stream.dtype == np.uint32
    # The library itself puts the same ids there, except for an end if it has none.
    theirs = Tokenizer.from_file(str(path)).encode("dog cat").ids
    assert stream.tolist()[: len(theirs)] == theirs
    # Also of a text that spells them out, which is not to get them.
    (stream,) = with_ends(["<s> </s>"], tokenizer)
    assert stream.tolist() == [*begin, 0, 0, *end]
    again = tmp_path / "again"
    again.mkdir()
    tokenizer.save(again)
    assert load_saved(again).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("settings", "begins"),
    [
        ({"add_bos_token": True}, True),
        ({"add_bos_token": True, "add_eos_token": True}, True),
        ({"add_bos_token": False}, False),
        ({}, False),
        (None, False),
    ],
)
def test_settings_decide_where_a_file_has_no_rule(
    tmp_path, models_folder, settings, begins
):
    path = words(tmp_path, template("<s> $A"), settings)
    assert load_file(path).begin == (2,)  # A tokenizer.json has one.
    model = shutil.copy(models_folder / "llama.model", tmp_path / "tokenizer.model")
    tokenizer = load_file(model)
    assert tokenizer.begin == ((1,) if begins else ())
    assert tokenizer.end == (tokenizer.end_of_text,) == (2,)
    tokenizer.save(tmp_path)
    again = load_saved(tmp_path)
    assert again.begin == tokenizer.begin
    assert again.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("batching", ["packed", "one-per-row"])
def test_every_document_begins_and_ends_once(tmp_path, text_folder, batching):
    path = words(tmp_path, template("<s> [X] $A </s>"))
    config = DataConfig(
        text_folder,
        tokenizer=str(path),
        batching=batching,
        seq_len=50,
        cache=tmp_path / "cache",
    )
    text = open_text(config, QUIET)
    rows = text.train().rows
    # Forty words each.
    if batching == "packed":
        ids = np.concatenate([rows[i].inputs for i in range(len(rows))])
        documents = ids[: 98 * 43].reshape(98, 43)
        assert (documents[:, :2] == [2, 4]).all()
        assert (documents[:, 2:42] < 2).all()
        assert (documents[:, 42] == 3).all()
    else:
        assert len(rows) == 100
        assert rows[7].inputs[:2].tolist() == [2, 4]
        assert rows[7].targets[rows[7].mask > 0].tolist()[-1] == 3
        assert rows[7].mask.sum() == 42
    words(tmp_path, template("$A </s>"))
    assert open_text(config, QUIET).fingerprint != text.fingerprint


def test_another_rule_is_another_fingerprint(tmp_path, models_folder):
    """Without a rule the fingerprint is as before there were rules."""
    path = words(tmp_path)
    plain = load_file(path).fingerprint
    content = f"</s>\n{path.read_text(encoding='utf-8')}".encode()
    assert plain == hashlib.sha256(content).hexdigest()
    found = {plain}
    for single in ("<s> $A", "[X] $A", "$A [X]"):
        path = words(tmp_path, template(single))
        content = f"</s>\n{path.read_text(encoding='utf-8')}".encode()
        found |= {load_file(path).fingerprint, hashlib.sha256(content).hexdigest()}
    assert len(found) == 7
    words(tmp_path, None, {"add_bos_token": True})
    shutil.copy(models_folder / "llama.model", tmp_path)
    begins = load_file(tmp_path / "llama.model").fingerprint
    model = (models_folder / "llama.model").read_bytes()
    plain = load_file(models_folder / "llama.model").fingerprint
    assert plain == hashlib.sha256(model).hexdigest() != begins


@pytest.mark.parametrize(
    ("post_processor", "settings", "message"),
    [
        (template("<s> $A $A"), None, "does more than put tokens around a text"),
        (None, {"eos_token": ["</s>"]}, r"eos_token is .*, not the text of a token"),
        (None, [], r"tokenizer_config\.json: not a JSON object"),
        (
            processors.TemplateProcessing("x $A", special_tokens=[("x", 99)]),
            None,
            r"puts ids around a text that it has not: \(\(99,\)",
        ),
    ],
)
def test_rules_that_cannot_be_kept_are_refused(
    tmp_path, post_processor, settings, message
):
    path = words(tmp_path, post_processor, settings)
    with pytest.raises(DataError, match=rf"tokenizer\.json: not a tok.*{message}"):
        load_file(path)


def test_a_begin_that_the_model_has_not_is_refused(tmp_path, models_folder):
    shutil.copy(models_folder / "t5.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    with pytest.raises(DataError, match=r"t5.model: .* no begin of text \(bos\), and"):
        load_file(tmp_path / "t5.model")


def test_a_panic_of_the_library_is_an_error(tmp_path):
    path = words(tmp_path, template("<s> $A"))
    content = json.loads(path.read_text())
    content["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        load_file(path)


BESIDE = {
    "tokenizer_config.json": b'{"eos_token": "</s>", "chat_template": "{{ x }}"}',
    "special_tokens_map.json": b'{"bos_token":   "<s>"}',
    "generation_config.json": b'{"eos_token_id": [3, 4]}\n',
    "chat_template.jinja": b"{{ messages }}",
    "chat_template.json": b"{}",
    "additional_chat_templates/tool.jinja": b"{{ tools }}",
}


def test_what_is_beside_a_tokenizer_goes_with_it(tmp_path, models_folder):
    (tmp_path / "additional_chat_templates").mkdir()
    path = words(tmp_path, template("<s> $A"))
    for name, content in BESIDE.items():
        (tmp_path / name).write_bytes(content)
    other = (models_folder / "llama.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(other)
    (tmp_path / "config.json").write_text("{}")
    saved = tmp_path / "saved"
    saved.mkdir()

    def files_of(folder):
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {str(x.relative_to(folder)): x.read_bytes() for x in paths}

    load_file(path).save(saved)
    alone = {"tokenizer.json": path.read_bytes()}
    assert files_of(saved) == BESIDE | alone | {"tokenizer.model": other}
    load_saved(saved).save(saved)  # over itself
    assert files_of(saved) == BESIDE | alone | {"tokenizer.model": other}
    load_file(tmp_path / "tokenizer.model").save(saved)
    assert files_of(saved) == BESIDE | {"tokenizer.model": other}
    ByteTokenizer().save(saved)
    assert files_of(saved) == {}


def test_a_tokenizer_stays_while_it_is_written_again(tmp_path, monkeypatch):
    """For example if several processes start one run, or share a cache."""
    tokenizer = load_file(words(tmp_path, template("<s> $A"), {"eos_token": "</s>"}))
    tokenizer.save(tmp_path)
    written = []

    def watched(path, content):
        assert load_saved(tmp_path).fingerprint == tokenizer.fingerprint
        written.append(path.name)

    monkeypatch.setattr(files, "write", watched)
    tokenizer.save(tmp_path)
    assert written == ["tokenizer_config.json", "tokenizer.json"]


def test_special_tokens_that_no_text_gets_need_no_place_in_a_model(tmp_path):
    """As the [PAD] that many a Llama's tokenizer has had added, and its model not."""
    path = words(tmp_path, template("<s> $A"))
    pieces = Tokenizer.from_file(str(path))
    pieces.add_special_tokens(["[PAD]"])
    pieces.save(str(path))
    tokenizer = load_file(path)
    assert (tokenizer.vocab_size, tokenizer.reach) == (6, 4)
    assert [model_vocabulary(tokenizer, size) for size in (None, 4, 9)] == [6, 4, 9]
    (ids,) = tokenizer.encode(["[PAD]"])
    assert ids.max() < 2
    with pytest.raises(DataError, match="has 4 ids for texts, the model only 3"):
        model_vocabulary(tokenizer, 3)
    # That is begun with it, or that texts may spell, is another matter.
    pieces.post_processor = processors.TemplateProcessing(
        "[PAD] $A", special_tokens=[("[PAD]", 5)]
    )
    pieces.save(str(path))
    assert load_file(path).reach == 6
    path = words(tmp_path)
    pieces = Tokenizer.from_file(str(path))
    pieces.add_tokens(["bird"])
    pieces.save(str(path))
    assert load_file(path).reach == 6
    assert next(load_file(path).encode(["bird"])).tolist() == [5]
