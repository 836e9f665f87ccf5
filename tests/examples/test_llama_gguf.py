"""GGUF files that are made here: their weights, settings, tokenizer, refusals.

A real one: tests/parity.
"""

import dataclasses

import gguf
import jax
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from examples.llama.config import ModelConfig
from examples.llama.weights import gguf_file
from examples.llama.weights.folder import import_weights, load_params
from examples.llama.weights.gguf_file import GGUFFile
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
    """Feature pairs (i, i + e/2) become (2i, 2i + 1), head by head."""
    made = np.empty_like(rows)
    for first in range(0, len(rows), head_dim):
        for i in range(head_dim // 2):
            made[first + 2 * i] = rows[first + i]
            made[first + 2 * i + 1] = rows[first + i + head_dim // 2]
    return made


def write(path, config, kind=None, change=lambda writer: None, leave_out=()):
    """As llama.cpp does, with matrices quantised to ``kind``."""
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


def with_tokenizer(split):
    def change(writer):
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
    assert GGUFFile(path).ends()["end_of_text"] == 0
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


def test_halves_and_neighbours():
    rows = np.arange(2 * 16 * 3).reshape(32, 3)
    np.testing.assert_array_equal(gguf_file.in_halves(neighbours(rows), 2), rows)
