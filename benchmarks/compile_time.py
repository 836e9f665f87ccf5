"""What an update costs before its first run, beside optax's: tracing and compiling it.

    python -m benchmarks.compile_time              # both models, for this machine's CPU
    python -m benchmarks.compile_time --tpu        # for a TPU v5e, where libtpu is

The 60M Llama's matrices as 7 stacked leaves, at r = 128; those of 6, 12 and 24 layers
of width 256 as separate leaves, at r = 32; and whole optimizers of examples/llama at
such a size with `--no-scan-layers`, each in the row of its rule. Seconds are CPU
seconds of all threads. By the TPU's compiler (`pip install '.[examples,tpu]'`; no TPU
is needed) also the longest chain of dependent instructions, see `_chain.py`.

Rows go to results/compile_time.json; rows of the other compiler, and of other
transforms, stay there.
"""

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lorapre_jax as lp
from benchmarks import _record
from benchmarks._chain import longest_chain
from benchmarks.update_time import AXES, RULES, SIZES, matrices

STACKED = "7 stacked leaves"
LAYERS = (6, 12, 24)
EXAMPLE = f"example, {LAYERS[-1]} separate layers"
WIDTH, FFN, RANK = 256, 688, 32
DEVICE = "TPU v5e"


def models() -> dict[str, tuple[Any, int]]:
    """Abstract matrices and the rank of their factors."""
    *shape, rank = SIZES["60m"]
    found = {STACKED: (jax.eval_shape(lambda: matrices(*shape)), rank)}
    layer = jax.eval_shape(lambda: matrices(WIDTH, FFN, 1))
    layer = {k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in layer.items()}
    for n in LAYERS:
        separate = {f"layer_{i}": layer for i in range(n)}
        found[f"{n * len(layer)} separate leaves"] = separate, RANK
    return found


def cases(model: str) -> tuple[Any, dict[str, optax.GradientTransformation]]:
    """Returns abstract parameters and the transforms, by the names of their rules."""
    if model == EXAMPLE:
        return example()
    params, rank = models()[model]
    return params, transforms(params, rank)


def example() -> tuple[Any, dict[str, optax.GradientTransformation]]:
    """Returns those of the trainer, with clipping, rates, and Adam for other leaves."""
    # The trainer needs libraries of its own, which the other rows do not.
    from benchmarks.step_time import VOCAB_SIZE
    from examples.llama.config import ModelConfig, OptimizerConfig, OptimizerName
    from examples.llama.optimizers import make_optimizer
    from examples.llama.pure import PureLlama

    config = ModelConfig(WIDTH, FFN, num_layers=LAYERS[-1], scan_layers=False)
    params = jax.eval_shape(PureLlama(config, VOCAB_SIZE).init, jax.random.key(0))
    names: dict[str, OptimizerName] = {
        "optax adam": "adamw",
        "optax muon": "muon",
        "lorapre_adam": "lorapre_adamw",
        "lorapre_muon": "lorapre_muon",
    }
    return params, {
        name: make_optimizer(OptimizerConfig(of, rank=RANK), steps=1000)
        for name, of in names.items()
    }


MODELS = [*models(), EXAMPLE]


def transforms(params: Any, rank: int) -> dict[str, optax.GradientTransformation]:
    shared: dict[str, Any] = {"rank": rank, "matrices": lp.MatrixAxes(-2, -1)}
    axes = jax.tree.map(lambda _: AXES, params)
    return {
        "optax adam": optax.scale_by_adam(),
        "optax muon": optax.contrib.scale_by_muon(weight_dimension_numbers=axes),
        "lorapre_adam": lp.scale_by_lorapre_adam(**shared),
        "lorapre_muon": lp.scale_by_lorapre_muon(**shared),
    }


def measured(
    tx: optax.GradientTransformation, params: Any, sharding: Any = None
) -> dict[str, Any]:
    """Lines of the program, seconds, and what a TPU would wait for."""
    state = jax.eval_shape(tx.init, params)
    grads, state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (params, state),
    )
    start = time.process_time()
    lowered = jax.jit(tx.update).lower(grads, state, grads)  # As its parameters.
    traced = time.process_time()
    program = lowered.compile()
    end = time.process_time()
    lines = len(lowered.as_text().splitlines())
    row = {
        "lines": lines,
        "lines a leaf": lines / len(jax.tree.leaves(params)),
        "trace s": traced - start,
        "compile s": end - traced,
    }
    if sharding is not None:
        row["longest chain"] = longest_chain(program.as_text() or "")
    return row


def tpu() -> Any:
    """The sharding of one TPU that is not there."""
    # Its package needs the trainer's libraries, which the CPU's rows do not.
    from benchmarks import tpu_compile

    tpu_compile.prepare()
    jax.config.update("jax_exec_time_optimization_effort", 0.0)  # As users compile.
    return jax.sharding.SingleDeviceSharding(tpu_compile.devices_of("v5e:1x1")[0])


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row's seconds over those of optax's Muon for the same program."""
    muon = {
        place(row): row["trace s"] + row["compile s"]
        for row in rows
        if row["transform"] == "optax muon"
    }
    return [
        row | {"of Muon": (row["trace s"] + row["compile s"]) / muon[place(row)]}
        for row in rows
    ]


def place(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["for"], row["model"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tpu", action="store_true")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    args = parser.parse_args()
    sharding = tpu() if args.tpu else None
    kind = DEVICE if args.tpu else jax.devices()[0].device_kind
    jax.jit(jnp.cos).lower(1.0).compile()  # The compiler's own start.
    rows = []
    for model in args.models:
        params, transforms_of_model = cases(model)
        for name, tx in transforms_of_model.items():
            key = {"for": kind, "model": model, "transform": name}
            jax.clear_caches()
            rows.append(key | measured(tx, params, sharding))
            print(json.dumps(rows[-1]), flush=True)
    rows = with_ratios(rows)
    print(_record.table(rows))
    done = {place(row) for row in rows}
    kept = [
        row
        for row in _record.rows_of_this_commit("compile_time")
        if place(row) not in done
    ]
    _record.save("compile_time", kept + rows, RULES)


if __name__ == "__main__":
    main()
