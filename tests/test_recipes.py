"""The code of docs/recipes that needs no environment of its own, as printed; and what
the recipe of the paper, in examples/llama, says at its start."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from jax.sharding import PartitionSpec as P

from examples.llama import __main__
from examples.llama.commands import Train, parse
from examples.llama.config.recipes import notes

RECIPES = Path(__file__).parents[1] / "docs" / "recipes"


def test_flax(capsys):
    page = (RECIPES / "flax.md").read_text()
    names: dict[str, Any] = {"__name__": "recipe"}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert "on a device" in capsys.readouterr().out
    nnx_factors = names["optimizer"].opt_state[0].mu_factors
    abstract = names["abstract"]["opt_state"][0]["mu_factors"]
    linen = names["state"].opt_state[0].mu_factors
    for factors in (nnx_factors, linen):
        assert set(factors) == {"up/kernel", "down/kernel"}
    for kernel, rows in (("up/kernel", "fsdp"), ("down/kernel", "tensor")):
        assert abstract[kernel]["left"].get_value().sharding.spec == P(rows, None)
        for left in (
            nnx_factors[kernel].left.get_value(),
            linen[kernel].left.value,
        ):
            assert left.sharding.spec[0] == rows


@pytest.mark.parametrize(
    ("options", "is_said"),
    [
        ("--preset 60m --recipe paper", True),
        ("--preset 7b --recipe paper", False),
        ("--preset 60m --recipe paper --clip-norm 1", False),
        ("--preset 60m --recipe paper --optimizer adamw", False),
        ("--preset 60m", False),
    ],
)
def test_the_papers_recipe_says_that_it_does_not_clip(options, is_said):
    command = parse(["train", *options.split()])
    assert isinstance(command, Train)
    found = notes(command.recipe, command.config.optimizer)
    assert [True for note in found if "clips gradients at 7b only" in note] == (
        [True] * is_said
    )


def test_it_says_so_before_it_trains(monkeypatch, capsys):
    options = "train --preset 60m --recipe paper"
    monkeypatch.setattr(sys, "argv", ["examples.llama", *options.split()])
    monkeypatch.setattr(__main__, "train", lambda config, console: Trained)
    assert __main__.main() == 0
    said, result = capsys.readouterr().out.splitlines()
    assert said.startswith("--recipe paper clips gradients at 7b only")
    assert result.startswith("outcome")


class Trained:
    @staticmethod
    def lines():
        return {"outcome": "of nothing"}
