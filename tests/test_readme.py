"""The README: its example, its table, its figure, its length."""

import dataclasses
import re

import jax
import pages

import lorapre_jax as lp
from benchmarks.quality import front_page
from benchmarks.quality.report import seconds_a_step
from examples.llama.config import PRESETS
from examples.llama.pure import PureLlama

README = (pages.ROOT / "README.md").read_text()


def test_the_example_runs_as_printed():
    """On the shapes of the 60M Llama: all but the norms, ends and blocks each in
    their own way."""
    model = PureLlama(PRESETS["60m"], 32_000)
    params = jax.eval_shape(model.init, jax.random.key(0))
    names = pages.run("README.md", {"params": params})
    leaves = lp.describe(names["tx"], params).leaves
    kept = {leaf.path: leaf.methods[1] for leaf in leaves if leaf.is_factored}
    assert kept.keys() == {leaf.path for leaf in leaves if "norm" not in leaf.path}
    ends = {path for path, method in kept.items() if method == lp.RankOne()}
    assert ends == {"embed/embedding", "head/kernel"}


def test_it_is_short():
    example = next(x for x in pages.blocks("README.md") if x.language == "python")
    assert len(example.text.splitlines()) <= 15
    assert len(README.splitlines()) <= 110
    assert len(README.split()) <= 900
    assert len([x for x in README.splitlines() if x.startswith("| ---")]) == 1


def test_it_has_every_target_that_ci_runs():
    makefile = (pages.ROOT / "Makefile").read_text()
    continuous = (pages.ROOT / ".ci" / "run").read_text().splitlines()
    targets = re.findall(r"^(test[\w-]*|docs):", makefile, re.MULTILINE)
    assert {"test", "test-newest", "docs"} <= {*targets}
    for target in targets:
        assert f"make {target}" in continuous
        named = rf"`(make )?{target}`|^    make {target} "
        assert re.search(named, README, re.MULTILINE), target


def test_it_has_the_committed_table():
    by_method = front_page.committed()
    table = front_page.front_table(by_method, seconds_a_step(front_page.SCALE))
    assert len(table.splitlines()) == 2 + 7
    assert f"\n\n{table}\n\n" in README


def test_the_best_peers_are_in_the_table():
    by_method = front_page.committed()
    worse = {"soap": 9.0, "muon": 9.5, "fira/4": 9.0}
    for method, loss in worse.items():
        line = by_method[method]
        by_method[method] = dataclasses.replace(line, losses=[loss, loss])
    times = dict.fromkeys(by_method, 1.0)
    table = front_page.front_table(by_method, times)
    assert "AdamW, b1 = 0.5" in table
    assert "SOAP" in table
    assert "`optax.contrib.muon`" not in table
    assert "| GaLore | width / 4 |" in table
    assert "Fira" not in table


def test_every_point_is_on_the_axes(tmp_path):
    by_method = front_page.committed()
    axes = front_page.draw(by_method, tmp_path / "figure.png")
    (low, high), (left, right) = axes.get_ylim(), axes.get_xlim()
    for method, (label, *_) in front_page.POINTS.items():
        assert left < by_method[method].all_state < right, label
        assert low < by_method[method].loss < high, label
    assert {text.get_text() for text in axes.texts} > {
        label for label, *_ in front_page.POINTS.values()
    }
