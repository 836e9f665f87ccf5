"""The versions that are tested: `python tests/versions.py` writes the table of limits.

It reads what is installed in the environments that make has made. With `--lowest` it
prints the lower bounds of pyproject.toml as constraints for pip: `make test` installs
these, so the lowest versions that we allow are those that the whole suite runs with.
"""

import itertools
import re
import sys
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "limits.md"
BEGIN, END = "<!-- versions: begin -->\n\n", "\n<!-- versions: end -->\n"
ENVIRONMENTS = {
    ".venv": "`make test`",
    ".venv-newest": "`make test-newest`",
    ".venv-maxtext": "[MaxText](recipes/maxtext.md)",
    ".venv-tunix": "[Tunix](recipes/tunix.md)",
    ".venv-haliax": "[Haliax and Levanter](recipes/haliax.md)",
}
PACKAGES = ("jax", "jaxlib", "optax", "numpy", "flax", "orbax-checkpoint", "equinox",
            "numpyro", "dm-haiku", "maxtext", "google-tunix", "marin-haliax",
            "marin-levanter")  # fmt: skip


def lowest(project: Mapping[str, Any]) -> dict[str, str]:
    """Returns the lower bounds of a project and of its extras."""
    extras = itertools.chain(*project["optional-dependencies"].values())
    requirements = [*project["dependencies"], *extras]
    found = (re.match(r"([\w-]+)(?:\[.*\])?>=([\w.]+)", x) for x in requirements)
    return {match[1]: match[2] for match in found if match}


def ours() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def installed(environment: str) -> dict[str, str]:
    """Returns the version of each package, from an environment's files."""
    folders = list((ROOT / environment).glob("lib/python*/site-packages"))
    if len(folders) != 1:
        target = environment.replace(".venv", "test", 1)
        raise FileNotFoundError(f"{ROOT / environment}: make {target} makes it")
    found = metadata.distributions(path=[str(folders[0])])
    versions = {x.name.lower().replace("_", "-"): x.version for x in found}
    python = folders[0].parent.name.removeprefix("python")
    return {"Python": python} | {x: versions[x] for x in PACKAGES if x in versions}


def table(columns: Mapping[str, Mapping[str, str]]) -> str:
    """Returns a table with a row for each package and a column for each environment."""
    lines = [["package", *columns], ["---"] * (1 + len(columns))]
    for package in ("Python", *PACKAGES):
        cells = [versions.get(package, "") for versions in columns.values()]
        lines.append([package, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def columns_of(page: str) -> dict[str, dict[str, str]]:
    """Reads the contents of `table` from the text of a page."""
    header, _, *lines = (
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in page.partition(BEGIN)[2].partition(END)[0].splitlines()
    )
    return {
        title: {name: cells[i] for name, *cells in lines if cells[i]}
        for i, title in enumerate(header[1:])
    }


def main() -> None:
    if sys.argv[1:] == ["--lowest"]:
        print(*(f"{x}=={version}" for x, version in lowest(ours()).items()), sep="\n")
        return
    columns = {title: installed(name) for name, title in ENVIRONMENTS.items()}
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(columns) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
