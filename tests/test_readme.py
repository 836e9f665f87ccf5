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
    "docs/recipes/flax.md",
    "docs/recipes/haliax.md",
    "docs/recipes/maxtext.md",
    "docs/recipes/tunix.md",
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
    config = ModelConfig(width=256, ffn_width=512, num_layers=2)
    model = PureLlama(config, 512)
    params = jax.eval_shape(model.init, jax.random.key(0))
    names: dict[str, Any] = {"lp": lp, "optax": optax, "params": params}
    select, by_pattern, budget, _ = blocks("Choosing leaves and rank")

    def kept(code: str) -> dict[str, Any]:
        exec(code, names)
        report = lp.describe(names["tx"], params)
        return {x.path: x.methods[1] for x in report.leaves if x.is_factored}

    by_hand = kept(select)
    assert by_hand["embed/embedding"] == lp.RankOne()
    assert by_hand["layers/mlp/up/kernel"] == lp.RotatedRankOne()
    assert "head/kernel" not in by_hand
    chosen = kept(by_pattern)
    assert chosen["layers/mlp/down/kernel"] == lp.Dense()
    assert chosen["layers/attention/q/kernel"] == lp.RankOne()
    assert chosen["layers/mlp/up/kernel"] == lp.RotatedRankOne()
    assert chosen["head/kernel"] == lp.RankOne()
    assert not any("norm" in path for path in chosen)
    exec(budget.split("found =")[0], names)
    tx = lp.scale_by_lorapre_adam(names["rank"], matrices=names["matrices"])
    assert lp.describe(tx, params).total_bytes <= 2 * 2**30


def test_the_first_example():
    """A Llama by default: all but the norms, ends and blocks each in their own way."""
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    config = ModelConfig(width=256, ffn_width=512, num_layers=2)
    model = PureLlama(config, 512)
    params = jax.eval_shape(model.init, jax.random.key(0))
    names: dict[str, Any] = {"params": params}
    exec(code.replace("rank=128", "rank=32"), names)
    leaves = lp.describe(names["tx"], params).leaves
    kept = {leaf.path: leaf.methods[1] for leaf in leaves if leaf.is_factored}
    norms = {leaf.path for leaf in leaves if "norm" in leaf.path}
    assert kept.keys() == {leaf.path for leaf in leaves} - norms
    ends = {path for path, method in kept.items() if method == lp.RankOne()}
    assert ends == {"embed/embedding", "head/kernel"}


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
