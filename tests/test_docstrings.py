"""Docstrings: their examples run as printed, and public ones have all sections."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import lorapre_jax as lp

pytestmark = pytest.mark.usefixtures("quick_compilation")

API = Path(__file__).parents[1] / "docs" / "api"


def examples() -> list[doctest.DocTest]:
    """Returns the examples of all modules. An example sees only what it imports."""
    walk = pkgutil.walk_packages(lp.__path__, "lorapre_jax.")
    modules = [importlib.import_module(module.name) for module in walk]
    finder = doctest.DocTestFinder()
    tests = [test for module in modules for test in finder.find(module, globs={})]
    return [test for test in tests if test.examples]


@pytest.mark.parametrize("test", examples(), ids=lambda test: test.name)
def test_the_examples_run_as_printed(test):
    report: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    if report:
        pytest.fail("".join(report), pytrace=False)


@pytest.mark.parametrize("name", lp.__all__)
def test_every_public_docstring_has_an_example_and_says_what_to_see(name):
    text = inspect.getdoc(getattr(lp, name)) or ""
    example = re.search(r"^Examples:\n(.*?)(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)
    assert example, "no section Examples:"
    assert ">>> import lorapre_jax as lp\n" in example[1]
    assert f"lp.{name}" in example[1]
    assert "\nSee also:\n" in text


def test_every_public_name_has_an_entry():
    pages = "".join(page.read_text() for page in API.glob("*.md"))
    paths = re.findall(r"^\.\. auto\w+:: ([\w.]+)", pages, re.MULTILINE)
    for path in paths:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path
    public = [path for path in paths if path.count(".") == 1]
    assert sorted(public) == [f"lorapre_jax.{name}" for name in sorted(lp.__all__)]
