"""The README's code, as printed."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import lorapre_jax as lp
from examples.llama.config import ModelConfig
from examples.llama.pure import PureLlama

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def blocks(section: str) -> list[str]:
    text = README.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "examples/llama/README.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"\W", "-", t).lower() for t in titles], link


def test_choosing_leaves_and_rank():
    model = PureLlama(ModelConfig(width=128, ffn_width=256, num_layers=2), 256)
    params = jax.eval_shape(model.init, jax.random.key(0))
    names: dict[str, Any] = {"lp": lp, "optax": optax, "params": params}
    select, embeddings, budget, _ = blocks("Choosing leaves and rank")
    exec(select + embeddings + budget.split("found =")[0], names)
    kept = {leaf.path: leaf for leaf in lp.describe(names["tx"], params).leaves}
    assert kept["embed/embedding"].methods[1] == lp.RankOne()
    assert kept["layers/mlp/up/kernel"].methods[1] == lp.RotatedRankOne()
    assert kept["layers/mlp/up/kernel"].rank == kept["head/kernel"].rank == 64
    assert not kept["norm/scale"].is_factored
    assert names["rank"] <= 1


def test_on_a_pod(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    first, second = blocks("On a pod")
    exec(first, names)
    spec = names["state"][0].mu_factors["down"].left.sharding.spec
    assert tuple(spec) == ("tensor", None)
    before = jax.device_get(names["params"])
    exec(second, names)
    assert names["params"]["up"].sharding.mesh.shape == {"fsdp": 2}
    jax.tree.map(np.testing.assert_array_equal, names["params"], before)
    adam = names["state"][0]
    assert adam.count == 1
    assert adam.mu["up"].sharding.spec == jax.sharding.PartitionSpec("fsdp")
    assert np.linalg.matrix_rank(adam.mu["up"], 1e-4) <= 8
