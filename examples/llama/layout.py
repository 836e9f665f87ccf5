"""Which mesh axis divides what: one table for the model's axes, one for the mesh's."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES: tuple[str, ...] = ("data", "fsdp", "tensor")

# Of each leaf, by its path; stacked layers have one more axis in front.
_LOGICAL_AXES = {
    r"^embed/embedding$": ("vocab", "embed"),
    r"attention/[qkv]/kernel$": ("embed", "heads"),
    r"attention/o/kernel$": ("heads", "embed"),
    r"mlp/(gate|up)/kernel$": ("embed", "ffn"),
    r"mlp/down/kernel$": ("ffn", "embed"),
    r"^head/kernel$": ("embed", "vocab"),
    r"norm/scale$": ("norm",),
}
_RULES = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "ffn": "tensor",
    "norm": None,
    "layers": None,
}


def parse_mesh(text: str) -> dict[str, int]:
    """`"fsdp=4,tensor=2"` to sizes of all mesh axes; the ones not named are 1."""
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
        if not match or match[1] not in sizes or int(match[2]) < 1:
            raise ValueError(
                f"mesh: {part!r} is not one of {', '.join(f'{a}=N' for a in MESH_AXES)}"
                ", N at least 1; give them like fsdp=4,tensor=2"
            )
        sizes[match[1]] = int(match[2])
    return sizes


def make_mesh(text: str | None, devices: Sequence[Any]) -> Mesh:
    """A mesh of all `devices`, as `--mesh` says; None: all divide the batch."""
    sizes = parse_mesh(text or f"data={len(devices)}")
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh: {text} takes {math.prod(sizes.values())} devices, but there are "
            f"{len(devices)}"
        )
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), types, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_row(mesh: Mesh, batch_size: int) -> NamedSharding:
    """Of a batch whose first axis is its rows."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise ValueError(
            f"batch_size ({batch_size}) must be a multiple of the {parts} devices that "
            "divide its rows (mesh axes data and fsdp)"
        )
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """A tree like `params`, arrays or abstract values, of `NamedSharding`s."""

    def place(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _spec(_wanted(path, leaf), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, params)


def exceptions(mesh: Mesh, params: Any) -> list[str]:
    """Where the sizes do not allow what the table asks for, one line for each leaf."""
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        wanted = _wanted(path, leaf)
        spec = _spec(wanted, leaf.shape, mesh)
        if spec != PartitionSpec(*wanted):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            asked = PartitionSpec(*wanted)
            lines.append(f"{name} {leaf.shape} lies as {spec}, not as {asked}")
    return lines


def _wanted(path: Any, leaf: Any) -> list[str | None]:
    """The mesh axis of each axis of a leaf, by the tables."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    axes = next(axes for p, axes in _LOGICAL_AXES.items() if re.search(p, name))
    stacked = ("layers",) * (leaf.ndim - len(axes))
    return [_RULES[axis] for axis in (*stacked, *axes)]


def _spec(
    wanted: Sequence[str | None], shape: Sequence[int], mesh: Mesh
) -> PartitionSpec:
    """As wanted; a mesh axis that does not divide its own axis divides another more.

    The feed-forward width of the 1B model, 5461 = 43 x 127, is such an axis.
    """
    spec: list[tuple[str, ...]] = [()] * len(shape)
    homeless = []
    for axis, entry in enumerate(wanted):
        if entry is None:
            continue
        if shape[axis] % mesh.shape[entry]:
            homeless.append(entry)
        else:
            spec[axis] = (entry,)
    for entry in homeless:
        for axis, entries in enumerate(spec):
            parts = math.prod(mesh.shape[name] for name in (*entries, entry))
            if entries and shape[axis] % parts == 0:
                spec[axis] = (*entries, entry)
                break
    return PartitionSpec(
        *(entries[0] if len(entries) == 1 else entries or None for entries in spec)
    )
