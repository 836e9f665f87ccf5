"""docs/recipes/tunix.md as printed: Tunix's own trainer with our optimizer."""

import argparse
import inspect
import math
import re
import shutil
import statistics
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import lorapre_jax as lp

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Those of Tunix's and of what it imports.
    pytest.importorskip("tunix")
    import qwix
    from flax import nnx
    from tunix.cli.config import HyperParameters
    from tunix.models.gemma import model as gemma
    from tunix.models.gemma3 import model as gemma3
    from tunix.models.llama3 import model as llama3
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen3 import model as qwen3
    from tunix.rl.reshard import reshard_model_to_mesh
    from tunix.sft import peft_trainer

pytestmark = [
    # Tunix enters meshes by `with mesh:`, and more of that kind.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("compilation_cache", "quick_compilation"),
]

PAGE = Path(__file__).parents[2] / "docs" / "recipes" / "tunix.md"
STEPS, SAVED = 60, 20
RATE = 1e-3  # AdamW's best, among factors of two.


def run(section: str, names: dict[str, Any]) -> dict[str, Any]:
    """Executes the section's code, as printed."""
    text = PAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, f"{PAGE.name}: {section}", "exec"), names)
    return names


def text_batches(module, steps: int) -> list[Any]:
    """The source of a module, as bytes."""
    source = inspect.getsource(module).encode("ascii", "ignore")
    text = np.frombuffer(source, np.uint8)
    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(text) - 64, (steps, 8))
    tokens = text[starts[..., None] + np.arange(64)].astype(np.int32)
    return [peft_trainer.TrainingInput(t, np.ones_like(t)) for t in tokens]


def losses(trainer) -> np.ndarray:
    return np.array(trainer.metrics_logger.get_metric_history("", "loss", "train"))


def state_of(trainer) -> Any:
    return nnx.as_pure(trainer.optimizer.opt_state)


def params_of(model) -> Any:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def assert_same(a: Any, b: Any):
    """Bit by bit, and in the same places."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def train(names, model, tx, steps, folder=None) -> Any:
    trainer = names["make_trainer"](model, tx, steps, folder)
    with names["mesh"]:
        trainer.train(names["batches"])
    return trainer


def only(step: int, folder: Path, copy: Path) -> Path:
    """A copy of the checkpoints in which `step` is the last one."""
    shutil.copytree(folder / str(step), copy / str(step))
    return copy


def factored_share(tx, params, prefix: str = "layers/") -> float:
    sizes = {True: 0, False: 0}
    for leaf in lp.describe(tx, params).leaves:
        if leaf.path.startswith(prefix):
            sizes[leaf.is_factored] += math.prod(leaf.shape)
    return sizes[True] / sum(sizes.values())


@pytest.fixture(scope="module")
def compilation_cache(tmp_path_factory):
    """Every trainer compiles anew what another one had compiled."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def pretrained(config, model_inputs) -> Any:
    """Weights of one text; what is trained on afterwards is another one."""
    model, rngs = llama3.Llama3(config, rngs=nnx.Rngs(params=0)), nnx.Rngs(1)
    for layer in model.layers:  # Tunix leaves them at zero.
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            linear.kernel[...] = 0.02 * rngs.normal(linear.kernel.shape)
    training = peft_trainer.TrainingConfig(eval_every_n_steps=1_000)
    trainer = peft_trainer.PeftTrainer(model, optax.adamw(RATE, b2=0.95), training)
    trainer.with_gen_model_input_fn(model_inputs).train(text_batches(argparse, 100))
    return jax.device_get(params_of(model))


@pytest.fixture(scope="module")
def trained(compilation_cache, quick_compilation, folder) -> dict[str, Any]:
    """What the page's first two sections leave behind."""
    names: dict[str, Any] = {"learning_rate": RATE, "steps": STEPS, "folder": folder}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run("A model", names)
        names["weights"] = pretrained(names["config"], names["model_inputs"])
        names["batches"] = text_batches(statistics, STEPS)
        return run("All weights", names)


# All weights.


def test_blocks_are_factored(trained):
    params = nnx.state(trained["model"], nnx.Param)
    assert factored_share(trained["tx"], params) >= 0.8
    assert factored_share(trained["tx"], params, "") >= 0.8


def test_final_loss(trained):
    model = trained["make_model"]()
    adamw = optax.adamw(RATE, b2=0.95, weight_decay=0.1)
    expected = losses(train(trained, model, adamw, STEPS))
    found = losses(trained["trainer"])
    assert len(found) == len(expected) == STEPS
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[-10:].mean() <= expected[-10:].mean() + 0.01


