"""Settings that must hold before JAX starts its backend."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # For pmap and mesh tests.

import jax
import pytest
from contract_cases import CASES, Case

from lorapre_jax._leaves import roles


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles quickly, for modules whose tiny programs take long to compile."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def nothing_was_said(monkeypatch):
    """Forgets which warnings were given, for modules that test a warning given once."""
    monkeypatch.setattr(roles, "_told", set())


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of optional development data beside the checkout."""
    folder = Path(__file__).parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no development data beside the checkout (shared/data)")
    return folder


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]
