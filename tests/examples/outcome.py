"""What a run has left: its log and its checkpoints."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


def losses(workdir: Path) -> list[dict[str, float]]:
    """What the run logged, less the timings; half a line at the end is left out."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [
        {k: r[k] for k in r.keys() - {"tokens_per_second", "model_flops_utilization"}}
        for r in records
    ]


def checkpoint(path: Path) -> Any:
    """Parameters, optimizer state and step."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path / "default")


def assert_same_trees(a: Any, b: Any) -> None:
    """Bit by bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
