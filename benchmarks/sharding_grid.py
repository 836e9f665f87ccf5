"""Every method on every layout: three updates on 2, 4 and 8 devices against one.

    python -m benchmarks.sharding_grid

Fake CPU devices, in the same process. A row is a method and a mesh; its numbers are the
largest differences over all layouts of that mesh and both kinds of axes, relative to
the largest element of the update, and of the state. The tests cover pairs of this.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lorapre_jax as lp
from benchmarks import _record

SHAPES = {"heads": (16, 8, 4), "stack": (8, 16, 32), "w": (16, 32)}
MATRICES = lp.select_matrices(
    axes={"^heads$": lp.MatrixAxes(0, (1, 2)), "^(stack|w)$": lp.MatrixAxes()}
)
RANK = 3  # No mesh axis divides it.
PAPER = lp.AlgorithmOne()
RULES = ("default/8", "v factored", "paper/8", "default_muon/8", "paper_muon/8")
"""The same in the race."""
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
    """Of every leaf; an axis that the mesh lacks divides nothing."""
    devices = jax.devices()[: math.prod(sizes.values())]
    types = (kind,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), types, devices=devices)
    known = set(sizes)

    def entry(axes: Any) -> Any:
        kept = [a for a in (axes if isinstance(axes, tuple) else (axes,)) if a in known]
        return tuple(kept) or None

    rows, columns, layers = map(entry, layout)
    specs = {
        "heads": PartitionSpec(rows, columns),
        "stack": PartitionSpec(layers, rows, columns),
        "w": PartitionSpec(rows, columns),
    }
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def trajectory(tx: Any, trees: list[Any], shardings: Any | None) -> tuple[Any, Any]:
    """The last updates and the state, on the host."""
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
        jax.block_until_ready(state)
    return jax.device_get((updates, state))


def difference(found: Any, expected: Any) -> float:
    """The largest one, relative to the largest element of its array."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(
        float(np.max(np.abs(x - y)) / (np.max(np.abs(y)) or 1.0)) for x, y in pairs
    )


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    generator = np.random.default_rng(0)
    trees = [
        {n: generator.standard_normal(s, np.float32) for n, s in SHAPES.items()}
        for _ in range(4)
    ]
    rows = []
    for name, tx in transforms(None).items():
        alone = trajectory(tx, trees, None)
        for sizes in MESHES:
            worst, programs = [0.0, 0.0], set()
            for layout in LAYOUTS.values():
                for kind in (AxisType.Auto, AxisType.Explicit):
                    shardings = shardings_on(sizes, kind, layout)
                    key = (kind, *(s.spec for s in shardings.values()))
                    if key in programs:
                        continue
                    programs.add(key)
                    sharded = trajectory(transforms(shardings)[name], trees, shardings)
                    found = map(difference, sharded, alone)
                    worst = [max(pair) for pair in zip(worst, found, strict=True)]
            rows.append(
                {
                    "update": name,
                    "mesh": ",".join(f"{a}={n}" for a, n in sizes.items()),
                    "programs": len(programs),
                    "updates differ by": worst[0],
                    "state differs by": worst[1],
                }
            )
            print(_record.table(rows[-1:]).splitlines()[-1], flush=True)
    print(_record.save("sharding_grid", rows, RULES))


if __name__ == "__main__":
    main()
