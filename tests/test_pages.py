"""Every page: its code runs as printed, and its links and commands exist."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pages
import pytest
from jax.sharding import PartitionSpec as P
from pages import PAGES, ROOT

from benchmarks.quality import report, rows
from examples.llama import commands

pytestmark = pytest.mark.usefixtures("quick_compilation")

FRAMEWORKS = {
    "docs/recipes/haliax.md": "test_haliax.py",
    "docs/recipes/maxtext.md": "test_maxtext.py",
    "docs/recipes/tunix.md": "test_tunix.py",
}
"""Pages whose code needs an environment of its own, and what runs it there."""


def _arrays_are_where_they_should_be(names: dict[str, Any]) -> None:
    """The restored run is on two devices; the converted one has the smaller rank."""
    up = names["saved"]["state"][0].mu_factors["up"]
    assert names["saved"]["params"]["up"].sharding.mesh.shape == {"fsdp": 2}
    assert up.left.sharding.spec == P("fsdp", None)
    adam = names["state"][0]
    assert adam.count == 1
    assert adam.mu_factors["up"].left.sharding.spec == P("fsdp", None)
    # Through rank 8 and through AdamW: eight directions, and the noise that fills 16.
    assert np.linalg.matrix_rank(adam.mu_factors["up"].right, 1e-4) <= 8


def _flax_shards_factors(names: dict[str, Any]) -> None:
    nnx_factors = names["optimizer"].opt_state[0].mu_factors
    abstract = names["abstract"]["opt_state"][0]["mu_factors"]
    linen = names["state"].opt_state[0].mu_factors
    for factors in (nnx_factors, linen):
        assert set(factors) == {"up/kernel", "down/kernel"}
    for kernel, side in (("up/kernel", "fsdp"), ("down/kernel", "tensor")):
        assert abstract[kernel]["left"].get_value().sharding.spec == P(side, None)
        for left in (
            nnx_factors[kernel].left.get_value(),
            linen[kernel].left.value,
        ):
            assert left.sharding.spec[0] == side


MORE = {
    "docs/checkpoints.md": _arrays_are_where_they_should_be,
    "docs/recipes/flax.md": _flax_shards_factors,
}
"""What a page's names have to be like, besides what it prints."""


@pytest.mark.parametrize(
    "page",
    [
        page
        for page in PAGES
        if page not in ("README.md", *FRAMEWORKS)
        and any(block.language == "python" for block in pages.blocks(page))
    ],
)
def test_the_code_runs_as_printed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = pages.run(page)
    MORE.get(page, lambda names: None)(names)


@pytest.mark.parametrize(("page", "test"), FRAMEWORKS.items())
def test_other_environments_run_the_rest(page, test):
    source = (ROOT / "tests" / "frameworks" / test).read_text()
    assert f'"docs" / "recipes" / "{Path(page).name}"' in source


def test_output_that_differs_is_told_by_its_line():
    block = pages.Block("text", "a\n...\nd\n", 7)
    pages.check_output("page", block, "a\nb\nc\nd\n")
    with pytest.raises(AssertionError, match="page, line 8"):
        pages.check_output("page", block, "a\nb\nc\n")


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
            kept = [re.sub(r"[^\w\- ]", "", title) for title in titles]
            assert anchor in [x.lower().replace(" ", "-") for x in kept], link


def lines_of_commands(page: str) -> list[str]:
    """Returns the indented lines with shell commands, without their comments."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    found = re.findall(r"^    ((?:make|python -m|pip install) .*)$", text, re.MULTILINE)
    return [line.partition(" #")[0] for line in found]


@pytest.mark.parametrize("page", [x for x in PAGES if lines_of_commands(x)])
def test_commands_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in lines_of_commands(page):
        program, *arguments = shlex.split(line)
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE), line
        elif program == "pip":
            for extra in re.findall(r"\.\[(\w+)\]", line):
                assert extra in extras["optional-dependencies"], line
        else:
            assert importlib.util.find_spec(arguments[1]), line
            if arguments[1] == "examples.llama" and "..." not in arguments:
                known_to_the_trainer(arguments[2:], line)


def known_to_the_trainer(arguments: list[str], line: str) -> None:
    try:
        commands.parse(arguments)
    except SystemExit:
        pytest.fail(f"no such command: {line}")
    except (OSError, ValueError):  # Of a folder that is not there, as DIR.
        pass


@pytest.mark.parametrize("scale", ["a", "b"])
def test_the_results_have_the_committed_table(scale):
    known = report.plain_only(rows.read(rows.FOLDER / f"table_{scale}.jsonl"))
    table = report.results_page(known, report.seconds_a_step(scale))
    assert table in (ROOT / "docs" / "results" / "loss.md").read_text()
