"""Hugging Face folders: there and back, in every form, and what is refused.

That transformers agrees with us about what they mean: tests/parity.
"""

import dataclasses
import json
import os
import re
import shutil
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from examples.llama import files
from examples.llama.config import ModelConfig
from examples.llama.pure import PureLlama
from examples.llama.weights import hugging_face
from examples.llama.weights.names import HUGGING_FACE, BadWeights, as_tensors, unfilled

VOCAB = 40
CONFIG = ModelConfig(
    width=16, ffn_width=24, num_layers=3, num_heads=2, norm_eps=1e-5, rope_base=5e5
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True, num_kv_heads=1)


def params_of(config, dtype: Any = np.float32):
    """Of NumPy; every number is another one, and the same in each dtype."""
    rng = np.random.default_rng(0)
    params = unfilled(config, VOCAB, np.dtype(dtype))
    return jax.tree.map(
        lambda x: rng.integers(-128, 128, x.shape).astype(x.dtype) / x.dtype.type(64),
        params,
    )


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def folder(tmp_path):
    """A good one in two shards, to be damaged."""
    path = tmp_path / "llama"
    hugging_face.save(path, CONFIG, VOCAB, params_of(CONFIG), shard_bytes=20_000)
    assert len(list(path.glob("*.safetensors"))) == 2
    return path


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


def test_an_export_that_is_killed_is_no_export(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write", killed)  # config.json comes last
    with pytest.raises(KeyboardInterrupt):
        hugging_face.save(tmp_path / "llama", TIED, VOCAB, params_of(TIED))
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
    ("settings", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClass"),
        ({"attention_bias": True}, "attention_bias is True; this model computes False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this model computes 'silu'"),
        ({"head_dim": 16}, "head_dim 16; this model computes hidden_size / num"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type is 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope: rope_type is 'llama3'"),
        ({"rope_parameters": {"rope_type": "default", "factor": 8}}, "factor is 8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"hidden_size": None}, "hidden_size is None, not a positive count"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads"),
    ],
)
def test_other_models_are_refused_before_weights_are_read(folder, settings, message):
    for path in folder.glob("model*"):
        path.unlink()
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(BadWeights, match=f"config.json: .*{message}"):
        hugging_face.load(folder)


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


def edit(folder, change):
    """Both shards, as dicts by tensor, given to ``change`` and written again."""
    paths = sorted(folder.glob("*.safetensors"))
    shards = [load_file(path) for path in paths]
    change(*shards)
    for path, shard in zip(paths, shards, strict=True):
        save_file(shard, path)


NORM = "model.norm.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


def test_tensors_that_do_not_fit_are_named_with_their_file(folder):
    def change(first, second):
        holder = first if Q in first else second
        holder[Q] = np.zeros((16, 15), np.float32)
        (first if NORM in first else second).pop(NORM)
        second["model.layers.3.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
        second["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    where = json.loads((folder / "model.safetensors.index.json").read_text())
    edit(folder, change)
    with pytest.raises(BadWeights) as caught:
        hugging_face.load(folder)
    lines = str(caught.value).splitlines()
    file = {name: folder / where["weight_map"][name] for name in (NORM, Q)}
    last = max(folder.glob("*.safetensors"))
    assert sorted(lines) == sorted(
        [
            f"{file[Q]}: tensor {Q} is (16, 15), should be (16, 16)",
            f"{file[NORM]}: tensor {NORM} is missing",
            f"{last}: tensor model.layers.3.mlp.up_proj.weight (24, 16) is no part of "
            "this Llama",
        ]
    )


def test_only_floats(folder):
    edit(folder, lambda first, _: first.update({Q: np.zeros((16, 16), np.int8)}))
    with pytest.raises(BadWeights, match=f"tensor {re.escape(Q)} is I8, not one of"):
        hugging_face.load(folder)


def test_one_tensor_in_two_files(folder):
    def change(first, second):
        first[NORM] = second[NORM] = np.ones(16, np.float32)

    edit(folder, change)
    with pytest.raises(BadWeights, match=f"00001-.* and .*00002-.* both hold {NORM}"):
        hugging_face.load(folder)


def cut(file):
    file.write_bytes(file.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut(max(f.glob("*.safetensors"))), "00002.*not a whole safetensors"),
        (lambda f: max(f.glob("*.safetensors")).unlink(), "00002.*not a whole"),
        (lambda f: cut(f / "model.safetensors.index.json"), "index.json: not JSON"),
        (lambda f: cut(f / "config.json"), "config.json: not JSON"),
        (lambda f: (f / "config.json").unlink(), "no config.json there"),
        (
            lambda f: (f / "model.safetensors.index.json").unlink(),
            "neither model.safetensors nor model.safetensors.index.json there",
        ),
    ],
)
def test_broken_files_are_named(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        hugging_face.load(folder)


def change_json(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 10**12}, "asks for a width of 1,000,000,000,000; no axis of"),
        ({"intermediate_size": 10**12}, "asks for a feed-forward width of 1,0"),
        ({"vocab_size": 10**30}, "asks for a vocabulary of 1,000,0.*longer than 40"),
        ({"num_hidden_layers": 10**12}, "asks for 1,000,000,000,000 layers; there are"),
        ({"num_attention_heads": 10**12}, "must be a multiple of num_heads"),
        ({"num_key_value_heads": 10**12}, "must be a multiple of num_kv_heads"),
        ({"num_key_value_heads": 1.0}, "num_key_value_heads is 1.0, not a positive"),
        ({"hidden_size": True}, "hidden_size is True, not a positive count"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', not a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, not a number"),
        ({"rope_theta": 10**400}, "rope_theta is 1000.*, not a number"),
        ({"rope_parameters": [1]}, r"rope: \[1\] is not a JSON object"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', not true or"),
    ],
)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_impossible_settings_are_refused_before_they_take_memory(
    folder, settings, message, scan_layers
):
    change_json(folder / "config.json", **{"head_dim": None, **settings})
    with pytest.raises(BadWeights, match=f"config.json: .*{message}"):
        hugging_face.load(folder, scan_layers=scan_layers)


def test_an_axis_of_nothing_makes_no_size_possible(folder):
    def change(first, _):
        first["model.x"] = np.zeros((10**12, 0), np.float32)

    edit(folder, change)
    change_json(folder / "config.json", hidden_size=10**12, head_dim=None)
    with pytest.raises(BadWeights, match=r"width of 1,000,0.*longer than 40"):
        hugging_face.load(folder)


@pytest.mark.parametrize(
    "value", [10**30, VOCAB, -1, 1.0, True, "</s>", {}, [1, VOCAB], [[[1]]], [None]]
)
@pytest.mark.parametrize("name", ["eos_token_id", "bos_token_id", "pad_token_id"])
def test_ids_that_the_model_has_not_are_refused(folder, name, value):
    change_json(folder / "config.json", **{name: value})
    if (name, value) == ("pad_token_id", -1):  # Once written where there is none.
        assert hugging_face.about(folder)["token_ids"][name] == -1
        return
    with pytest.raises(BadWeights, match=f"config.json: {name} is .*are 0 to 39"):
        hugging_face.about(folder)


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


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "a/b", 3, None]
)
def test_shards_lie_in_the_folder(folder, name):
    shard = min(folder.glob("*.safetensors"))
    shutil.copy(shard, folder.parent / "other.safetensors")
    file = folder / "model.safetensors.index.json"
    weight_map = json.loads(file.read_text())["weight_map"]
    change_json(file, weight_map=weight_map | {NORM: name})
    with pytest.raises(
        BadWeights, match=rf"index.json: '{NORM}' is in .*, which is no"
    ):
        hugging_face.load(folder)
    change_json(file, weight_map=[name])
    with pytest.raises(BadWeights, match="not an index of shards"):
        hugging_face.load(folder)


