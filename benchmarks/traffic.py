"""Counts what one update sends between 8 devices, in programs of XLA's CPU compiler.

    python -m benchmarks.traffic

The update is that of the 60M Llama's matrices with stacked layers, in float32, at rank
width / 8. GaLore, which does not take stacks, gets separate layers. The count is the
bytes that collectives leave on a device; one in a loop counts once, and the new
projection that GaLore makes every 200 steps counts too. The rows also have a formula
for the low-rank Adam, and a ratio to the bytes of the gradients on one device, which
data parallelism sums anyway.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lorapre_jax as lp
from benchmarks import _record
from benchmarks._collectives import collectives

WIDTH, FFN, LAYERS, RANK = 512, 1376, 8, 64
UP, DOWN = ("fsdp", "tensor"), ("tensor", "fsdp")
LEAVES = {
    **dict.fromkeys("qkv", (WIDTH, WIDTH, UP)),
    "o": (WIDTH, WIDTH, DOWN),
    "gate": (WIDTH, FFN, UP),
    "up": (WIDTH, FFN, UP),
    "down": (FFN, WIDTH, DOWN),
}
MESHES = {"fsdp=8": (8, 1), "tensor=8": (1, 8), "fsdp=4,tensor=2": (4, 2)}
AXES = lp.MatrixAxes(rows=-2, columns=-1)
RULES = ("adamw", "muon", "galore/4", "default/8", "default_muon/8")
"""The race's names for these rules."""


def parameters(sizes: tuple[int, int], stacked: bool) -> dict[str, Any]:
    """Returns abstract parameters with their shardings."""
    mesh = jax.make_mesh(sizes, UP, (AxisType.Auto,) * 2)

    def leaf(batch: tuple[int, ...], p: int, q: int, axes: tuple[str, str]) -> Any:
        place = NamedSharding(mesh, PartitionSpec(*[None] * len(batch), *axes))
        return jax.ShapeDtypeStruct((*batch, p, q), jnp.float32, sharding=place)

    if stacked:
        return {name: leaf((LAYERS,), *x) for name, x in LEAVES.items()}
    layers = {f"{name}{i}": x for name, x in LEAVES.items() for i in range(LAYERS)}
    return {name: leaf((), *x) for name, x in layers.items()}


def optimizers(params: dict[str, Any]) -> dict[str, optax.GradientTransformation]:
    shardings = jax.tree.map(lambda x: x.sharding, params)
    muon_axes = optax.contrib.MuonDimensionNumbers(-2, -1)
    galore_axes = optax.contrib.GaLoreDimensionNumbers(0, 1)
    ours: dict[str, Any] = {"rank": RANK, "matrices": AXES}
    return {
        "optax adam": optax.scale_by_adam(),
        "optax muon": optax.contrib.scale_by_muon(
            weight_dimension_numbers=jax.tree.map(lambda _: muon_axes, params)
        ),
        "optax galore": optax.contrib.galore(
            1.0, rank=RANK, weight_dimension_numbers=galore_axes
        ),
        "lorapre_adam": lp.scale_by_lorapre_adam(**ours),
        "lorapre_muon": lp.scale_by_lorapre_muon(**ours),
        "lorapre_muon, in shares": lp.scale_by_lorapre_muon(
            **ours, param_shardings=shardings
        ),
    }


def sent(tx: optax.GradientTransformation, params: dict[str, Any]) -> dict[str, Any]:
    """Returns the bytes sent and the kinds of collectives, or the error."""
    try:
        places = lp.state_sharding(tx, params)
        state = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            jax.eval_shape(tx.init, params),
            places,
        )
        out = jax.tree.map(lambda x: x.sharding, params), places
        update = jax.jit(tx.update, out_shardings=out)
        text = update.lower(params, state, params).compile().as_text() or ""
    except Exception as error:  # Of whatever kind: it is the result.
        return {"sent": None, "kinds": f"{type(error).__name__}: {error}"[:80]}
    found = collectives(text)
    kinds = sorted({x.kind for x in found})
    return {"sent": sum(x.nbytes for x in found), "kinds": ", ".join(kinds)}


def formula(sizes: tuple[int, int]) -> int:
    """Returns the bytes that one update of the low-rank Adam should sum over devices.

    For each matrix, sums over the y shards of its columns are: three Gram matrices for
    the basis of the right factor, a fourth for its product with the old one, and the
    sketch, (p/x, r). Sums over the x shards of its rows are: as many Gram matrices, the
    product of the old left factor with the gradient, and the new right factor, both
    (r, q/y). The statistics of rows and columns in the second moment add p/x and q/y.
    Norms are not counted.
    """
    total = 0
    by_axis = dict(zip(UP, sizes, strict=True))
    for p, q, axes in LEAVES.values():
        x, y = (by_axis[axis] for axis in axes)
        over_y = 4 * RANK**2 + p // x * (RANK + 1) if y > 1 else 0
        over_x = 4 * RANK**2 + q // y * (2 * RANK + 1) if x > 1 else 0
        total += LAYERS * (over_y + over_x)
    return 4 * total


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    rows = []
    for mesh, sizes in MESHES.items():
        gradients = sum(4 * LAYERS * p * q // 8 for p, q, _ in LEAVES.values())
        for name in optimizers(parameters(sizes, True)):
            params = parameters(sizes, stacked=name != "optax galore")
            found = sent(optimizers(params)[name], params)
            nbytes = found["sent"]
            expected = formula(sizes) if name == "lorapre_adam" else None
            rows.append(
                {
                    "mesh": mesh,
                    "update": name,
                    "MB sent": nbytes and nbytes / 1e6,
                    "MB by the formula": expected and expected / 1e6,
                    "of the gradients": nbytes and nbytes / gradients,
                    "collectives": found["kinds"],
                }
            )
            print(_record.table(rows[-1:]).splitlines()[-1], flush=True)
    print(_record.save("traffic", rows, RULES))


if __name__ == "__main__":
    main()
