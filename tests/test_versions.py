"""Versions: the constraints for pip, and the table in docs/limits.md."""

import re
from pathlib import Path

import pytest
import versions
from packaging.version import Version

PROJECT = versions.ours()
LOWEST = versions.lowest(PROJECT)
COLUMNS = versions.columns_of(versions.PAGE.read_text())
TEST, NEWEST = (COLUMNS[f"`make {target}`"] for target in ("test", "test-newest"))


def test_lower_bounds_of_the_library_and_of_its_extras():
    extras = {"a": ["pyright[nodejs]>=3"], "b": ["b-c>=1", "torch==4", "own[a]"]}
    project = {
        "dependencies": ["jax>=1.2", "numpy>=2.0.2,<3"],
        "optional-dependencies": extras,
    }
    bounds = {"jax": "1.2", "numpy": "2.0.2", "pyright": "3", "b-c": "1"}
    assert versions.lowest(project) == bounds


def test_the_table_can_be_read_back():
    columns = {"`a`": {"Python": "3.11", "jax": "1.2"}, "[b](c.md)": {"optax": "0.3"}}
    text = f"before\n{versions.BEGIN}{versions.table(columns)}{versions.END}| a | b |\n"
    assert versions.columns_of(text) == columns


def test_versions_are_those_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    for name, version in {"jax": "1.2", "google_tunix": "0.3", "other": "4"}.items():
        packages = tmp_path / ".venv/lib/python3.12/site-packages"
        info = packages / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    found = {"Python": "3.12", "jax": "1.2", "google-tunix": "0.3"}
    assert versions.installed(".venv") == found
    with pytest.raises(FileNotFoundError, match="make test-tunix makes it"):
        versions.installed(".venv-tunix")


def test_the_suite_runs_with_the_lowest_versions():
    assert {x: LOWEST[x] for x in versions.PACKAGES if x in LOWEST} == {
        name: version for name, version in TEST.items() if name != "Python"
    }
    assert PROJECT["requires-python"] == f">={TEST['Python']}"


def test_the_newest_are_no_older():
    shared = NEWEST.keys() & TEST.keys()
    assert shared >= {"Python", "jax", "jaxlib", "optax", "flax", "orbax-checkpoint"}
    for name in shared:
        assert Version(NEWEST[name]) >= Version(TEST[name]), name


def test_every_python_of_the_table_is_declared():
    prefix = "Programming Language :: Python :: "
    declared = {x.removeprefix(prefix) for x in PROJECT["classifiers"] if prefix in x}
    assert declared == {column["Python"] for column in COLUMNS.values()}


def test_recipes_have_the_pinned_versions():
    files = [Path("Makefile"), *Path("tests/frameworks").glob("*.txt")]
    pins = "".join((versions.ROOT / path).read_text() for path in files)
    recipes = {name: cells[name] for name in versions.PACKAGES[-4:]
               for cells in COLUMNS.values() if name in cells}  # fmt: skip
    for name in ("maxtext", "google-tunix", "marin-haliax", "marin-levanter"):
        assert set(re.findall(rf"\b{name}==([\w.]+)", pins)) == {recipes[name]}