def test_a_link_to_a_shard_is_one_and_a_device_is_none(folder):
    """The Hugging Face hub's own cache is of links."""
    shard = min(folder.glob("*.safetensors"))
    shard.rename(folder.parent / "blob")
    shard.symlink_to(folder.parent / "blob")
    assert_same(hugging_face.load(folder)[2], params_of(CONFIG))
    for target in ("/dev/zero", str(folder)):
        shard.unlink()
        shard.symlink_to(target)
        with pytest.raises(BadWeights, match=f"{shard.name}: not a whole safetensors"):
            hugging_face.load(folder)
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(BadWeights, match=r"model.safetensors: .* not a regular file"):
        hugging_face.load(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(folder, value):
    def change(first, second):
        (first if Q in first else second)[Q][3, 2] = value

    edit(folder, change)
    with pytest.raises(BadWeights, match=f"tensor {re.escape(Q)} is not finite in flo"):
        hugging_face.load(folder)


def test_weights_too_large_for_bfloat16_are_refused(folder):
    def change(first, second):
        (first if Q in first else second)[Q][3, 2] = np.finfo(np.float32).max

    edit(folder, change)
    hugging_face.load(folder)
    with pytest.raises(BadWeights, match=r"q_proj.weight is not finite in bfloat16"):
        hugging_face.load(folder, "bfloat16")


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
