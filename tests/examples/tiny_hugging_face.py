"""A tiny Llama as a Hugging Face folder, which tests read or damage."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from examples.llama.config import ModelConfig
from examples.llama.weights import hugging_face
from examples.llama.weights.names import unfilled

VOCAB = 40
CONFIG = ModelConfig(
    width=16, ffn_width=24, num_layers=3, num_heads=2, norm_eps=1e-5, rope_base=5e5
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True, num_kv_heads=1)


def params_of(config, dtype: Any = np.float32):
    """Returns NumPy parameters; all numbers differ, and are exact in every dtype."""
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


def in_two_shards(path):
    hugging_face.save(path, CONFIG, VOCAB, params_of(CONFIG), shard_bytes=20_000)
    assert len(list(path.glob("*.safetensors"))) == 2
    return path


def edit(folder, change):
    """Passes both shards, as dicts by tensor, to ``change``, and writes them again."""
    paths = sorted(folder.glob("*.safetensors"))
    shards = [load_file(path) for path in paths]
    change(*shards)
    for path, shard in zip(paths, shards, strict=True):
        save_file(shard, path)


def change_json(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
