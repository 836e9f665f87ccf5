"""Compiles the whole training step for TPUs, with their own compiler on a CPU machine.

    python -m benchmarks.tpu_compile --topology v5e:2x2 --preset 350m --mesh fsdp=4

It needs `libtpu` (`pip install '.[examples,tpu]'`) and no TPU. The step is the
trainer's: model, gradients, clipping and optimizer, with a donated state. If the memory
of a device does not suffice, the row has the compiler's error. Otherwise it has, in
bytes of one device:

    parameters, optimizer state   the shards that a step starts from
    gradients                     as many as the parameters; they are temporaries
    temporaries                   the most that is alive at once besides the arguments
    temporaries, packed           what the compiler allocates for them
    peak                          arguments and temporaries
    collectives                   results of each kind, with a loop's body counted once

The compiler runs with little effort (see `prepare`). Without options, all `cells` are
compiled, each in a process of its own, and written to results/tpu_compile.json. Rows
there that are of the same commit are not compiled again. If a row can be compared with
one of AdamW, it also has the bytes saved in the state and at the peak.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import tyro
from jax.experimental import topologies

from benchmarks import _record
from benchmarks._collectives import collectives
from examples.llama import layout
from examples.llama.config import PRESETS, OptimizerConfig, OptimizerName
from examples.llama.data.rows import Batch
from examples.llama.gradients import make_loss_and_grads
from examples.llama.optimizers import make_optimizer
from examples.llama.pure import PureLlama
from examples.llama.steps import TrainState, abstract_state, make_train_step

VOCABULARY = 32_000


@dataclasses.dataclass(frozen=True)
class Cell:
    """One program to compile."""

    preset: str
    topology: str = "v5e:2x2"
    mesh: str | None = None
    optimizer: OptimizerName = "lorapre_adamw"
    rank: int = 128
    layers_at_once: int | None = None
    batch_size: int = 16
    seq_len: int = 256
    remat: Literal["nothing", "all but products", "all"] | None = None


# Preset, slice, mesh, rows of a step (16 for each shard of them, or 8 if no more fit),
# and what the backward pass recomputes if the preset's choice takes too much memory.
SLICES = [
    ("60m", "v5e:1x1", "fsdp=1", 16, None),
    ("60m", "v5e:2x2", "fsdp=4", 64, None),
    ("60m", "v5e:4x4", "fsdp=4,tensor=4", 64, None),
    ("350m", "v5e:1x1", "fsdp=1", 16, None),
    ("350m", "v5e:4x4", "fsdp=4,tensor=4", 64, None),
    ("1b", "v5e:1x1", "fsdp=1", 8, "all"),
    ("1b", "v5e:2x2", "fsdp=4", 64, None),
    ("7b", "v5e:2x4", "fsdp=4,tensor=2", 64, "all"),
    ("1b", "v5e:4x4", "fsdp=16", 256, None),
]
PUBLISHED_RANK = {"60m": 128, "350m": 256, "1b": 512, "7b": 1024}


def cells() -> Iterator[Cell]:
    for preset, topology, mesh, batch_size, remat in SLICES:
        cell = Cell(preset, topology, mesh, batch_size=batch_size, remat=remat)
        yield dataclasses.replace(cell, optimizer="adamw", rank=1)
        for rank in (PUBLISHED_RANK[preset], PUBLISHED_RANK[preset] // 8):
            # With such ranks, updating all layers at once takes more memory than the
            # forward and backward pass.
            few = 4 if rank >= 256 else None
            yield dataclasses.replace(cell, rank=rank, layers_at_once=few)


def prepare() -> None:
    """Sets options that must be set before the compiler is loaded."""
    # Do not look for a TPU, and let several processes load the library.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_exec_time_optimization_effort", -1.0)


def devices_of(topology: str) -> Any:
    """Returns abstract TPUs of a slice such as `v5e:4x4`, or of a part of a host."""
    sizes = [int(n) for n in topology.partition(":")[2].split("x")]
    host = (*(min(n, 2) for n in sizes[:2]), 1)
    return topologies.get_topology_desc(
        platform="tpu", topology_name=topology, chips_per_host_bounds=host
    ).devices


def lowered(cell: Cell) -> tuple[TrainState, jax.stages.Lowered]:
    """Returns the abstract state that a step takes, and the lowered step."""
    config = PRESETS[cell.preset]
    if cell.remat is not None:
        config = dataclasses.replace(config, remat=cell.remat)
    mesh = layout.make_mesh(cell.mesh, devices_of(cell.topology))
    optimizer = OptimizerConfig(
        cell.optimizer, rank=cell.rank, layers_at_once=cell.layers_at_once
    )
    tx = make_optimizer(optimizer, 10_000)
    model = PureLlama(config, VOCABULARY, mesh)
    state = abstract_state(model, tx, mesh)
    by_row = layout.by_row(mesh, cell.batch_size)
    batch = Batch(
        *(
            jax.ShapeDtypeStruct(
                (cell.batch_size, cell.seq_len), dtype, sharding=by_row
            )
            for dtype in (np.int32, np.int32, np.float32)
        )
    )
    return state, make_train_step(make_loss_and_grads(model), tx, state).lower(
        state, batch
    )


def measured(cell: Cell) -> dict[str, Any]:
    """Compiles a cell in this process, and returns its row."""
    state, step = lowered(cell)
    row: dict[str, Any] = dataclasses.asdict(cell) | {
        "parameters": on_one_device(state.params),
        "optimizer state": on_one_device(state.opt_state),
        "gradients": on_one_device(state.params),
    }
    try:
        program = step.compile()
    except jax.errors.JaxRuntimeError as error:
        return row | {"refused": _why(str(error))}
    memory: Any = program.memory_analysis()
    sent: Counter[str] = Counter()
    for collective in collectives(program.as_text() or ""):
        sent[collective.kind] += collective.nbytes
    return row | {
        "arguments": memory.argument_size_in_bytes,
        "outputs not aliased": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
        "temporaries, packed": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "collectives": dict(sent),
    }


def on_one_device(tree: Any) -> int:
    """Returns the bytes on one device of abstract arrays with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _why(error: str) -> str:
    """Returns the line about memory, if there was too little, or the whole error."""
    found = re.search(r"[^\n]*(RESOURCE_EXHAUSTED|[Ee]xceeded hbm)[^\n]*", error)
    return (found[0] if found else error)[:300]


