"""Parameters of a run or brought in: read without the rest, exported, refused."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest
import tokenizers

from examples.llama import layout
from examples.llama.checkpoint import Checkpoints, DamagedCheckpoint
from examples.llama.config import Config, ModelConfig, OptimizerConfig
from examples.llama.optimizers import make_optimizer
from examples.llama.pure import PureLlama
from examples.llama.run_record import RunMismatch, record_run
from examples.llama.steps import init_state
from examples.llama.train import train
from examples.llama.weights import hugging_face
from examples.llama.weights.folder import export_weights, import_weights, load_params
from examples.llama.weights.names import BadWeights

VOCAB = 257
CONFIG = ModelConfig(width=32, ffn_width=64, num_layers=2, num_heads=2, norm_eps=1e-5)


@pytest.fixture(params=[True, False], ids=["stacked", "unrolled"])
def run(tmp_path, request):
    """A run's folder after two checkpoints, and the parameters of the second."""
    model = dataclasses.replace(CONFIG, scan_layers=request.param)
    config = Config(model, optimizer=OptimizerConfig("adamw"), workdir=tmp_path / "run")
    tx = make_optimizer(config.optimizer, steps=10)
    config.workdir.mkdir()
    record_run(config, {"vocab_size": VOCAB, "end_of_text": 0, "context": 99})
    init = jax.jit(partial(init_state, PureLlama(model, VOCAB), tx))
    with Checkpoints(config.workdir) as checkpoints:
        for step in (1, 2):
            state = init(jax.random.key(step))
            checkpoints.save(step, state)
    return config, jax.device_get(state.params)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_run_without_its_optimizer(run):
    config, params = run
    weights = load_params(config.workdir)
    assert weights.config == config.model
    assert weights.vocab_size == VOCAB
    assert_same(weights.params, params)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(weights.params))
    mesh = layout.make_mesh("fsdp=4,tensor=2", jax.devices())
    divided = load_params(config.workdir, mesh).params
    assert_same(divided, params)
    shardings = layout.param_shardings(mesh, params)
    assert jax.tree.map(lambda x: x.sharding, divided) == shardings


def test_a_damaged_checkpoint_is_not_read(run):
    config, _ = run
    files = (config.workdir / "checkpoints" / "2").rglob("*")
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    before = sorted(config.workdir.rglob("*"))
    earlier = load_params(config.workdir).params
    key = jax.random.key(1)
    assert_same(earlier, jax.jit(PureLlama(config.model, VOCAB).init)(key))
    assert sorted(config.workdir.rglob("*")) == before  # another may be at work there
    (config.workdir / "digests" / "1.json").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"changed since[^$]*1.json is missing"):
        load_params(config.workdir)


def test_export_and_import_are_inverse(run, tmp_path):
    config, params = run
    pieces = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    pieces.save(str(config.workdir / "tokenizer.json"))
    export_weights(config.workdir, tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["max_position_embeddings"] == 99
    imported = import_weights(
        tmp_path / "hf", tmp_path / "back", scan_layers=config.model.scan_layers
    )
    assert not imported.without_tokenizer
    weights = load_params(tmp_path / "back")
    assert weights.config == dataclasses.replace(config.model, num_kv_heads=2)
    assert (weights.vocab_size, weights.end_of_text) == (VOCAB, 0)
    assert_same(weights.params, params)
    export_weights(tmp_path / "back", tmp_path / "again")
    for name in ("model.safetensors", "tokenizer.json"):
        first, second = (tmp_path / folder / name for folder in ("hf", "again"))
        assert first.read_bytes() == second.read_bytes()
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == settings | {"num_key_value_heads": 2}


def test_import_in_bfloat16_without_a_tokenizer(tmp_path):
    params = jax.jit(PureLlama(CONFIG, VOCAB).init)(jax.random.key(0))
    hugging_face.save(tmp_path / "hf", CONFIG, VOCAB, params)
    imported = import_weights(tmp_path / "hf", tmp_path / "there", "bfloat16")
    assert "hf has no tokenizer.json" in imported.without_tokenizer
    weights = load_params(tmp_path / "there")
    with pytest.raises(BadWeights, match="there has no tokenizer"):
        weights.tokenizer()
    expected = jax.tree.map(lambda x: np.asarray(x.astype("bfloat16")), params)
    assert_same(weights.params, expected)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(weights.params)} == {"bfloat16"}


def test_nothing_is_left_of_an_import_that_fails(tmp_path):
    (tmp_path / "hf").mkdir()
    with pytest.raises(BadWeights, match="no config"):
        import_weights(tmp_path / "hf", tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    with pytest.raises(FileExistsError, match="is there already"):
        import_weights(tmp_path / "hf", tmp_path / "hf")
    with pytest.raises(RunMismatch, match="neither a run nor weights"):
        load_params(tmp_path / "hf")


def test_a_run_does_not_start_over_imported_weights(tiny_config, tmp_path):
    params = jax.jit(PureLlama(CONFIG, VOCAB).init)(jax.random.key(0))
    hugging_face.save(tmp_path / "hf", CONFIG, VOCAB, params)
    import_weights(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(RunMismatch, match="holds imported weights"):
        train(tiny_config())
