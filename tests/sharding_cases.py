"""Meshes of fake devices, and layouts of parameters on them."""

import dataclasses
import math
from typing import Any

import jax
from contract_cases import CASES, Case, random_tree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorapre_jax as lp

RANK = 3  # No mesh axis divides it.
SHAPES = {"heads": (16, 8, 4), "stack": (8, 16, 32), "w": (16, 32)}
MATRICES = lp.select_matrices(
    axes={"^heads$": lp.MatrixAxes(0, (1, 2)), "^(stack|w)$": lp.MatrixAxes()}
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and the mesh axes that each axis of each leaf is sharded over."""

    mesh: dict[str, int]
    heads: P
    stack: P
    w: P

    def shard(self, tree: Any, kind: AxisType) -> Any:
        return jax.device_put(tree, self.shardings(tree, kind))

    def shardings(self, tree: Any, kind: AxisType) -> Any:
        sizes = tuple(self.mesh.values())
        devices = jax.devices()[: math.prod(sizes)]
        types = (kind,) * len(sizes)
        mesh = jax.make_mesh(sizes, tuple(self.mesh), types, devices=devices)
        return {n: NamedSharding(mesh, getattr(self, n, P())) for n in tree}


LAYOUTS = {
    "rows": Layout({"fsdp": 8}, P("fsdp"), P(None, "fsdp"), P("fsdp")),
    "columns": Layout(
        {"tensor": 4}, P(None, "tensor"), P(None, None, "tensor"), P(None, "tensor")
    ),
    "both": Layout(
        {"fsdp": 2, "tensor": 4},
        P("fsdp", "tensor"),
        P(None, "fsdp", "tensor"),
        P("fsdp", "tensor"),
    ),
    "other way": Layout(
        {"fsdp": 2, "tensor": 2},
        P("tensor", "fsdp"),
        P(None, "tensor", "fsdp"),
        P("tensor", "fsdp"),
    ),
    "layers": Layout({"layers": 8}, P(), P("layers"), P()),
    "experts": Layout(
        {"expert": 2, "fsdp": 2, "tensor": 2},
        P("fsdp", "tensor"),
        P("expert", "fsdp", "tensor"),
        P(("expert", "fsdp"), "tensor"),
    ),
    "replicated": Layout({"data": 2}, P(), P(), P()),
}
# The heads' columns are fused of two axes, and sharded over the second.
BEHIND = Layout(
    {"fsdp": 2, "tensor": 4},
    P("fsdp", None, "tensor"),
    P(None, "fsdp", "tensor"),
    P("fsdp", "tensor"),
)
METHODS = ("adam", "adam_paper", "scale_by_muon", "ema")
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def make(name: str, **overrides: Any):
    case = CASES[name]
    return case.make(**{"rank": RANK, "matrices": MATRICES} | overrides)


def tree_of(case: Case, seed: int = 0) -> Any:
    shapes = SHAPES if case.only_matrices else SHAPES | {"bias": (8,)}
    return random_tree(shapes, seed)


def assert_lies(state: Any, shardings: Any):
    placed = jax.tree_util.tree_leaves_with_path(shardings)
    for (path, sharding), x in zip(placed, jax.tree.leaves(state), strict=True):
        name = jax.tree_util.keystr(path)
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (name, x.sharding)


def train(tx, params, grads, shardings=None):
    """Trains with a compiled `init` and step, as in the README."""
    init = jax.jit(tx.init, out_shardings=shardings)
    state = init(params)
    places = None if shardings is None else (params_sharding(params), shardings)
    update = jax.jit(tx.update, out_shardings=places, donate_argnums=1)
    for grad in grads:
        updates, state = update(grad, state, params)
    return updates, state


def params_sharding(params):
    return jax.tree.map(lambda x: x.sharding, params)


LARGE = {"heads": (64, 8, 16), "stack": (8, 64, 128), "w": (64, 128)}


def compiled_update(tx, layout: Layout, shapes: Any = LARGE) -> str:
    """Returns the CPU compiler's program of one update on the devices of the layout."""
    params = layout.shard(random_tree(shapes), AUTO)
    places = lp.state_sharding(tx, params)
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(tx.init, params),
        places,
    )
    update = jax.jit(tx.update, out_shardings=(params_sharding(params), places))
    text = update.lower(params, state).compile().as_text()
    assert text is not None
    return text
