"""The recipe for Haliax and Levanter, as printed, on a mesh of eight devices."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import lorapre_jax as lp

hax = pytest.importorskip("haliax")
eqx = pytest.importorskip("equinox")

# Of the frameworks, not of this library.
pytestmark = pytest.mark.filterwarnings("default")

PAGE = Path(__file__).parents[2] / "docs" / "recipes" / "haliax.md"
STEPS = 40
RATE = 3e-3
OPTIMIZERS = {
    "adamw": lambda: lp.lorapre_adamw(RATE, rank=16),
    "muon": lambda: lp.lorapre_muon(RATE, rank=16, consistent_rms=0.2),
}


def blocks(language: str, section: str) -> list[str]:
    """The page's code below a heading, each block on its own lines of the page."""
    text = PAGE.read_text()
    start = text.index(f"\n## {section}\n")
    end = (text + "\n## ").index("\n## ", start + 1)
    code = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    found = code.finditer(text, start, end)
    return ["\n" * text.count("\n", 0, x.start(1)) + x[1] for x in found]


def execute(codes: list[str], names: dict[str, Any] | None = None) -> dict[str, Any]:
    names = {"__name__": "recipe"} if names is None else names
    for code in codes:
        exec(compile(code, str(PAGE), "exec"), names)
    return names


def recipe(tx: optax.GradientTransformation) -> SimpleNamespace:
    """The page's functions with another optimizer."""
    model, functions, _ = blocks("python", "Haliax")
    names = execute([model, functions, *blocks("python", "Checkpoints")])
    auto = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((4, 2), ("data", "model"), auto)
    names |= {"tx": tx, "mesh": mesh}
    return SimpleNamespace(**names)


@pytest.fixture(scope="module", params=OPTIMIZERS)
def page(request):
    page = recipe(OPTIMIZERS[request.param]())
    with hax.partitioning.set_mesh(page.mesh):
        yield page


@pytest.fixture(scope="module")
def reference_loss() -> float:
    """AdamW's, at the same rate."""
    page = recipe(optax.adamw(RATE, b2=0.95, weight_decay=0.0))
    with hax.partitioning.set_mesh(page.mesh):
        *_, losses = train(page, *page.init(jax.random.key(0)), range(STEPS))
    return float(np.mean(losses[-5:]))


def batch(page, step: int):
    """Bytes of the page itself."""
    text = np.frombuffer(PAGE.read_bytes(), np.uint8)
    length = page.Position.size
    starts = np.random.default_rng(step).integers(len(text) - length, size=(16, 1))
    tokens = text[starts + np.arange(length)].astype(np.int32)
    return hax.named(tokens, (page.Batch, page.Position))


def train(page, model, state, steps) -> tuple[Any, Any, list[float]]:
    losses = []
    for step in steps:
        model, state, loss = page.train_step(model, state, batch(page, step))
        losses.append(float(loss))
    return model, state, losses


def is_named(x) -> bool:
    return isinstance(x, hax.NamedArray)


def is_linear(x) -> bool:
    return isinstance(x, hax.nn.Linear)


def named_leaves(tree, is_leaf=is_named) -> dict[str, Any]:
    """NamedArrays and bare arrays, by path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in flat}


def names_of(axes) -> tuple[str, ...]:
    axes = axes if isinstance(axes, tuple) else (axes,)
    return tuple(axis.name for axis in axes)


def assert_factored(model, state, within: str):
    """At least 80 % of a stack's parameters, and the right way round."""
    every = all_factors(state)
    leaves = named_leaves(model, lambda x: is_named(x) or is_linear(x))
    stack = {p: x for p, x in leaves.items() if within in p}
    total = sum(x.size for x in jax.tree.leaves(list(stack.values())))
    factored = 0
    for path, layer in stack.items():
        if is_linear(layer) and (factors := every.get(f"{path}/weight")) is not None:
            factored += layer.weight.size
            assert_oriented(layer, factors)
    assert factored >= 0.8 * total, (factored, total, sorted(every))


def all_factors(state) -> dict[str, Any]:
    """By path, of Adam's first moment and of Muon's."""
    fields = ("mu_factors", "momentum_factors")
    found = [optax.tree.get_all_with_path(state, field) for field in fields]
    return {path: x for each in found for _, kept in each for path, x in kept.items()}


def assert_oriented(layer, factors):
    rows, columns = names_of(layer.In), names_of(layer.Out)
    names = layer.weight.axis_names
    # A weight has its axes in some order; batch axes are those of neither side.
    batch_axes = tuple(n for n in names if n not in rows + columns)
    assert len(batch_axes) == 1
    (*left, left_rank), (*right, right_rank) = (x.axis_names for x in factors)
    assert tuple(left) == batch_axes + rows
    assert tuple(right) == batch_axes + columns
    assert left_rank == right_rank
    assert left_rank not in names


def assert_sharded(state, mapping, mesh):
    """By the names of the axes; what has no names is small."""
    sharded = 0
    for path, x in named_leaves(state).items():
        if not is_named(x):
            assert x.size <= 1, (path, x.shape)
            continue
        assert not isinstance(x.array, optax.MaskedNode), path  # The whole array is.
        spec = hax.partitioning.pspec_for_axis(x.axis_names, mapping)
        place = NamedSharding(mesh, spec)
        assert x.array.sharding.is_equivalent_to(place, x.ndim), (path, x.array)
        sharded += not place.is_fully_replicated
    assert sharded


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_page_runs_as_printed(capsys):
    execute(blocks("python", "Haliax"))
    left, left_spec, right, right_spec = capsys.readouterr().out.splitlines()
    assert left_spec == "P(None, 'data', None)"
    assert right_spec == "P(None, 'model', None, None)"
    assert "embed" in left
    assert "head_size" in right


