"""Export and import of Hugging Face folders, in every form.

What is refused: test_llama_hugging_face_refusals. That transformers agrees with us
about what they mean: tests/parity.
"""

import dataclasses
import json
import resource

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from examples.llama import files
from examples.llama.pure import PureLlama
from examples.llama.weights import hugging_face
from examples.llama.weights.names import HUGGING_FACE, BadWeights, as_tensors, unfilled
from tests.examples.tiny_hugging_face import (
    CONFIG,
    TIED,
    VOCAB,
    assert_same,
    change_json,
    in_two_shards,
    params_of,
)


@pytest.fixture
def folder(tmp_path):
    return in_two_shards(tmp_path / "llama")


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_there_and_back(tmp_path, config, scan_layers):
    config = dataclasses.replace(config, scan_layers=scan_layers)
    params = params_of(config)
    hugging_face.save(tmp_path / "llama", config, VOCAB, params)
    found = hugging_face.load(tmp_path / "llama", scan_layers=scan_layers)
    # Files do not tell the number of kv heads from its default.
    assert dataclasses.replace(found[0], num_kv_heads=config.num_kv_heads) == config
    assert found[0].kv_heads == config.kv_heads
    assert found[1] == VOCAB
    assert_same(found[2], params)
    names = {path.name for path in (tmp_path / "llama").iterdir()}
    assert names == {"config.json", "model.safetensors"}


def test_stacked_or_not_the_files_are_the_same(tmp_path):
    unrolled = dataclasses.replace(CONFIG, scan_layers=False)
    hugging_face.save(tmp_path / "stacked", CONFIG, VOCAB, params_of(CONFIG))
    _, _, params = hugging_face.load(tmp_path / "stacked", scan_layers=False)
    hugging_face.save(tmp_path / "unrolled", unrolled, VOCAB, params)
    stacked, unrolled = (
        load_file(tmp_path / name / "model.safetensors")
        for name in ("stacked", "unrolled")
    )
    jax.tree.map(np.testing.assert_array_equal, unrolled, stacked)
    q = params_of(CONFIG)["layers"]["attention"]["q"]["kernel"]
    name = "model.layers.2.self_attn.q_proj.weight"
    np.testing.assert_array_equal(stacked[name], q[2].T)


