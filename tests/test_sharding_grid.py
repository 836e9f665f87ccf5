"""Every method on every layout: three updates on 2, 4 and 8 devices against one.

Slow: `make sharding-grid`. The other tests cover a part of this.
"""

import math
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sharding_cases import MATRICES, RANK, SHAPES

import lorapre_jax as lp

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

PAPER = lp.AlgorithmOne()
MESHES = [{"x": 2}, {"x": 4}, {"x": 8}, {"x": 2, "y": 2}, {"x": 2, "y": 4}]
# Of the last axes but one and the last, and of the layers.
LAYOUTS = {
    "rows": ("x", None, None),
    "columns": (None, "x", None),
    "both": ("x", "y", None),
    "the other way": ("y", "x", None),
    "fused rows": (("x", "y"), None, None),
    "layers": (None, None, "x"),
    "layers and rows": ("y", None, "x"),
    "replicated": (None, None, None),
}


def transforms(shardings: Any) -> dict[str, Any]:
    ours: dict[str, Any] = {"rank": RANK, "matrices": MATRICES}
    adam, muon = lp.scale_by_lorapre_adam, lp.scale_by_lorapre_muon
    return {
        "adam": adam(**ours),
        "adam, v factored": adam(**ours, second_moment=lp.LowRank()),
        "adam, paper": adam(**ours, first_moment=PAPER, second_moment=PAPER),
        "muon": muon(**ours),
        "muon, in shares": muon(**ours, param_shardings=shardings),
        "muon, paper": muon(**ours, moment=PAPER),
        "ema": lp.lorapre_ema(0.9, **ours),
    }


def shardings_on(sizes: dict[str, int], kind: AxisType, layout: Any) -> Any:
    """Returns the sharding of every leaf, without axes that the mesh does not have."""
    devices = jax.devices()[: math.prod(sizes.values())]
    types = (kind,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), types, devices=devices)

    def entry(axes: Any) -> Any:
        every = axes if isinstance(axes, tuple) else (axes,)
        return tuple(axis for axis in every if axis in sizes) or None

    rows, columns, layers = map(entry, layout)
    specs = {
        "heads": PartitionSpec(rows, columns),
        "stack": PartitionSpec(layers, rows, columns),
        "w": PartitionSpec(rows, columns),
    }
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def trajectory(tx: Any, shardings: Any | None) -> tuple[Any, Any]:
    """Returns the last updates and the state, on the host."""
    generator = np.random.default_rng(0)
    trees: list[Any] = [
        {n: generator.standard_normal(s, np.float32) for n, s in SHAPES.items()}
        for _ in range(4)
    ]
    places = None
    if shardings is not None:
        trees = [jax.device_put(tree, shardings) for tree in trees]
        places = lp.state_sharding(tx, trees[0])
    params, *grads = trees
    out = None if places is None else (shardings, places)
    state = jax.jit(tx.init, out_shardings=places)(params)
    update = jax.jit(tx.update, out_shardings=out)
    for grad in grads:
        updates, state = update(grad, state, params)
    return jax.device_get((updates, state))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", transforms(None))
def test_as_on_one_device(name, sizes):
    expected = trajectory(transforms(None)[name], None)
    seen = set()
    for layout in LAYOUTS.values():
        for kind in (AxisType.Auto, AxisType.Explicit):
            shardings = shardings_on(sizes, kind, layout)
            specs = (kind, *(s.spec for s in shardings.values()))
            if specs not in seen:
                seen.add(specs)
                found = trajectory(transforms(shardings)[name], shardings)
                apart = jax.tree.map(difference, found, expected)
                assert max(jax.tree.leaves(apart[0])) < 1e-4, specs
                assert max(jax.tree.leaves(apart[1])) < 1e-5, specs


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference, relative to the largest element of the array."""
    return float(np.max(np.abs(found - expected)) / (np.max(np.abs(expected)) or 1.0))
