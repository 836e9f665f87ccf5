"""The notes about the paper's recipe at the start of a run."""

import sys

import pytest

from examples.llama import __main__, main
from examples.llama.commands import Train, parse
from examples.llama.config.recipes import notes


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


@pytest.mark.parametrize(
    ("options", "is_said"),
    [
        ("--recipe paper", False),
        ("--recipe paper --optimizer lorapre_muon", True),
        ("--recipe paper --optimizer adamw", True),
        ("--recipe paper --optimizer adamw --learning-rate 1e-3", False),
        ("--optimizer adamw", False),
    ],
)
def test_it_names_the_rates_to_try_where_none_was_published(options, is_said):
    command = parse(["train", "--preset", "60m", *options.split()])
    assert isinstance(command, Train)
    found = notes(command.recipe, command.config.optimizer)
    assert [True for note in found if "0.01, 0.005, 0.001, 0.0005, 0.0001" in note] == (
        [True] * is_said
    )


def test_it_says_so_before_it_trains(monkeypatch, capsys):
    options = "train --preset 60m --recipe paper"
    monkeypatch.setattr(sys, "argv", ["examples.llama", *options.split()])
    monkeypatch.setattr(main, "train", lambda config, console: Trained)
    assert __main__.main() == 0
    said, result = capsys.readouterr().out.splitlines()
    assert said.startswith("the recipe paper clips gradients at 7b only")
    assert said.endswith("--clip-norm 1 prevents it.")
    assert result.startswith("outcome")


class Trained:
    @staticmethod
    def lines():
        return {"outcome": "of nothing"}
