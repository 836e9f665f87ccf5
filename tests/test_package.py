"""The built package, used outside of the checkout."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

PROGRAM = """
import importlib.metadata
import jax.numpy as jnp
import lorapre_jax as lp

params = {"mlp": jnp.ones((256, 128))}
tx = lp.scale_by_lorapre_adam(8)
updates, _ = tx.update(params, tx.init(params))
assert bool(jnp.isfinite(updates["mlp"]).all())
print(lp.__file__)
print(importlib.metadata.version("lorapre-jax"))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Returns a folder with the sdist, and with the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run([*build, "-t", "sdist"], cwd=ROOT, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    subprocess.run([*build, "-t", "wheel"], cwd=source, check=True, capture_output=True)
    return folder


def test_the_wheel_works_where_the_checkout_is_not(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    where = tmp_path / "installed"
    subprocess.run([*pip, "--target", str(where), str(wheel)], check=True)
    environment = os.environ | {"PYTHONPATH": str(where)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    file, version = done.stdout.split()
    assert Path(file).is_relative_to(where)
    assert version == PROJECT["version"]


def test_the_wheel_has_the_library_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {name for name in names if ".dist-info/" not in name}
    sources = {f"lorapre_jax/{x.relative_to(ROOT / 'lorapre_jax')}"
               for x in (ROOT / "lorapre_jax").rglob("*.py")}  # fmt: skip
    assert code == sources | {"lorapre_jax/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_versions_are_in_one_place():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {PROJECT['version']}\n" in citation
    assert "__version__" not in (ROOT / "lorapre_jax" / "__init__.py").read_text()
