"""Which mesh axes shard the axes of parameters and activations."""

import contextlib
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES: tuple[str, ...] = ("data", "fsdp", "tensor")

# The axes of each leaf, by its path; stacked layers have one more axis in front.
_LOGICAL_AXES = {
    r"^embed/embedding$": ("vocab", "embed"),
    r"attention/[qkv]/kernel$": ("embed", "heads"),
    r"attention/o/kernel$": ("heads", "embed"),
    r"mlp/(gate|up)/kernel$": ("embed", "ffn"),
    r"mlp/down/kernel$": ("ffn", "embed"),
    r"^head/kernel$": ("embed", "vocab"),
    r"norm/scale$": ("norm",),
}
_RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "ffn": ("tensor",),
    "norm": (),
    "layers": (),
    None: (),
}


def parse_mesh(text: str) -> dict[str, int]:
    """Parses `"fsdp=4,tensor=2"` to sizes of all mesh axes, 1 if not named."""
    sizes, given = dict.fromkeys(MESH_AXES, 1), set[str]()
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
        if not match or match[1] not in sizes or int(match[2]) < 1:
            raise ValueError(
                f"`mesh`: {part!r} is not one of "
                f"{', '.join(f'{a}=N' for a in MESH_AXES)}, N at least 1; "
                "give them like fsdp=4,tensor=2"
            )
        if match[1] in given:
            raise ValueError(f"`mesh`: {text!r} has {match[1]} twice")
        given.add(match[1])
        sizes[match[1]] = int(match[2])
    return sizes


def make_mesh(text: str | None, devices: Sequence[Any]) -> Mesh:
    """Returns a mesh of all `devices`; with None, all of them shard the batch."""
    sizes = parse_mesh(text or f"data={len(devices)}")
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"`mesh`: {text} takes {math.prod(sizes.values())} devices, but there are "
            f"{len(devices)}"
        )
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), types, devices=devices)


def abstract_mesh(text: str | None, devices: int) -> AbstractMesh:
    """Returns the same mesh for planning, without its devices."""
    sizes = parse_mesh(text or f"data={devices}")
    types = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def row_parts(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of shards of the rows of a batch."""
    return _parts(mesh, _RULES["batch"])


def by_row(
    mesh: Mesh | AbstractMesh, batch_size: int, micro_batch_size: int | None = None
) -> NamedSharding:
    """Returns the sharding of a batch by rows, so many of them computed at once."""
    parts, rows = row_parts(mesh), micro_batch_size or batch_size
    if rows % parts:
        name = "micro_batch_size" if micro_batch_size else "data.batch_size"
        raise ValueError(
            f"`{name}` ({rows}) must be a multiple of the {parts} devices that "
            f"divide its rows (mesh axes {' and '.join(_RULES['batch'])})"
        )
    return NamedSharding(mesh, PartitionSpec(_RULES["batch"]))


def use(mesh: Mesh | AbstractMesh | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which `constrain` shards over `mesh` in traced functions."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Returns `x` sharded as the table says, or unchanged if no mesh is in use.

    Without it, the compiler would shard activations like parameters, by features, and
    gather rows, so that every device would hold the whole batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    wanted = [_RULES[axis] for axis in axes]
    # A mesh axis that does not divide the axis does not shard it.
    spec = [
        () if size % _parts(mesh, entry) else entry
        for size, entry in zip(x.shape, wanted, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def param_shardings(mesh: Mesh | AbstractMesh, params: Any) -> Any:
    """Returns a tree of `NamedSharding`s for `params`, arrays or abstract values."""

    def place(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _spec(_wanted(path, leaf), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, params)


def exceptions(mesh: Mesh | AbstractMesh, params: Any) -> list[str]:
    """Returns a line for each leaf whose sizes do not allow the table's sharding."""
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        wanted = _wanted(path, leaf)
        spec = _spec(wanted, leaf.shape, mesh)
        if spec != PartitionSpec(*wanted):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            asked = PartitionSpec(*wanted)
            lines.append(f"{name} {leaf.shape} is sharded as {spec}, not as {asked}")
    return lines


def _parts(mesh: Mesh | AbstractMesh, names: Sequence[str]) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _wanted(path: Any, leaf: Any) -> list[tuple[str, ...]]:
    """Returns the mesh axes of each axis of a leaf, by the tables."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    axes = next((x for p, x in _LOGICAL_AXES.items() if re.search(p, name)), None)
    if axes is None:
        raise ValueError(f"the table of axes has no row for {name}")
    stacked = ("layers",) * (leaf.ndim - len(axes))
    return [_RULES[axis] for axis in (*stacked, *axes)]


def _spec(
    wanted: Sequence[tuple[str, ...]],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
) -> PartitionSpec:
    """Returns the spec; a mesh axis whose size does not divide its axis shards another.

    The feed-forward width of the 1B model, 5461 = 43 x 127, is such an axis.
    """
    fits = [size % _parts(mesh, e) == 0 for size, e in zip(shape, wanted, strict=True)]
    spec = [e if fit else () for e, fit in zip(wanted, fits, strict=True)]
    for homeless in (e for e, fit in zip(wanted, fits, strict=True) if not fit):
        for axis, entry in enumerate(spec):
            if entry and shape[axis] % _parts(mesh, (*entry, *homeless)) == 0:
                spec[axis] = (*entry, *homeless)
                break
    return PartitionSpec(*spec)
