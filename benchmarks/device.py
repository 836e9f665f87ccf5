"""Oracle checks and figures on the accelerator that JAX finds, part by part.

    python -m benchmarks.device                      # `make bench-device` runs this
    python -m benchmarks.device --only update-60m    # one part, such as this one
    python -m benchmarks.device --tiny               # tries all of it on a CPU

It needs jax, optax, numpy, flax and pytest, but no network: all data is random. Each
part runs in a process of its own. When it is done, its rows are added to
results/device_<kind>.json (with --tiny, to one in runs/), and as long as the code is
the same, a part whose rows are there is not run again.

The parts are the comparison with the oracle; one update of a model's matrices
(`update_time`); and whole training steps of the Llama with the published batch of 512
rows, of AdamW and one other optimizer by turns (`step_time`). If 512 rows do not fit,
their gradient is accumulated over fewer rows at once: half as many, until they fit.
"""

import argparse
import functools
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import jax

from benchmarks import _record, _roofline, step_time, update_time
from examples.llama.config import OptimizerConfig, OptimizerName

GOAL = 1.02
"""The most that a step may take, in steps of AdamW."""
RIVALS: tuple[OptimizerName, ...] = ("lorapre_adamw", "lorapre_muon", "muon")
CHECKS = {
    "trajectories": "test_muon_in_float32",
    "chosen_gradients": "test_what_lasts_is_held",
}
"""Files of tests, each with some tests that are quick."""
ROOT = Path(__file__).parents[1]
SECONDS, MOST_ROUNDS, LEAST_ROUNDS = 90, 30, 4
"""About how long steps are measured, and in how many rounds."""
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "ut of memory")
Rows = list[dict[str, Any]]


class Model(NamedTuple):
    size: str  # Of `update_time`.
    preset: str
    ranks: tuple[int, ...]  # The first is that of the steps.
    rows: int
    seq_len: int


PUBLISHED = step_time.PUBLISHED_ROWS, step_time.SEQ_LEN
MODELS = (
    Model("60m", "60m", (128, 16), *PUBLISHED),
    Model("350m", "350m", (256,), *PUBLISHED),
)
TINY = (Model("tiny", "9m", (8,), 4, 16),)


def parts(tiny: bool) -> dict[str, Callable[[], Rows]]:
    """Returns what makes the rows of each part."""
    found: dict[str, Callable[[], Rows]] = {
        f"check-{name}": functools.partial(check, name, tiny) for name in CHECKS
    }
    for model in TINY if tiny else MODELS:
        found[f"update-{model.size}"] = functools.partial(update, model)
        for rival in RIVALS:
            name = f"step-{model.size}-{rival}"
            found[name] = functools.partial(step, model, rival)
    return found


def check(name: str, tiny: bool) -> Rows:
    """Runs a file of tests on the accelerator, with products in full precision.

    Raises:
      RuntimeError: A test failed.
    """
    # The tests choose the CPU unless something is said. This process may hold most of
    # the accelerator's memory.
    env = {
        "JAX_PLATFORMS": "",
        **os.environ,
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    path = f"tests/test_{name}.py"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", path, "-q", "-p", "no:cacheprovider"]
        # Other packages there may warn.
        command += ["-W", "default", f"--junit-xml={report}"]
        command += ["-k", CHECKS[name]] if tiny else []
        done = subprocess.run(command, cwd=ROOT, env=env, check=False)
        if done.returncode:
            raise RuntimeError(f"{path} does not pass; see above.")
        (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    return [{"check": path, "tests": int(suite.attrib["tests"])}]


def update(model: Model) -> Rows:
    tiny = model in TINY
    sizes = {"side": 64, "copied": 2**16} if tiny else {}
    rates = _roofline.measured_rates(**sizes)
    return update_time.measured(model.size, model.ranks, 2 if tiny else 50, rates)


def step(model: Model, rival: OptimizerName) -> Rows:
    """Measures steps with as many rows at once as fit."""
    micro = model.rows
    while (rows := _step(model, rival, micro)) is None:
        print(f"{micro} rows at once do not fit.", flush=True)
        micro //= 2
        gc.collect()  # The traceback may still hold arrays.
    ours = rows[-1]
    print(
        f"{rival}: with {micro} rows at once, a step takes {ours['step, ratio']:.4f} "
        f"({ours['step, ratio, range']}) of AdamW's; goal: {GOAL}. "
        f"Peak memory: {ours['peak MB, ratio']:.3f} of AdamW's."
    )
    return [row | {"rows at once": micro} for row in rows]


def _step(model: Model, rival: OptimizerName, micro: int) -> Rows | None:
    """Returns None if so many rows at once do not fit."""
    try:
        batch = step_time.random_batch(model.rows, model.seq_len)
        subjects = {}
        for name in ("adamw", rival):
            optimizer = OptimizerConfig(name, rank=model.ranks[0])
            subject = step_time.Subject(model.preset, optimizer, batch, micro)
            subject.measure()  # AdamW's tells before the other compiles.
            subjects[name] = subject
        start = time.perf_counter()
        step_time.take_turns(list(subjects.values()), 0)
        rounds = int(SECONDS / (time.perf_counter() - start))
        rounds = min(max(rounds, LEAST_ROUNDS), MOST_ROUNDS)
        step_time.take_turns(list(subjects.values()), rounds)
    except jax.errors.JaxRuntimeError as error:
        if micro > 1 and any(text in str(error) for text in OUT_OF_MEMORY):
            return None
        raise
    return step_time.rows_of(subjects)


def run_part(name: str, tiny: bool, folder: Path) -> None:
    """Runs a part, and adds its rows to the file, unless they are there."""
    if jax.default_backend() == "cpu" and not tiny:
        sys.exit("JAX finds no accelerator. With --tiny, all of it is tried on a CPU.")
    kind = jax.devices()[0].device_kind.lower().replace(" ", "_")
    file = f"device_{kind}" + "_tiny" * tiny
    done = _record.rows_of_this_commit(file, folder)
    if any(row["part"] == name for row in done):
        print(f"{name}: done before.")
        return
    rows = [{"part": name, **row} for row in parts(tiny)[name]()]
    print(_record.table(rows))
    path = _record.save(file, done + rows, update_time.RULES, folder)
    print(f"{name}: done; in {path}.")


def run_each(names: Sequence[str], options: Sequence[str]) -> list[str]:
    """Runs each part in a process of its own; returns those that failed.

    This process must not touch the accelerator, whose memory it would take.
    """
    failed = []
    for name in names:
        print(f"\n{name}", flush=True)
        command = [sys.executable, "-m", "benchmarks.device", "--only", name, *options]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
    return failed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PART")
    parser.add_argument("--list", action="store_true", help="list the parts")
    parser.add_argument("--tiny", action="store_true", help="a tiny model")
    parser.add_argument("--folder", type=Path, help="where the file of rows is")
    args = parser.parse_args(arguments)
    names = list(parts(args.tiny))
    if args.list:
        print("\n".join(names))
        return
    if args.only not in (None, *names):
        parser.error(f"--only: {args.only!r} is not one of {', '.join(names)}")
    folder = (
        args.folder or (ROOT / "runs" if args.tiny else _record.RESULTS)
    ).resolve()
    if args.only:
        run_part(args.only, args.tiny, folder)
        return
    options = ["--folder", str(folder), *["--tiny"] * args.tiny]
    if failed := run_each(names, options):
        sys.exit(f"These failed: {', '.join(failed)}. Run it again for them alone.")


if __name__ == "__main__":
    main()