@pytest.mark.parametrize("file_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(tmp_path, file_dtype, dtype):
    path = tmp_path / "llama"
    hugging_face.save(path, TIED, VOCAB, params_of(TIED), dtype=file_dtype)
    with safe_open(path / "model.safetensors", "numpy") as file:
        assert {file.get_tensor(name).dtype.name for name in file.keys()} == {  # noqa: SIM118
            file_dtype
        }
    assert json.loads((path / "config.json").read_text())["torch_dtype"] == file_dtype
    _, _, params = hugging_face.load(path, dtype=dtype)
    np_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    assert_same(params, params_of(TIED, np_dtype))


def test_arrays_on_devices_are_written(tmp_path):
    params = jax.device_put(params_of(CONFIG))
    hugging_face.save(tmp_path / "llama", CONFIG, VOCAB, params)
    assert_same(hugging_face.load(tmp_path / "llama")[2], params_of(CONFIG))


def test_shards(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    in_files = {
        name: path.name
        for path in folder.glob("*.safetensors")
        for name in load_file(path)
    }
    assert index["weight_map"] == in_files
    sizes = [
        sum(x.nbytes for x in load_file(path).values())
        for path in folder.glob("*.safetensors")
    ]
    assert max(sizes) <= 20_000
    assert index["metadata"]["total_size"] == sum(sizes)
    assert_same(hugging_face.load(folder)[2], params_of(CONFIG))


def test_a_tokenizer_goes_with_it(tmp_path):
    pieces = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    pieces.add_special_tokens(["<|end|>"])
    pieces.save(str(tmp_path / "tokenizer.json"))
    hugging_face.save(
        tmp_path / "llama",
        TIED,
        VOCAB,
        params_of(TIED),
        token_ids={"eos_token_id": 1},
        tokenizer=tmp_path,
    )
    there = tmp_path / "llama"
    assert json.loads((there / "config.json").read_text())["eos_token_id"] == 1
    settings = json.loads((there / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|end|>"
    assert tokenizers.Tokenizer.from_file(str(there / "tokenizer.json")).to_str() == (
        pieces.to_str()
    )


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}])
def test_so_does_a_sentencepiece_model(tmp_path, settings):
    """The folder also says what is put before a text."""
    (tmp_path / "tokenizer.model").write_bytes(b"a model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    there = tmp_path / "llama"
    hugging_face.save(there, TIED, VOCAB, params_of(TIED), tokenizer=tmp_path)
    assert (there / "tokenizer.model").read_bytes() == b"a model"
    found = json.loads((there / "tokenizer_config.json").read_text())
    assert found == {"add_bos_token": False, "add_eos_token": False} | settings


def test_an_export_that_is_killed_is_no_export(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write", killed)  # config.json comes last
    with pytest.raises(KeyboardInterrupt):
        hugging_face.save(tmp_path / "llama", TIED, VOCAB, params_of(TIED))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    """The library raises an error of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    params = params_of(CONFIG)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, hard))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors: .*File too large"):
            hugging_face.save(tmp_path / "llama", CONFIG, VOCAB, params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(folder):
    with pytest.raises(FileExistsError, match="is there already"):
        hugging_face.save(folder, CONFIG, VOCAB, params_of(CONFIG))


def test_what_float16_cannot_hold(tmp_path):
    params = params_of(CONFIG)
    params["layers"]["mlp"]["up"]["kernel"][1] *= 1e6
    message = "model.layers.1.mlp.up_proj.weight has values too large for float16"
    with pytest.raises(BadWeights, match=message):
        hugging_face.save(tmp_path / "x", CONFIG, VOCAB, params, dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 77.0},
        {"rope_theta": 77.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}},
        {"rope_scaling": {"rope_theta": 77.0, "type": "default"}},
    ],
)
def test_old_and_new_rotary_settings(folder, rope):
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    del settings["rope_theta"]
    file.write_text(json.dumps(settings | rope))
    assert hugging_face.load(folder)[0].rope_base == 77.0


def test_what_else_there_is_to_know(folder):
    ids = {"bos_token_id": 5, "eos_token_id": [7, 6], "pad_token_id": None}
    change_json(folder / "config.json", max_position_embeddings=77, **ids)
    found = {"end_of_text": 7, "stops": [7, 6], "context": 77, "token_ids": ids}
    found |= {"vocab_size": VOCAB}
    assert hugging_face.about(folder) == found
    (folder / "generation_config.json").write_text('{"eos_token_id": [6, 9]}')
    assert hugging_face.about(folder) == found | {"stops": [7, 6, 9]}
    (folder / "generation_config.json").write_text('{"eos_token_id": 40}')
    with pytest.raises(BadWeights, match=r"generation_config.json: eos_token_id is 40"):
        hugging_face.about(folder)
    (folder / "generation_config.json").unlink()
    change_json(folder / "config.json", max_position_embeddings="long")
    with pytest.raises(ValueError, match="max_position_embeddings is 'long'"):
        hugging_face.about(folder)


def test_a_tied_head_may_be_in_the_file_too(tmp_path):
    path = tmp_path / "llama"
    hugging_face.save(path, TIED, VOCAB, params_of(TIED))
    file, embedding = path / "model.safetensors", "model.embed_tokens.weight"
    tensors = load_file(file)
    head = tensors[embedding].copy()
    save_file(tensors | {"lm_head.weight": head}, file)
    config, _, params = hugging_face.load(path)
    assert config.tie_embeddings
    assert_same(params, params_of(TIED))
    head[1, 2] += 1
    for other in (head, head[1:]):
        save_file(tensors | {"lm_head.weight": other.copy()}, file)
        message = rf"{file}: lm_head.weight differs from {embedding}, .*say false there"
        with pytest.raises(BadWeights, match=message):
            hugging_face.load(path)
    # As the message has it.
    save_file(tensors | {"lm_head.weight": head}, file)
    change_json(path / "config.json", tie_word_embeddings=False)
    config, _, params = hugging_face.load(path)
    assert not config.tie_embeddings
    np.testing.assert_array_equal(params["head"]["kernel"], head.T)


def test_every_tensor_has_a_name_of_its_own():
    for config in (CONFIG, TIED, dataclasses.replace(CONFIG, scan_layers=False)):
        init = PureLlama(config, VOCAB).init
        shapes = jax.eval_shape(init, jax.random.key(0))
        tensors = as_tensors(unfilled(config, VOCAB, np.float32), HUGGING_FACE)
        assert sum(x.size for x in tensors.values()) == sum(
            x.size for x in jax.tree.leaves(shapes)
        )
        assert len(tensors) == 2 + 9 * 3 + (not config.tie_embeddings)
