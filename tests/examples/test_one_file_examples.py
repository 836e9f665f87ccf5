"""The one-file examples run, and do what they say."""

import math
import re

import jax
import matplotlib.image
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import lorapre_jax as lp
from examples import nano_llama, pod, quickstart
from examples.llama.config import ModelConfig

TINY = nano_llama.Config(
    width=128,  # the smallest side that is factored by default
    ffn_width=64,  # the MLP stays dense, which compiles faster
    num_heads=2,
    num_layers=2,
    batch_size=4,
    seq_len=16,
    steps=15,
    held_out_rows=16,
    eval_every=10,
    learning_rate=1e-2,
    rank=4,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Writes fifty Python files of 5 kB, two of them held out, and ignored ones."""
    folder = tmp_path_factory.mktemp("sources")
    for number in range(50):
        line = f"value_{number} = {number} + {number}\n"
        (folder / f"module_{number}.py").write_text(line * (5_200 // len(line)))
    (folder / "copy.py").write_text((folder / "module_7.py").read_text())
    for name in ("tests", "site-packages"):
        (folder / name).mkdir()
        (folder / name / "other.py").write_text("not to be learnt\n" * 1_000)
    return folder


def printed_losses(capsys):
    return [
        float(x)
        for x in re.findall(r"loss.* (\d\.\d+)$", capsys.readouterr().out, re.M)
    ]


def test_quickstart_continues_from_what_it_saved(tmp_path, capsys):
    quickstart.main(tmp_path / "saved", steps=3)
    losses = printed_losses(capsys)
    model, optimizer = quickstart.create()
    data = jax.random.normal(jax.random.key(0), (3, 64, 256))
    unbroken = [quickstart.train_step(model, optimizer, x) for x in [*data, *data]]
    assert losses == [round(float(unbroken[i]), 4) for i in (2, 5)]
    assert losses[1] < losses[0] < unbroken[0]


def test_nano_llama_compares_the_two(sources, tmp_path, capsys, monkeypatch):
    text = nano_llama.read_text(sources)
    monkeypatch.setattr(nano_llama, "read_text", lambda: text)
    parts, batches, sample = [], [], nano_llama.sample

    def recorded(part, *arguments):
        parts.append(part is text.held_out)
        batches.append(sample(part, *arguments))
        return batches[-1]

    monkeypatch.setattr(nano_llama, "sample", recorded)
    picture = tmp_path / "new" / "nano.png"
    runs = nano_llama.main(TINY, picture)
    adamw, ours = runs["AdamW"], runs["lorapre_adamw"]
    assert adamw.steps == ours.steps == [0, 10, 15]
    assert adamw.losses[0] == ours.losses[0] == pytest.approx(math.log(256), abs=0.1)
    for run in runs.values():
        assert run.losses[-1] < 3
    params = nnx.state(nano_llama.Llama(TINY, nnx.Rngs(0)), nnx.Param)
    for name, tx in nano_llama.make_optimizers(TINY).items():
        assert runs[name].state_bytes == lp.describe(tx, params).total_bytes
    assert ours.state_bytes < 0.4 * adamw.state_bytes
    printed = capsys.readouterr().out
    for name, run in runs.items():
        row = rf"^{name} +{run.losses[-1]:.3f} +{run.state_bytes:,} bytes$"
        assert re.search(row, printed, re.M)
    assert str(picture) in printed.splitlines()[-1]
    assert matplotlib.image.imread(picture).std() > 0.05  # not blank
    assert parts == 2 * ([True] + TINY.steps * [False])
    half = len(batches) // 2
    for one, other in zip(batches[:half], batches[half:], strict=True):
        np.testing.assert_array_equal(one, other)
    assert len({batch.tobytes() for batch in map(np.asarray, batches)}) == half


def test_nano_llama_reads_each_file_into_one_part(sources):
    text = nano_llama.read_text(sources)
    parts = [bytes(np.asarray(part)).split(b"\0") for part in text]
    assert [len(part) for part in parts] == [48, 2]
    files = {(sources / f"module_{i}.py").read_bytes() for i in range(50)}
    assert {*parts[0], *parts[1]} == files


def test_nano_llama_names_a_folder_without_text(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}.*too few Python sources"):
        nano_llama.read_text(tmp_path)


def test_nano_llama_samples_all_of_the_text():
    text = jax.numpy.arange(10, dtype="uint8")
    rows = nano_llama.sample(text, jax.random.key(0), 200, 8)
    assert {tuple(row.tolist()) for row in rows} == {
        tuple(range(start, start + 8)) for start in range(3)
    }


def test_nano_llama_is_a_llama(numpy_logits):
    """Its logits are those of NumPy's causal Llama in float64."""
    model = nano_llama.Llama(TINY, nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 256)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    # Larger weights, so that attention and positions weigh in.
    params = jax.tree.map(lambda x: 4 * x, params)
    nnx.update(model, params)
    logits = model(tokens)
    stacked = params["layers"]
    params["layers"] = [
        jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(TINY.num_layers)
    ]
    config = ModelConfig(
        width=128, ffn_width=64, num_layers=2, num_heads=2, norm_eps=1e-6
    )
    expected = [numpy_logits(params, row, config) for row in np.asarray(tokens)]
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture
def small_pod(monkeypatch):
    monkeypatch.setattr(pod, "WIDTH", 128)


def test_pod_continues_on_a_smaller_mesh_at_another_rank_and_in_adamw(
    small_pod, tmp_path, capsys
):
    params, state = pod.main(tmp_path / "saved", steps=4)
    losses = printed_losses(capsys)
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    adam = state[0]
    assert adam.count == 16
    for tree in (params, adam.mu, adam.nu):
        for name, spec in pod.LAYOUT.items():
            assert tree[name].sharding.spec == spec
            assert tree[name].sharding.mesh.size == 4


def test_pod_shards_and_restores_every_factor(small_pod, tmp_path):
    tx = lp.lorapre_adamw(1e-3, rank=16)
    big = pod.layout(pod.make_mesh(8))
    params = jax.device_put(pod.init(jax.random.key(0)), big)
    state = tx.init(params)
    params, state = pod.train("", tx, params, state, 1)
    pod.save(tmp_path / "saved", params, state)
    back = pod.restore(tmp_path / "saved", tx, pod.make_mesh(4))
    jax.tree.map(np.testing.assert_array_equal, back, (params, state))
    left = back[1][0].mu_factors["down"].left
    assert left.sharding.spec == P("tensor", None)
    assert left.sharding.mesh.size == 4
    other = lp.lorapre_adamw(1e-3, rank=8)
    with pytest.raises(ValueError, match="rank"):
        pod.restore(tmp_path / "saved", other, pod.make_mesh(4))


def test_pod_says_how_many_devices_it_needs(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="JAX_NUM_CPU_DEVICES=8"):
        pod.main(tmp_path)
