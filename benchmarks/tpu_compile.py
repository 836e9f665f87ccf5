"""The whole training step, compiled for TPUs by their own compiler on a CPU machine.

    python -m benchmarks.tpu_compile --topology v5e:2x2 --preset 350m --mesh fsdp=4

Needs `libtpu` (`pip install '.[examples,tpu]'`) and no TPU. The step is the example's:
model, gradients, clipping, optimizer, state donated. Reported, in bytes of one device:
what the arguments take, what the compiler adds, what collectives leave there. Where the
memory does not suffice, the compiler says so, and that is the row. Without options, all
of CELLS, each in a process of its own, into results/tpu_compile.json.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any, Literal

import jax
import numpy as np
import tyro
from jax.experimental import topologies

from benchmarks import _record
from benchmarks._collectives import collectives
from examples.llama import layout
from examples.llama.config import PRESETS, OptimizerConfig, OptimizerName
from examples.llama.model import PureLlama
from examples.llama.optimizers import make_optimizer
from examples.llama.steps import abstract_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Cell:
    """One program."""

    preset: str
    topology: str = "v5e:2x2"
    mesh: str | None = None
    optimizer: OptimizerName = "lorapre_adamw"
    rank: int = 128
    batch_size: int = 16
    seq_len: int = 256
    remat: Literal["nothing", "all but products", "all"] | None = None


OPTIMIZERS: list[tuple[OptimizerName, int]] = [
    ("adamw", 1),
    ("lorapre_adamw", 128),
    ("lorapre_adamw", 16),
]
CELLS = [
    Cell("60m", topology, mesh, optimizer, rank)
    for topology, mesh in (("v5e:2x2", "fsdp=4"), ("v5e:4x4", "fsdp=8,tensor=2"))
    for optimizer, rank in OPTIMIZERS
]


def compiled(cell: Cell) -> dict[str, Any]:
    """The row of a cell, in this process."""
    topology: Any = topologies.get_topology_desc(
        platform="tpu", topology_name=cell.topology
    )
    config = PRESETS[cell.preset]
    if cell.remat is not None:
        config = dataclasses.replace(config, remat=cell.remat)
    mesh = layout.make_mesh(cell.mesh, topology.devices)
    tx = make_optimizer(OptimizerConfig(cell.optimizer, rank=cell.rank), 10_000)
    model = PureLlama(config, 32_000)
    state = abstract_state(model, tx, mesh)
    rows = jax.ShapeDtypeStruct(
        (cell.batch_size, cell.seq_len + 1),
        np.int32,
        sharding=layout.by_row(mesh, cell.batch_size),
    )
    row: dict[str, Any] = dataclasses.asdict(cell) | {"devices": mesh.size}
    row |= {"parameters": _on_one_device(state.params)}
    row |= {"optimizer state": _on_one_device(state.opt_state)}
    try:
        program = make_train_step(model, tx, state).lower(state, rows).compile()
    except jax.errors.JaxRuntimeError as error:
        return row | {"refused": _why(str(error))}
    memory: Any = program.memory_analysis()
    sent: Counter[str] = Counter()
    for collective in collectives(program.as_text() or ""):
        sent[collective.kind] += collective.nbytes
    return row | {
        "arguments": memory.argument_size_in_bytes,
        "outputs not aliased": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "HBM": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        "collectives": dict(sent),
    }


def _on_one_device(tree: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _why(error: str) -> str:
    """The line on memory, if that is what the compiler lacked."""
    found = re.search(r"[^\n]*(RESOURCE_EXHAUSTED|[Ee]xceeded hbm)[^\n]*", error)
    return (found[0] if found else error)[:300]


def in_own_process(cell: Cell) -> dict[str, Any]:
    """A fault in the compiler ends that process alone."""
    fields = {k: v for k, v in dataclasses.asdict(cell).items() if v is not None}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tpu_compile", *flags],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        return dataclasses.asdict(cell) | {"failed": "".join(last)}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    # No TPU is looked for, and several processes may load the library.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    if sys.argv[1:]:
        print(json.dumps(compiled(tyro.cli(Cell, description=__doc__))))
        return
    rows = []
    for cell in CELLS:
        rows.append(in_own_process(cell))
        print(rows[-1], flush=True)
    print(_record.save("tpu_compile", rows))


if __name__ == "__main__":
    main()
