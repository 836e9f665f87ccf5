"""What the tests of all baselines share; `trajectories.py` has the functions."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _quickly(quick_compilation):
    """Their programs are tiny."""