def in_own_process(cell: Cell) -> dict[str, Any]:
    """Compiles in another process, since a fault in the compiler ends its process."""
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


def with_saved(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Adds to each row what it saves compared with AdamW, if both compiled."""
    of_adamw, done = {}, []
    for row in rows:
        place = tuple(row[name] for name in ("preset", "topology", "mesh"))
        if row["optimizer"] == "adamw":
            of_adamw[place] = row
        row, other = dict(row), of_adamw.get(place, {})
        if row["optimizer"] != "adamw" and "peak" in row and "peak" in other:
            state, peak, packed = (
                other[name] - row[name]
                for name in ("optimizer state", "peak", "temporaries, packed")
            )
            row |= {"saved by the state": state, "saved at the peak": peak}
            row |= {"saved with temporaries packed": state + packed}
        done.append(row)
    return done


def main() -> None:
    prepare()
    if sys.argv[1:]:
        print(json.dumps(measured(tyro.cli(Cell, description=__doc__))))
        return
    fields = [field.name for field in dataclasses.fields(Cell)]
    done = {
        Cell(**{name: row[name] for name in fields}): row
        for row in _record.rows_of_this_commit("tpu_compile")
        if "failed" not in row
    }
    for cell in cells():
        if cell not in done:
            done[cell] = in_own_process(cell)
            print(done[cell], flush=True)
        rows = [done[other] for other in cells() if other in done]
        _record.save("tpu_compile", with_saved(rows), ("adamw", "default/8"))


if __name__ == "__main__":
    main()