def test_the_blocks_are_factored_with_rows_as_their_input(page):
    model, state = page.init(jax.random.key(0))
    assert_factored(model, state, "blocks/stacked")


def test_the_state_lies_as_the_names_of_its_axes_say(page):
    model, state = page.init(jax.random.key(0))
    assert_sharded(state, page.mapping, page.mesh)
    model, state, _ = train(page, model, state, range(5))
    assert_sharded(state, page.mapping, page.mesh)


def test_the_rank_is_not_divided(page):
    _, state = page.init(jax.random.key(0))
    for factors in all_factors(state).values():
        for factor in factors:
            spec = tuple(factor.array.sharding.spec)
            assert len(spec) < factor.ndim or spec[-1] is None


def test_it_trains_like_adamw(page, reference_loss):
    *_, losses = train(page, *page.init(jax.random.key(0)), range(STEPS))
    assert reference_loss < losses[0] - 2  # It has learned something.
    assert np.mean(losses[-5:]) <= reference_loss + 0.01


def test_orbax_restores_a_run_exactly(page, tmp_path):
    model, state, _ = train(page, *page.init(jax.random.key(0)), range(3))
    page.save(tmp_path / "run", model, state)
    again = page.restore(tmp_path / "run")
    assert_same(again, (model, state))
    assert_sharded(again[1], page.mapping, page.mesh)
    on, again_on = (train(page, *each, range(3, 5)) for each in ((model, state), again))
    assert_same(again_on, on)


def levanter_settings(folder: Path, changes: str):
    """The page's llama.yaml, read by Levanter."""
    import draccus
    from levanter.main.train_lm import TrainLmConfig

    (text,) = blocks("yaml", "Levanter")
    path = folder / "llama.yaml"
    path.write_text(text.replace("type: lorapre_adamw", changes))
    return draccus.parse(TrainLmConfig, path, args=[])


@pytest.fixture(scope="module")
def registered():
    pytest.importorskip("levanter")
    execute(blocks("python", "Levanter"))


@pytest.fixture
def run(request, registered, tmp_path):
    """Levanter's trainer, its state after a few steps, and how to take one."""
    from levanter.tracker import NoopConfig
    from levanter.trainer import Trainer

    settings = levanter_settings(tmp_path, f"type: {request.param}")
    config = settings.trainer
    config.tracker, config.log_dir = NoopConfig(), tmp_path / "logs"
    config.log_jaxprs = config.log_xla_hlo = False
    config.checkpointer.base_path = str(tmp_path / "checkpoints")
    config.id = "run"
    tx = settings.optimizer.build(config.num_train_steps)

    def loss_function(model, example, *, key=None):
        return model.compute_next_token_loss(example, key=key)

    vocab = hax.Axis("vocab", 256)
    with Trainer(config, tx, loss_function, add_default_hooks=False) as trainer:
        yield SimpleNamespace(
            trainer=trainer,
            start=lambda: trainer.initial_state(
                jax.random.PRNGKey(0),
                model_init=lambda: settings.model.build(
                    vocab, key=jax.random.PRNGKey(1)
                ),
            ),
            max_seq_len=settings.model.max_seq_len,
            rule=settings.optimizer.rule(RATE),
        )


def levanter_steps(run, state, steps):
    from levanter.models.lm_model import LmExample

    trainer = run.trainer
    axes = trainer.config.TrainBatch, hax.Axis("position", run.max_seq_len)
    names = SimpleNamespace(Batch=axes[0], Position=axes[1])  # As in the page.
    losses = []
    for step in steps:
        tokens = hax.shard(batch(names, step), trainer.compute_axis_mapping)
        info = trainer.train_step(state, hax.vmap(LmExample.causal, axes[0])(tokens))
        state = info.state
        losses.append(float(info.loss))
    return state, losses


@pytest.mark.parametrize("run", ["lorapre_adamw", "lorapre_muon"], indirect=True)
def test_levanter_trains_with_a_sharded_state(run):
    trainer = run.trainer
    state = run.start()
    kept = run.rule.init(eqx.filter(state.model, eqx.is_inexact_array))
    assert_factored(state.model, kept, "layers/stacked")
    state, losses = levanter_steps(run, state, range(STEPS))
    assert losses[-1] < losses[0] - 1
    mapping, mesh = trainer.parameter_axis_mapping, trainer.device_mesh
    assert_sharded(state.opt_state, mapping, mesh)


@pytest.mark.parametrize("run", ["lorapre_adamw"], indirect=True)
def test_levanter_restores_a_run_exactly(run, tmp_path):
    from levanter.checkpoint import load_checkpoint, save_checkpoint

    state, _ = levanter_steps(run, run.start(), range(3))
    folder = str(tmp_path / "saved")
    save_checkpoint(state.saveable_state, 3, folder)
    mapping, mesh = run.trainer.parameter_axis_mapping, run.trainer.device_mesh
    again = load_checkpoint(run.start(), folder, axis_mapping=mapping, mesh=mesh)
    assert_same(again, state)
    on, again_on = (levanter_steps(run, each, range(3, 5)) for each in (state, again))
    assert on[1] == again_on[1]
    assert_same(on[0], again_on[0])


def test_gpt2_has_its_input_first(registered):
    """Levanter's GPT-2 has the axes of its weights the other way round."""
    from levanter.models.gpt2 import Gpt2Config
    from levanter.trainer_state import trainables_only

    settings = Gpt2Config(max_seq_len=32, hidden_dim=128, num_layers=2, num_heads=4)
    vocab = hax.Axis("vocab", 256)
    model = trainables_only(settings.build(vocab, key=jax.random.PRNGKey(0)), True)
    assert_factored(model, OPTIMIZERS["adamw"]().init(model), "blocks/stacked")
