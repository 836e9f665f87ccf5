"""Executes runs in one worker process per core, and stores each as a row."""

import argparse
import functools
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks import _record, fingerprint
from benchmarks.quality import rows
from benchmarks.quality.ablations import ENTRANTS
from benchmarks.quality.conditions import CONDITIONS
from benchmarks.quality.rows import Key
from benchmarks.quality.run import Race
from benchmarks.quality.scales import SCALES, cached_texts


@functools.lru_cache(maxsize=2)
def _race(scale: str, split: Any, condition: str, method: str, data, cache) -> Any:
    texts = cached_texts(SCALES[scale], data, split, cache)
    return Race(SCALES[scale], ENTRANTS[method], CONDITIONS[condition], texts)


def done(key: Key, args: argparse.Namespace) -> rows.Row:
    """Returns the row of `key` from the file; runs it first if it is not there."""
    known = rows.read(args.out)
    if key not in known:
        commit = _record.commit()  # Before the run, since a later one did not run.
        race = _race(
            key.scale, key.split, key.condition, key.method, args.data, args.cache
        )
        rows.check_texts(args.out, known, key, race.texts.digest)
        factor = race.condition.rate_factor
        rates = key.rate * factor, key.dense_rate * factor
        result = race.run(*rates, key.seed, key.steps) | {
            "commit": commit,
            "fingerprint": fingerprint.of(ENTRANTS[key.method]),
        }
        rows.append(args.out, key, result)
        print(
            f"{key.method} [{key.condition}] rate {key.rate:g}/{key.dense_rate:g} "
            f"seed {key.seed}: {result['loss']}, {result['seconds']} s",
            flush=True,
        )
        known = rows.read(args.out)
    return known[key]


def run_all(
    task: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    args: argparse.Namespace,
) -> None:
    """Calls `task(*each)` in worker processes, each on a core of its own.

    Scale (c) has one worker with all cores, on the devices that JAX finds.
    """
    context = multiprocessing.get_context("spawn")
    free = sorted(os.sched_getaffinity(0))
    workers = 1 if args.scale == "c" else min(args.workers, len(free))
    cores: Any = context.Queue()
    for core in free[:workers]:
        cores.put(core)
    pinned = {}
    if args.scale != "c":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX reads it when imported.
        pinned = {"initializer": _pin, "initargs": (cores,)}
    with ProcessPoolExecutor(workers, context, **pinned) as pool:
        futures: list[Future[Any]] = [pool.submit(task, *each) for each in arguments]
        for future in as_completed(futures):
            future.result()  # Raises what the task raised.


def _pin(cores: Any) -> None:
    os.sched_setaffinity(0, {cores.get()})  # XLA counts the cores when it starts.


def texts_parser(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser of the options of every command: the scale and its texts."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, default="a")
    parser.add_argument("--data", type=Path, help="folder with c4/ and text/")
    parser.add_argument("--cache", type=Path, default=Path("runs/quality"))
    return parser


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser of the options of the commands that append rows."""
    parser = texts_parser(doc)
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--steps", type=int, help="default: the scale's")
    parser.add_argument("--out", type=Path, help="default: the committed rows")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes; (c) has one"
    )
    return parser
