"""Tiny runs, tiny text, and the Llama in plain NumPy."""

import dataclasses
import gzip
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from examples.llama.config import Config, DataConfig, ModelConfig, OptimizerConfig

TINY_MODEL = ModelConfig(width=32, ffn_width=64, num_layers=2, num_heads=2)


@pytest.fixture(scope="session", autouse=True)
def cheap_compilation(tmp_path_factory):
    """Compiles fast and once, since these tests compile much and compute little."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # takes in the folder if JAX has compiled already
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def write_shard(path: Path, texts: list[str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """Returns a folder with 20 kB of training text and 700 bytes of held-out text."""
    folder = tmp_path_factory.mktemp("text")
    words = ("the", "a", "cat", "dog", "bird", "sees", "hears", "and", "small", "old")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=40)) + "." for _ in range(104)]
    write_shard(folder / "tiny-train.00000-of-00002.json.gz", texts[:50])
    write_shard(folder / "tiny-train.00001-of-00002.json.gz", texts[50:100])
    write_shard(folder / "tiny-validation.json.gz", texts[100:])
    return folder


@pytest.fixture(scope="session")
def make_config(text_folder, tmp_path_factory):
    """Returns `make_config(workdir, optimizer, ...)` for a few steps of a tiny one."""
    cache = tmp_path_factory.mktemp("tokens")

    def make(workdir: Path, optimizer: str = "adamw", **changes) -> Config:
        model = TINY_MODEL
        if optimizer == "galore":
            model = dataclasses.replace(model, scan_layers=False)
        config = Config(
            model=model,
            data=DataConfig(
                text_folder, seq_len=32, batch_size=8, eval_tokens=600, cache=cache
            ),
            optimizer=OptimizerConfig(optimizer, rank=4),  # pyright: ignore
            steps=12,
            eval_every=6,
            checkpoint_every=6,
            log_every=6,
            workdir=workdir,
        )
        return dataclasses.replace(config, **changes)

    return make


@pytest.fixture
def tiny_config(make_config, tmp_path):
    """Returns such a configuration in this test's folder, changed by keywords."""
    return lambda optimizer="adamw", **changes: make_config(
        tmp_path / "run", optimizer, **changes
    )


def _norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def _rotate(x, base):
    """Rotates (s, h, e) by position, as one complex number per pair of features."""
    s, _, e = x.shape
    angles = np.arange(s)[:, None] * base ** (-np.arange(0, e, 2) / e)
    turned = (x[..., : e // 2] + 1j * x[..., e // 2 :]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _attention(x, p, config):
    s, head_dim = len(x), config.head_dim
    q, k, v = ((x @ p[n]["kernel"]).reshape(s, -1, head_dim) for n in "qkv")
    q, k = _rotate(q, config.rope_base), _rotate(k, config.rope_base)
    out = np.empty_like(q)
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // k.shape[1])
        scores = q[:, head] @ k[:, shared].T / np.sqrt(head_dim)
        scores[np.triu_indices(s, 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, shared]
    return out.reshape(s, -1) @ p["o"]["kernel"]


def _mlp(x, p):
    gate = x @ p["gate"]["kernel"]
    return gate / (1 + np.exp(-gate)) * (x @ p["up"]["kernel"]) @ p["down"]["kernel"]


def _numpy_logits(params, tokens, config):
    """Returns float64 logits (s, v) of a row (s,), from unrolled parameters."""
    embedding = params["embed"]["embedding"].astype(np.float64)
    x, eps = embedding[tokens], config.norm_eps
    for i in range(len(params["layers"])):
        layer = params["layers"][i]
        normed = _norm(x, layer["attention_norm"]["scale"], eps)
        x = x + _attention(normed, layer["attention"], config)
        x = x + _mlp(_norm(x, layer["mlp_norm"]["scale"], eps), layer["mlp"])
    head = embedding.T if config.tie_embeddings else params["head"]["kernel"]
    return _norm(x, params["norm"]["scale"], eps) @ head


@pytest.fixture(scope="session")
def numpy_logits():
    return _numpy_logits
