"""What is put around a text, here and by transformers (`make test-parity`)."""

import json

import jax
import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from examples.llama.config import ModelConfig
from examples.llama.data.token_cache import with_ends
from examples.llama.data.tokenizers import load_saved
from examples.llama.weights import hugging_face
from examples.llama.weights.folder import export_weights, import_weights
from examples.llama.weights.names import unfilled

REASON = "torch and transformers are an extra: make test-parity"
pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

VOCAB = 300
CONFIG = ModelConfig(width=8, ffn_width=8, num_layers=1, num_heads=2)
TEXTS = ["the cat sees 12 old dogs", "the  old dog", "a", ""]
# A post-processor, what it puts before a text, and whether it ends one.
RULES = {
    "none": (None, (), False),
    "bytes alone": (processors.ByteLevel(trim_offsets=False), (), False),
    "begin, as Llama's": ("<s> $A", (0,), False),
    "end, as T5's": ("$A </s>", (), True),
    "both": ("<s> $A </s>", (0,), True),
    "two": ("<s> [X] $A", (0, 2), False),
    "BERT's": (processors.BertProcessing(("</s>", 1), ("<s>", 0)), (0,), True),
}
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}
LLAMA = {"tokenizer_class": "LlamaTokenizer"}


@pytest.fixture(scope="module")
def bpe():
    pieces = tokenizers.Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>", "[X]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(TEXTS, trainer)
    return pieces.to_str()


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """As Llama's: byte by byte where it must, spaces as they are."""
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(50 * TEXTS[:-1]),
            model_writer=file,
            model_type="bpe",
            byte_fallback=True,
            vocab_size=290,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return path.read_bytes()


@pytest.fixture
def folder(tmp_path):
    """A model's, still without a tokenizer."""
    params = unfilled(CONFIG, VOCAB, np.float32)
    params = jax.tree.map(np.zeros_like, params)
    ids = {"bos_token_id": 0, "eos_token_id": [1, 2]}
    hugging_face.save(tmp_path / "hf", CONFIG, VOCAB, params, token_ids=ids)
    return tmp_path / "hf"


def write_settings(folder, settings):
    if settings is not None:
        names = {"bos_token": "<s>", "eos_token": "</s>"}
        text = json.dumps(names | settings)
        (folder / "tokenizer_config.json").write_text(text)


def assert_same_tokens(folder, puts_end):
    """Their tokens are those of our documents, with or without the end."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_saved(folder)
    for text, stream in zip(TEXTS, with_ends(TEXTS, ours), strict=True):
        expected = stream if puts_end else stream[: -len(ours.end)]
        assert theirs.encode(text) == expected.tolist()


@pytest.mark.parametrize("settings", [PLAIN, PLAIN | {"add_bos_token": True}, LLAMA])
@pytest.mark.parametrize("rule", RULES)
def test_a_tokenizer_json(folder, bpe, rule, settings):
    pieces = tokenizers.Tokenizer.from_str(bpe)
    processor, begin, puts_end = RULES[rule]
    if isinstance(processor, str):
        special = [("<s>", 0), ("</s>", 1), ("[X]", 2)]
        processor = processors.TemplateProcessing(processor, special_tokens=special)
    if processor is not None:
        pieces.post_processor = processor
    pieces.save(str(folder / "tokenizer.json"))
    write_settings(folder, settings)
    assert_same_tokens(folder, puts_end)
    assert load_saved(folder).begin == begin


@pytest.mark.parametrize(
    ("settings", "begins"),
    [
        (None, False),
        ({"add_bos_token": False}, False),
        (LLAMA, False),
        ({"add_bos_token": True}, True),
        (LLAMA | {"add_bos_token": True}, True),
        (LLAMA | {"add_bos_token": False}, False),
    ],
)
def test_a_sentencepiece_model(folder, sentences, tmp_path, settings, begins):
    (folder / "tokenizer.model").write_bytes(sentences)
    write_settings(folder, settings)
    assert_same_tokens(folder, puts_end=False)
    assert load_saved(folder).begin == ((1,) if begins else ())
    import_weights(folder, tmp_path / "there")
    export_weights(tmp_path / "there", tmp_path / "back")
    assert_same_tokens(tmp_path / "back", puts_end=False)
    assert load_saved(tmp_path / "back").begin == load_saved(folder).begin


@pytest.mark.parametrize("settings", [None, PLAIN])
def test_a_round_trip(folder, bpe, settings, tmp_path):
    """transformers makes the same of what we export as of what we had imported."""
    pieces = tokenizers.Tokenizer.from_str(bpe)
    pieces.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 0)]
    )
    pieces.save(str(folder / "tokenizer.json"))
    write_settings(folder, settings)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    import_weights(folder, tmp_path / "there")
    export_weights(tmp_path / "there", tmp_path / "back")
    assert_same_tokens(tmp_path / "back", puts_end=False)
    chat = [{"role": "user", "content": "the cat"}]
    found = []
    for path in (folder, tmp_path / "back"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        found.append(
            [
                *(tokenizer.encode(text) for text in TEXTS),
                tokenizer.apply_chat_template(chat, tokenize=False),
                model.config.bos_token_id,
                model.config.eos_token_id,
                model.generation_config.eos_token_id,
            ]
        )
    assert found[0] == found[1]
    assert found[1][-3:] == [0, [1, 2], [1, 2]]
