"""Hugging Face folders with errors, which name the file and what is wrong."""

import json
import os
import re
import shutil

import numpy as np
import pytest

from examples.llama.weights import hugging_face
from examples.llama.weights.folder import import_weights
from examples.llama.weights.names import BadWeights
from tests.examples.tiny_hugging_face import (
    CONFIG,
    VOCAB,
    assert_same,
    change_json,
    edit,
    in_two_shards,
    params_of,
)

NORM = "model.norm.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
    return in_two_shards(tmp_path / "llama")


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
        ({"num_key_value_heads": 3}, "multiple of `model.num_kv_heads`"),
    ],
)
def test_other_models_are_refused_before_weights_are_read(folder, settings, message):
    for path in folder.glob("model*"):
        path.unlink()
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(BadWeights, match=f"config.json: .*{message}"):
        hugging_face.load(folder)


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 10**12}, "asks for a width of 1,000,000,000,000; no axis of"),
        ({"intermediate_size": 10**12}, "asks for a feed-forward width of 1,0"),
        ({"vocab_size": 10**30}, "asks for a vocabulary of 1,000,0.*longer than 40"),
        ({"num_hidden_layers": 10**12}, "asks for 1,000,000,000,000 layers; there are"),
        ({"num_attention_heads": 10**12}, "must be a multiple of `model.num_heads`"),
        ({"num_key_value_heads": 10**12}, "must be a multiple of `model.num_kv_heads`"),
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
    """The cache of the Hugging Face hub consists of links."""
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


DEEP = '{"a": ' + 100_000 * "["


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json"]
)
def test_what_nests_too_deeply_is_named(folder, tmp_path, name):
    (folder / name).write_text(DEEP)
    with pytest.raises(ValueError, match=rf"{name}: nested too deeply"):
        import_weights(folder, tmp_path / "there")