def assert_follows(trainer, model):
    """Rows and columns of every matrix here are sharded, hence all that has them."""
    state = state_of(trainer)
    factors = optax.tree_utils.tree_get(state, "mu_factors")
    others = optax.tree_utils.tree_get(state, "nu_factors")
    assert "layers/0/attn/q_proj/w" in factors
    for path in factors:
        pair = factors[path]
        rank = pair.left.shape[-1]
        for x in [pair.left, pair.right, *jax.tree.leaves(others[path])]:
            if x.shape != (rank,):
                assert not x.sharding.is_fully_replicated, (path, x.shape)
    norm = optax.tree_utils.tree_get(state, "mu")["final_norm"]["w"]
    sharding = params_of(model)["final_norm"]["w"].sharding
    assert not sharding.is_fully_replicated
    assert norm.sharding.is_equivalent_to(sharding, 1)


def test_state_is_sharded(trained):
    assert_follows(trained["trainer"], trained["model"])


def test_state_is_sharded_before_the_first_step(trained):
    """Tunix itself moves it, to where the boxes' metadata say."""
    model = trained["make_model"]()
    trainer = trained["make_trainer"](model, trained["tx"], 1)
    assert_follows(trainer, model)
    with trained["mesh"]:
        trainer._shard_optimizer(trained["mesh"])
    assert_follows(trainer, model)


def test_going_on_from_a_checkpoint(trained, folder, tmp_path):
    names = {**trained, "folder": only(SAVED, folder, tmp_path)}
    run("Going on from a checkpoint", names)
    found = losses(names["trainer"])
    np.testing.assert_array_equal(found, losses(trained["trainer"])[SAVED:])
    assert_same(params_of(names["trainer"].model), params_of(trained["model"]))
    assert_same(state_of(names["trainer"]), state_of(trained["trainer"]))


def test_injected_hyperparameters(trained, tmp_path):
    names = run("Hyperparameters that change, or that are logged", {**trained})
    make_model, tx, steps = names["make_model"], names["tx"], 4
    straight = train(names, make_model(), tx, steps, tmp_path / "a")
    assert straight._try_get_learning_rate() == pytest.approx(RATE)
    np.testing.assert_allclose(
        losses(straight), losses(trained["trainer"])[:steps], rtol=1e-3
    )
    # Orbax always saves after the first step.
    copy = only(1, tmp_path / "a", tmp_path / "b")
    resumed = train(names, make_model(), tx, steps, copy)
    assert len(losses(resumed)) == steps - 1
    assert_same(params_of(resumed.model), params_of(straight.model))
    assert_same(state_of(resumed), state_of(straight))


# Other models: only what would be factored.

SIZES = {"embed_dim": 256, "hidden_dim": 512, "num_heads": 8, "head_dim": 32}
LAYERS = {"num_layers": 1, "num_kv_heads": 4}
QWEN = {**SIZES, **LAYERS, "vocab_size": 512, "rope_theta": 10_000, "norm_eps": 1e-6}


def gemma_model(**kwargs):
    config = gemma.ModelConfig(
        **{**SIZES, **LAYERS, **kwargs},
        num_embed=512,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(gemma.AttentionType.GLOBAL,),
    )
    return gemma.Gemma(config, rngs=nnx.Rngs(params=0))


def gemma3_model():
    sizes = {**SIZES, **LAYERS, "num_embed": 512, "sliding_window_size": 64}
    config = gemma3.ModelConfig(**sizes)
    return gemma3.Gemma3(config, rngs=nnx.Rngs(params=0))


def qwen2_model():
    return qwen2.Qwen2(qwen2.ModelConfig(**QWEN), rngs=nnx.Rngs(params=0))


def qwen3_model(**kwargs):
    config = qwen3.ModelConfig(**QWEN, **kwargs)
    return qwen3.Qwen3(config, rngs=nnx.Rngs(params=0))


