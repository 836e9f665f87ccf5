"""GGUF files that the tests write: weights, settings, tokenizer, errors.

A real one: tests/parity.
"""

import dataclasses
import json
import sys
from typing import NamedTuple

import gguf
import jax
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from examples.llama.config import ModelConfig
from examples.llama.data.tokenizers import load_saved
from examples.llama.weights import gguf_file
from examples.llama.weights.folder import export_weights, import_weights
from examples.llama.weights.gguf_file import GGUFFile
from examples.llama.weights.load import load_params
from examples.llama.weights.names import GGUF, BadWeights, as_tensors, unfilled

VOCAB = 40
CONFIG = ModelConfig(
    width=64,
    ffn_width=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    norm_eps=1e-5,
    rope_base=5e5,
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
Q8 = gguf.GGMLQuantizationType.Q8_0


def params_of(config):
    rng = np.random.default_rng(0)
    params = unfilled(config, VOCAB, np.float32)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)


def neighbours(rows, head_dim=16):
    """Reorders feature pairs (i, i + e/2) to (2i, 2i + 1), head by head."""
    made = np.empty_like(rows)
    for first in range(0, len(rows), head_dim):
        for i in range(head_dim // 2):
            made[first + 2 * i] = rows[first + i]
            made[first + 2 * i + 1] = rows[first + i + head_dim // 2]
    return made


def write(path, config, kind=None, change=lambda writer: None, leave_out=()):
    """Writes a file as llama.cpp does, with matrices quantised to ``kind``."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_rope_dimension_count(config.head_dim)
    change(writer)
    for name, tensor in as_tensors(params_of(config), GGUF).items():
        if name in leave_out:
            continue
        is_turned = "attn_q." in name or "attn_k." in name
        rows = np.ascontiguousarray(neighbours(tensor) if is_turned else tensor)
        if kind is not None and rows.ndim == 2:
            writer.add_tensor(name, quantize(rows, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", [None, "Q8_0", "Q4_1", "BF16"])
def test_weights_and_settings(tmp_path, config, kind):
    kind = None if kind is None else gguf.GGMLQuantizationType[kind]
    file = GGUFFile(write(tmp_path / "llama.gguf", config, kind))
    found, vocab_size, params = file.load()
    assert (found, vocab_size) == (config, VOCAB)
    expected = params_of(config)
    for tensor in as_tensors(expected, GGUF).values():
        if kind is not None and tensor.ndim == 2:
            rows = np.ascontiguousarray(tensor)
            tensor[...] = dequantize(quantize(rows, kind), kind)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_unrolled_in_bfloat16(tmp_path):
    file = GGUFFile(write(tmp_path / "llama.gguf", TIED))
    config, _, params = file.load("bfloat16", scan_layers=False)
    assert config == dataclasses.replace(TIED, scan_layers=False)
    found = params["layers"][1]["attention"]["q"]["kernel"]
    expected = params_of(TIED)["layers"]["attention"]["q"]["kernel"][1]
    np.testing.assert_array_equal(found, expected.astype(found.dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.add_rope_scaling_factor(2.0), "llama.rope.scaling.factor is 2.0"),
        (
            lambda w: w.add_key_length(32),
            "llama.attention.key_length is 32; this",
        ),
        (lambda w: w.add_expert_count(4), "llama.expert_count is 4"),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)),
            r"tensor rope_freqs.weight \(8,\) is no part of this Llama",
        ),
    ],
)
def test_other_models_are_refused(tmp_path, change, message):
    file = write(tmp_path / "llama.gguf", TIED, change=change)
    with pytest.raises(BadWeights, match=f"llama.gguf: {message}"):
        GGUFFile(file).load()


def test_missing_tensors_and_broken_files_are_named(tmp_path):
    file = write(tmp_path / "a.gguf", TIED, leave_out=["blk.1.ffn_up.weight"])
    with pytest.raises(BadWeights, match=r"a.gguf: tensor blk.1.ffn_up.weight is m"):
        GGUFFile(file).load()
    for content in (b"no GGUF at all", file.read_bytes()[:-1000]):
        file.write_bytes(content)
        with pytest.raises(BadWeights, match=r"a.gguf: not a whole GGUF file"):
            GGUFFile(file)


def test_a_quantisation_that_gguf_cannot_undo_is_refused(tmp_path):
    name = "blk.1.ffn_up.weight"

    def as_integers(writer):
        weights = as_tensors(params_of(TIED), GGUF)[name]
        writer.add_tensor(name, np.zeros(weights.shape, np.int8))

    file = write(tmp_path / "a.gguf", TIED, change=as_integers, leave_out=[name])
    with pytest.raises(BadWeights, match=f"a.gguf: {name} is of kind I8.*convert it"):
        GGUFFile(file).load()


PIECES = ["<|end|>", "a", "b", "1", "2", "Ġ", "ab", "12", "Ġab"]


def with_tokenizer(split, more=lambda writer: None):
    def change(writer):
        more(writer)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split)
        writer.add_token_list(PIECES)
        kinds = [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(PIECES) - 1)
        writer.add_token_types(kinds)
        writer.add_token_merges(["a b", "1 2", "Ġ ab"])
        writer.add_eos_token_id(0)

    return change


def test_tokenizer(tmp_path):
    path = write(tmp_path / "a.gguf", TIED, change=with_tokenizer("smollm"))
    tokenizer = GGUFFile(path).tokenizer()
    about = GGUFFile(path).about()
    assert (about["end_of_text"], about["stops"], about["context"]) == (0, [0], None)
    encoded = tokenizer.encode("ab ab12<|end|>b")
    assert encoded.tokens == ["ab", "Ġab", "1", "2", "<|end|>", "b"]
    assert encoded.ids == [PIECES.index(piece) for piece in encoded.tokens]
    assert tokenizer.decode(encoded.ids) == "ab ab12b"


def test_import_takes_the_tokenizer_where_it_can(tmp_path):
    path = write(tmp_path / "a.gguf", TIED, change=with_tokenizer("smollm"))
    assert import_weights(path, tmp_path / "a") == (TIED, VOCAB, "")
    weights = load_params(tmp_path / "a")
    assert weights.end_of_text == 0
    assert (tmp_path / "a" / "tokenizer.json").is_file()
    jax.tree.map(np.testing.assert_array_equal, weights.params, params_of(TIED))
    path = write(tmp_path / "b.gguf", TIED, change=with_tokenizer("llama-bpe"))
    imported = import_weights(path, tmp_path / "b")
    assert "pre is 'llama-bpe'; only smollm" in imported.without_tokenizer
    assert not (tmp_path / "b" / "tokenizer.json").exists()


def test_a_split_that_is_no_name_is_no_tokenizer(tmp_path):
    def change(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_array("tokenizer.ggml.pre", ["smollm"])

    file = GGUFFile(write(tmp_path / "a.gguf", TIED, change=change))
    with pytest.raises(BadWeights, match=r"pre is \['smollm'\]; only smollm"):
        file.tokenizer()


def begins(writer):
    writer.add_bos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_pad_token_id(3)
    writer.add_eot_token_id(1)
    writer.add_context_length(99)
    writer.add_chat_template("{{ messages }}")


def test_the_begin_of_text_and_the_ids_go_with_it(tmp_path):
    path = write(tmp_path / "a.gguf", TIED, change=with_tokenizer("smollm", begins))
    assert GGUFFile(path).tokenizer().encode("ab").tokens == ["b", "ab"]
    assert import_weights(path, tmp_path / "a").without_tokenizer == ""
    weights = load_params(tmp_path / "a")
    assert (weights.end_of_text, weights.stops) == (0, (0, 1))
    tokenizer = weights.tokenizer()
    assert (tokenizer.begin, tokenizer.end) == ((2,), (0,))
    export_weights(tmp_path / "a", tmp_path / "hf")
    config, settings = (
        json.loads((tmp_path / "hf" / name).read_text())
        for name in ("config.json", "tokenizer_config.json")
    )
    assert config["max_position_embeddings"] == 99
    ids = [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
    assert ids == [2, 0, 3]
    names = [settings[f"{name}_token"] for name in ("bos", "eos", "pad")]
    assert names == ["b", "<|end|>", "1"]
    assert settings["chat_template"] == "{{ messages }}"
    assert load_saved(tmp_path / "hf").begin == (2,)


def test_an_end_of_text_that_is_added_is_the_end(tmp_path):
    def change(writer):
        writer.add_add_eos_token(True)
        writer.add_add_bos_token(False)
        writer.add_bos_token_id(2)

    path = write(tmp_path / "a.gguf", TIED, change=with_tokenizer("smollm", change))
    assert GGUFFile(path).tokenizer().encode("ab").tokens == ["ab", "<|end|>"]
    import_weights(path, tmp_path / "a")
    tokenizer = load_params(tmp_path / "a").tokenizer()
    assert (tokenizer.begin, tokenizer.end) == ((), (0,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.add_bos_token_id(VOCAB),
            "bos_token_id is 40; the ids are 0 to 39",
        ),
        (
            lambda w: w.add_int32("tokenizer.ggml.padding_token_id", -1),
            "is -1; the ids",
        ),
        (lambda w: w.add_string("tokenizer.ggml.eot_token_id", "x"), "is 'x'; the ids"),
        (
            lambda w: w.add_string("llama.context_length", "x"),
            "is 'x'; it must be a po",
        ),
    ],
)
def test_ids_that_the_model_has_not_are_refused(tmp_path, change, message):
    file = write(tmp_path / "a.gguf", TIED, change=change)
    with pytest.raises(BadWeights, match=rf"a\.gguf: .*{message}"):
        import_weights(file, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_begin_of_text_that_is_not_there_is_no_tokenizer(tmp_path):
    change = with_tokenizer("smollm", lambda writer: writer.add_add_bos_token(True))
    path = write(tmp_path / "a.gguf", TIED, change=change)
    imported = import_weights(path, tmp_path / "a")
    assert "there is no bos to be added" in imported.without_tokenizer


def test_a_head_that_is_equal_to_the_embedding_is_a_head(tmp_path):
    """The format cannot say that they are tied."""

    def change(writer):
        writer.add_tensor("output.weight", params_of(TIED)["embed"]["embedding"])

    config, _, params = GGUFFile(write(tmp_path / "a.gguf", TIED, change=change)).load()
    assert not config.tie_embeddings
    expected = params_of(TIED)["embed"]["embedding"]
    np.testing.assert_array_equal(params["embed"]["embedding"], expected)
    np.testing.assert_array_equal(params["head"]["kernel"], expected.T)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    name = "blk.1.ffn_up.weight"

    def change(writer):
        weights = as_tensors(params_of(TIED), GGUF)[name].copy()
        weights[3, 2] = np.nan
        writer.add_tensor(name, weights)

    file = write(tmp_path / "a.gguf", TIED, change=change, leave_out=[name])
    with pytest.raises(BadWeights, match=f"a.gguf: tensor {name} is not finite in flo"):
        GGUFFile(file).load()


class Sized(NamedTuple):
    """The shape of a model, as ``write`` states it."""

    width: int = 64
    ffn_width: int = 96
    num_layers: int = 2
    num_heads: int = 4
    kv_heads: int = 2
    norm_eps: float = 1e-5
    rope_base: float = 5e5
    head_dim: int = 16


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (Sized(width=2**31, head_dim=2**29), "asks for a width of 2,147,483,648"),
        (Sized(ffn_width=2**31), "asks for a feed-forward width of 2,147,483,648"),
        (Sized(num_layers=2**31), "asks for 2,147,483,648 layers; there are only 20"),
        (Sized(num_layers=0), "block_count is 0; it must be a positive count"),
        (Sized(num_heads=0), "head_count is 0; it must be a positive count"),
        (Sized(norm_eps=np.inf), "layer_norm_rms_epsilon is inf; it must be a number"),
    ],
)
def test_impossible_settings_are_refused_before_they_take_memory(
    tmp_path, monkeypatch, says, message
):
    monkeypatch.setattr(sys.modules[__name__], "params_of", lambda _: TIED_PARAMS)
    file = write(tmp_path / "a.gguf", says)
    for scan_layers in (True, False):
        with pytest.raises(BadWeights, match=rf"a\.gguf: .*{message}"):
            GGUFFile(file).load(scan_layers=scan_layers)


TIED_PARAMS = params_of(TIED)


def test_a_link_to_a_file_is_one(tmp_path):
    file = write(tmp_path / "a.gguf", TIED)
    (tmp_path / "link.gguf").symlink_to(file)
    found = GGUFFile(tmp_path / "link.gguf").load()
    jax.tree.map(np.testing.assert_array_equal, found, GGUFFile(file).load())


def test_halves_and_neighbours():
    rows = np.arange(2 * 16 * 3).reshape(32, 3)
    np.testing.assert_array_equal(gguf_file.in_halves(neighbours(rows), 2), rows)
