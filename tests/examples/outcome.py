"""Reads the log and the checkpoints of a run."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


def losses(workdir: Path) -> list[dict[str, float]]:
    """Returns the log without the timings and without half a line at its end."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [
        {k: r[k] for k in r.keys() - {"tokens_per_second", "model_flops_utilization"}}
        for r in records
    ]


def checkpoint(path: Path) -> Any:
    """Returns parameters, optimizer state and step."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path / "default")


def assert_same_trees(a: Any, b: Any) -> None:
    """Asserts that two trees are the same bit by bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