MODELS = {
    "gemma": gemma_model,
    "gemma, as many heads of keys": lambda: gemma_model(num_kv_heads=8),
    "gemma3": gemma3_model,
    "qwen2": qwen2_model,
    "qwen3": qwen3_model,
    "qwen3, experts": lambda: qwen3_model(num_experts=4, num_experts_per_tok=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_models(name):
    params = nnx.state(nnx.eval_shape(MODELS[name]), nnx.Param)
    tx = lp.lorapre_adamw(RATE, Fraction(1, 8))
    assert factored_share(tx, params) >= 0.8
    by_path = {leaf.path: leaf for leaf in lp.describe(tx, params).leaves}
    assert by_path["embedder/input_embedding"].is_factored
    # Fused heads: one side of every attention kernel is the model's width.
    for path, leaf in by_path.items():
        if "/attn/" in path and leaf.is_factored:
            assert SIZES["embed_dim"] in (leaf.p, leaf.q), path


# Tunix's command line.

CONFIG = """
model_config: {model_name: llama3.2-1b, model_source: huggingface,
  model_id: none, intermediate_ckpt_dir: none}
tokenizer_config: {tokenizer_type: sentencepiece, tokenizer_path: none}
optimizer_config: {opt_type: adamw, learning_rate: 1.0e-5}
training_config: {max_steps: 1}
"""


@pytest.fixture
def command_line(tmp_path, monkeypatch):
    """The optimizer that `peft_main` would make."""
    monkeypatch.setattr(optax, "lorapre_adamw", None, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG)

    def make(*arguments):
        argv = ["peft_main", "config.yaml", "optimizer_config.opt_type=lorapre_adamw"]
        config = HyperParameters([*argv, *arguments])
        return config.create_optimizer("optimizer_config")

    return make


def test_command_line(command_line):
    run("From Tunix's command line", {"__name__": "finetune"})
    tx = command_line(
        "optimizer_config.learning_rate=1e-3", "optimizer_config.weight_decay=0.1"
    )
    config = llama3.ModelConfig.llama3p2_1b()
    model = nnx.eval_shape(lambda: llama3.Llama3(config, rngs=nnx.Rngs(params=0)))
    params = nnx.state(model, nnx.Param)
    assert factored_share(tx, params) >= 0.8
    ranks = {leaf.rank for leaf in lp.describe(tx, params).leaves if leaf.is_factored}
    assert ranks == {128}
    hyperparams = tx.init({"w": np.zeros((4, 4), np.float32)}).hyperparams
    assert hyperparams["learning_rate"] == pytest.approx(1e-3)
    assert hyperparams["weight_decay"] == pytest.approx(0.1)


def test_command_line_takes_a_schedule(command_line, trained):
    run("From Tunix's command line", {"__name__": "finetune"})
    tx = command_line(
        "optimizer_config.schedule_type=warmup_cosine_decay_schedule",
        "optimizer_config.init_value=1e-3",
        "optimizer_config.peak_value=2e-3",
        "optimizer_config.warmup_steps=2",
        "optimizer_config.decay_steps=10",
    )
    trainer = train(trained, trained["make_model"](), tx, 2)
    assert np.isfinite(losses(trainer)).all()
    assert trainer._try_get_learning_rate() == pytest.approx(1.5e-3)


def test_command_line_makes_every_number_a_hyperparameter(command_line):
    """Why the launcher does not simply hand over the library's function."""
    optax.lorapre_adamw = lp.lorapre_adamw  # `command_line` takes it back.
    tx = command_line("optimizer_config.learning_rate=1e-3", "optimizer_config.rank=16")
    with pytest.raises(TypeError, match="static_args"):
        tx.init({"w": np.zeros((128, 128), np.float32)})


# LoRA adapters.


def lora_model(names) -> Any:
    provider = qwix.LoraProvider(
        module_path=".*(q|k|v|o|gate|up|down)_proj", rank=8, alpha=16.0
    )
    model = names["make_model"]()
    with names["mesh"]:
        model = qwix.apply_lora_to_model(
            model, provider, rngs=nnx.Rngs(0), **model.get_model_input()
        )
    return reshard_model_to_mesh(model, names["mesh"])


def test_adapters_stay_dense(trained, tmp_path):
    model, ours = lora_model(trained), lp.lorapre_adamw(RATE, 16)
    report = lp.describe(ours, nnx.state(model, nnx.LoRAParam))
    assert all("_lora_" in leaf.path for leaf in report.leaves)
    assert not any(leaf.is_factored for leaf in report.leaves)
    trainer = train(trained, model, ours, 3, tmp_path)
    dense = optax.adamw(RATE, b2=0.95, weight_decay=0.0)
    expected = losses(train(trained, lora_model(trained), dense, 3))
    np.testing.assert_allclose(losses(trainer), expected, rtol=1e-5)
    resumed = trained["make_trainer"](lora_model(trained), ours, 3, tmp_path)
    assert resumed.train_steps == 3
    assert_same(state_of(resumed), state_of(trainer))
