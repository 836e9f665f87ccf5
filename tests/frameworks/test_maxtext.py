"""MaxText's own training loop with the launcher of docs/recipes/maxtext.md.

Needs an environment with MaxText; `make test-maxtext` makes one.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("maxtext", reason="MaxText is not installed: make test-maxtext")

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "recipes" / "maxtext.md"
RANK = 16
STEPS = 10

# Three scanned layers; 8 devices, 4 along the width and 2 along heads and hidden units.
SETTINGS = {
    "run_name": "run",
    "hardware": "cpu",
    "dataset_type": "synthetic",
    "skip_jax_distributed_system": "true",
    "enable_goodput_recording": "false",
    "enable_tensorboard": "false",
    "log_config": "false",
    "enable_checkpointing": "false",
    "async_checkpointing": "false",
    "checkpoint_period": 100,
    "base_num_decoder_layers": 3,
    "base_emb_dim": 128,
    "base_mlp_dim": 256,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_target_length": 64,
    "per_device_batch_size": 1,
    "dtype": "float32",
    "weight_dtype": "float32",
    "attention": "dot_product",
    "ici_fsdp_parallelism": 4,
    "ici_tensor_parallelism": 2,
    "steps": STEPS,
    "learning_rate_schedule_steps": STEPS,
    "learning_rate": 3e-3,
    "muon_consistent_rms": 0.2,
    "lorapre_rank": RANK,
}
ADAM = {"opt_type": "lorapre_adamw"}
MUON = {"opt_type": "lorapre_muon"}
AXES = {"lorapre_muon_axes": "true"}
RUNS = {
    "adamw": {"opt_type": "adamw"},
    "muon": {"opt_type": "muon"},
    "lorapre_adamw": ADAM,
    "lorapre_muon": MUON,
    "lorapre_muon, axes": MUON | AXES,
    "accumulated, axes": ADAM | AXES | {"gradient_accumulation_steps": 2},
    "zero 1": ADAM
    | {
        "shard_optimizer_over_data": "true",
        "ici_fsdp_parallelism": 1,
        "ici_data_parallelism": 4,
    },
    "explicit": ADAM | {"shard_mode": "explicit"},
    "mlps on host": ADAM
    | {
        "trainable_parameters_mask": "['mlp']",
        "optimizer_memory_host_offload": "true",
    },
    "five steps": ADAM | {"steps": STEPS // 2, "enable_checkpointing": "true"},
}
# In another process, from the checkpoint of "five steps".
AGAIN = {
    "another rank": ADAM | {"enable_checkpointing": "true", "lorapre_rank": RANK // 2},
    "resumed": ADAM | {"enable_checkpointing": "true"},
}

# Rows and columns of the leaves' matrices; what is left are batch axes.
AXES_OF = {
    "logits_dense/kernel": ((0,), (1,)),
    "token_embedder/embedding": ((0,), (1,)),
    "wi_0/kernel": ((0,), (2,)),
    "wi_1/kernel": ((0,), (2,)),
    "wo/kernel": ((0,), (2,)),
    "query/kernel": ((0,), (2, 3)),
    "key/kernel": ((0,), (2, 3)),
    "value/kernel": ((0,), (2, 3)),
    "out/kernel": ((0, 2), (3,)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("maxtext")


@pytest.fixture(scope="module")
def runs(folder):
    return Runs(maxtext(RUNS, folder))


@pytest.fixture(scope="module")
def again(folder, runs):
    return Runs(maxtext(AGAIN, folder))


class Runs(dict):
    """One that failed says so where it is asked for."""

    def __getitem__(self, name: str) -> dict:
        run = super().__getitem__(name)
        assert "error" not in run, run["error"][-4000:]
        return run


def maxtext(runs: dict[str, dict], folder: Path) -> dict[str, dict]:
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    launcher = folder / "lorapre_maxtext.py"
    launcher.write_text(code)
    where = {"base_output_directory": folder, "jax_cache_dir": folder / "programs"}
    arguments = {
        name: [f"{key}={value}" for key, value in (SETTINGS | where | run).items()]
        for name, run in runs.items()
    }
    asked, results = folder / "runs.json", folder / "results.json"
    asked.write_text(json.dumps(arguments))
    results.unlink(missing_ok=True)
    command = [sys.executable, HERE / "maxtext_runs.py", launcher, asked, results]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(results.read_text())


def final(run: dict) -> float:
    losses = run["losses"]
    assert all(map(math.isfinite, losses)), losses
    return losses[-1]


def slashes(path: str) -> str:
    return path.replace("|", "/")


def blocks(run: dict) -> dict[str, dict]:
    return {path: x for path, x in run["kept"].items() if "/layers/" in path}


def factors(run: dict) -> list[tuple[str, str, dict]]:
    """Path of the parameter, name of the factor, its placement."""
    found = []
    for path, array in run["state"].items():
        if match := re.search(r"_factors\|(.*)\|(\w+)$", path):
            found.append((slashes(match[1]), match[2], array))
    assert found
    return found


def axes_of(path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return next(axes for end, axes in AXES_OF.items() if path.endswith(end))


def share(run: dict, path: str, name: str) -> list[int]:
    """The shape that a factor has on each device: of the parameter's share there."""
    params = {slashes(key): value for key, value in run["params"].items()}
    on_a_device = params[path]["on_a_device"]
    rows, columns = axes_of(path)
    batch = [n for i, n in enumerate(on_a_device) if i not in rows + columns]
    sides = {
        "left": [on_a_device[i] for i in rows] + [RANK],
        "right": [on_a_device[i] for i in columns] + [RANK],
        "row": [on_a_device[i] for i in rows],
        "column": [on_a_device[i] for i in columns],
        "direction": [RANK],
    }
    return batch + sides[name]


