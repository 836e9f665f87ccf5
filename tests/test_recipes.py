"""The code of docs/recipes that needs no environment of its own, as printed."""

import re
from pathlib import Path
from typing import Any

from jax.sharding import PartitionSpec as P

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
