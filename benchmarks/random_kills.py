"""Kills the Llama trainer at random moments, and checks that its results are the same.

python -m benchmarks.random_kills --kills 50 --seed 0

A tiny run saves every second step. It is killed and started again until it is done, and
further runs follow until there were enough kills; the last run then ends undisturbed.
The log, the parameters and the optimizer state of each run are compared, bit by bit,
with those of a run that was never killed. The moment of a kill is drawn uniformly
between zero and twice the time that an undisturbed run takes to its first step.
"""

import argparse
import collections
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from benchmarks import _record

REPOSITORY = Path(__file__).parents[1]
OPTIONS = {
    "rank": 4,
    "width": 32,
    "ffn-width": 64,
    "num-layers": 2,
    "num-heads": 2,
    "seq-len": 32,
    "batch-size": 8,
    "eval-tokens": 600,
    "eval-every": 20,
    "checkpoint-every": 2,
}
KINDS = (
    "while a checkpoint was written",
    "between commit and digests",
    "before the first checkpoint",
    "while starting again",
    "otherwise",
)


def write_text(folder: Path) -> None:
    """Sentences of a few words."""
    folder.mkdir()
    words = ("the", "a", "cat", "dog", "bird", "sees", "hears", "and", "small", "old")
    rng = random.Random(0)
    for name, count in (("train", 100), ("validation", 4)):
        with gzip.open(folder / f"{name}.json.gz", "wt") as file:
            for _ in range(count):
                text = " ".join(rng.choices(words, k=40)) + "."
                file.write(json.dumps({"text": text}) + "\n")


class Run:
    """The trainer in a process of its own, and the files in its folder."""

    def __init__(self, scratch: Path, name: str, steps: int):
        self.steps, self.workdir = steps, scratch / name
        options = OPTIONS | {
            "steps": steps,
            "data": scratch / "text",
            "token-cache": scratch / "tokens",
            "workdir": self.workdir,
        }
        flags = [part for name, x in options.items() for part in (f"--{name}", str(x))]
        self._command = [sys.executable, "-m", "examples.llama", "train", *flags]
        self._compiled = scratch / "compiled"

    def start(self) -> subprocess.Popen[str]:
        settings = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self._compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        return subprocess.Popen(
            self._command,
            cwd=REPOSITORY,
            env=os.environ | settings,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str], seconds: float | None) -> bool:
        """Waits; returns False if the process was killed after ``seconds`` instead."""
        try:
            _, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return False
        if process.returncode:
            raise RuntimeError(f"a run failed by itself:\n{errors}")
        return True

    def records(self) -> list[dict[str, float]]:
        """Returns the log without the timings and without half a line at its end."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{k: r[k] for k in r.keys() - {"tokens_per_second"}} for r in records]

    def folders(self) -> set[tuple[str, int]]:
        """Returns name and inode of all folders in ``checkpoints``, finished or not."""
        return {
            (path.name, path.stat().st_ino)
            for path in (self.workdir / "checkpoints").glob("*")
        }

    def sealed(self) -> int:
        """Returns the step of the last checkpoint that has digests, or 0."""
        digests = (self.workdir / "digests").glob("*.json")
        names = {name for name, _ in self.folders()}
        return max((int(x.stem) for x in digests if x.stem in names), default=0)

    def result(self) -> tuple[list[dict[str, float]], list[bytes]]:
        """Returns the log, and every array of the last checkpoint."""
        with ocp.StandardCheckpointer() as checkpointer:
            folder = self.workdir / "checkpoints" / str(self.steps) / "default"
            state = checkpointer.restore(folder)
        return self.records(), [x.tobytes() for x in jax.tree.leaves(state)]


def kill_once(run: Run, seconds: float) -> tuple[str, int] | None:
    """Returns when the kill came and the steps it cost; None if the run finished."""
    log, before, sealed = run.records(), run.folders(), run.sealed()
    if run.finish(run.start(), seconds):
        return None
    new = {name for name, _ in run.folders() - before}
    unfinished = {name for name in new if not name.isdigit()}
    if unfinished:
        kind = KINDS[0]
    elif any(int(name) > run.sealed() for name in new):
        kind = KINDS[1]
    elif not run.sealed():
        kind = KINDS[2]
    else:
        kind = KINDS[3] if (run.records(), run.sealed()) == (log, sealed) else KINDS[4]
    return kind, max(0, len(run.records()) - 1 - run.sealed())


def seconds_to_start(run: Run) -> float:
    """Returns the time to the first step of an undisturbed run, which then finishes."""
    start = time.perf_counter()
    process = run.start()
    while len(run.records()) < 2 and process.poll() is None:
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    run.finish(process, None)
    return seconds


def measure(scratch: Path, kills: int, seed: int, steps: int) -> dict[str, object]:
    write_text(scratch / "text")
    first = Run(scratch, "compiling", steps)
    first.finish(first.start(), None)
    undisturbed = Run(scratch, "undisturbed", steps)
    horizon = 2 * seconds_to_start(undisturbed)
    expected = undisturbed.result()
    rng, kinds, most_lost = random.Random(seed), collections.Counter(), 0
    runs, equal = 0, True
    while kinds.total() < kills:
        run = Run(scratch, f"killed{runs}", steps)
        done = False
        while not done:
            left = kinds.total() < kills
            outcome = kill_once(run, rng.uniform(0, horizon)) if left else None
            if outcome:
                kinds[outcome[0]] += 1
                most_lost = max(most_lost, outcome[1])
                print(f"{kinds.total()}: {outcome[0]}, {outcome[1]} steps lost")
            else:
                done = left or run.finish(run.start(), None)
        runs += 1
        equal = equal and run.result() == expected
    return {
        "kills": kinds.total(),
        **{kind: kinds[kind] for kind in KINDS},
        "steps lost at most": most_lost,
        "runs": runs,
        "steps each": steps,
        "equal": equal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = [measure(Path(scratch), args.kills, args.seed, args.steps)]
    print(_record.table(rows))
    print(f"Written to {_record.save('random_kills', rows, ()).name}.")


if __name__ == "__main__":
    main()
