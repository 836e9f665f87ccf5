"""The trainer in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import jax

REPOSITORY = Path(__file__).parents[2]


def start(config, *more, devices, fault=None) -> subprocess.Popen[str]:
    """Starts a tiny run; options in `more` come last. See `faulty_run` for faults."""
    options = {
        "data": config.data.path,
        "token-cache": config.data.cache,
        "workdir": config.workdir,
        "optimizer": config.optimizer.name,
        "rank": config.optimizer.rank,
        "steps": config.steps,
        "eval-every": config.eval_every,
        "checkpoint-every": config.checkpoint_every,
        "log-every": config.log_every,
        "seq-len": config.data.seq_len,
        "batch-size": config.data.batch_size,
        "eval-tokens": config.data.eval_tokens,
        "width": config.model.width,
        "ffn-width": config.model.ffn_width,
        "num-layers": config.model.num_layers,
        "num-heads": config.model.num_heads,
    }
    flags = [part for name, x in options.items() for part in (f"--{name}", str(x))]
    program = ["tests.examples.faulty_run", fault] if fault else ["examples.llama"]
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", *program, "train", *flags, *more],
        cwd=REPOSITORY,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(config, *more, **options) -> subprocess.CompletedProcess[str]:
    """Starts a tiny run, and waits for its end."""
    process = start(config, *more, **options)
    stdout, stderr = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