def nbytes(arrays) -> int:
    return sum(math.prod(x["on_a_device"]) * x["itemsize"] for x in arrays)


@pytest.mark.parametrize(
    "name", ["lorapre_adamw", "lorapre_muon", "lorapre_muon, axes", "accumulated, axes"]
)
class TestState:
    def test_most_of_the_blocks_is_factored(self, runs, name):
        leaves = blocks(runs[name]).values()
        factored = sum(leaf["size"] for leaf in leaves if leaf["rank"])
        assert factored >= 0.8 * sum(leaf["size"] for leaf in leaves)

    def test_factors_are_sharded_as_their_parameters(self, runs, name):
        for path, factor, array in factors(runs[name]):
            assert array["on_a_device"] == share(runs[name], path, factor), path

    def test_bytes_on_a_device(self, runs, name):
        # Of r (p + q) + p + q + r numbers for Adam, r (p + q) for Muon.
        run, expected = runs[name], 0
        params = {slashes(path): array for path, array in run["params"].items()}
        moments = 1 if name.startswith("lorapre_muon") else 2
        for path, leaf in blocks(run).items():
            on_a_device = params[path]["on_a_device"]
            if leaf["rank"] is None:
                dense = 2  # Adam's: no other leaf of a block is dense.
                expected += dense * math.prod(on_a_device)
                continue
            rows, columns = axes_of(path)
            p = math.prod(on_a_device[i] for i in rows)
            q = math.prod(on_a_device[i] for i in columns)
            numbers = RANK * (p + q) + (moments - 1) * (p + q + RANK)
            expected += math.prod(on_a_device) // (p * q) * numbers
        state = run["state"].items()
        assert nbytes(x for path, x in state if "layers" in path) == 4 * expected


def test_adam_is_ahead_of_adamw(runs):
    assert final(runs["lorapre_adamw"]) <= final(runs["adamw"]) + 0.01


@pytest.mark.parametrize("name", ["lorapre_muon", "lorapre_muon, axes"])
def test_muon_is_not_behind_maxtexts(runs, name):
    assert final(runs[name]) <= final(runs["muon"])
    assert runs[name]["shares"], "the compiler was left to gather the matrices"


def test_accumulated_gradients(runs):
    losses = runs["accumulated, axes"]["losses"]
    assert final(runs["accumulated, axes"]) < losses[0] / 2


@pytest.mark.parametrize("name", ["zero 1", "explicit"])
def test_the_sharding_changes_nothing(runs, name):
    expected = pytest.approx(runs["lorapre_adamw"]["losses"], rel=1e-3)
    assert runs[name]["losses"] == expected


def test_zero_one_divides_the_state(runs):
    arrays = runs["zero 1"]["state"].values()
    whole = 4 * sum(math.prod(array["shape"]) for array in arrays)
    # What cannot be divided is small: counters, and what has the rank as its only axis.
    assert nbytes(arrays) < whole / 3


def test_only_trainable_parameters_move(runs):
    run = runs["mlps on host"]
    moved = [path for path in run["start"] if run["start"][path] != run["end"][path]]
    assert moved
    assert all("|mlp|" in path for path in moved)
    assert all("mlp" in path for path, x in run["state"].items() if x["shape"])


def test_state_on_the_host(runs):
    arrays = runs["mlps on host"]["state"].values()
    assert {array["memory"] for array in arrays} == {"pinned_host"}


def test_resumes_in_a_new_process(runs, again):
    at_once, half = runs["lorapre_adamw"], runs["five steps"]
    assert half["losses"] + again["resumed"]["losses"] == at_once["losses"]
    assert again["resumed"]["end"] == at_once["end"]


def test_another_rank_does_not_restore(again):
    error = dict(again)["another rank"]["error"]
    assert "is not compatible with the stored shape" in error
