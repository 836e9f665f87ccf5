"""Finished runs, as one JSON object per line. Nothing else is stored of a run.

A run is identified by its key. A run that is in the file is not run again, so every
command can be interrupted and then continues where it stopped.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from benchmarks import _record

FOLDER = _record.RESULTS / "quality"
Row = Mapping[str, Any]
Split = Literal["choose", "report"]


@dataclasses.dataclass(frozen=True)
class Key:
    """Identifies a run; its `Row` has the results too."""

    scale: str
    split: Split
    """Which texts and seeds: those to choose methods and rates, or those to report."""
    condition: str
    method: str
    rate: float
    """Peak learning rate of the matrices."""
    dense_rate: float
    """Peak learning rate of the embedding, the head and the norms (Adam)."""
    seed: int
    steps: int


def read(path: Path) -> dict[Key, Row]:
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    fields = [field.name for field in dataclasses.fields(Key)]
    return {Key(*(row[name] for name in fields)): row for row in rows}


def append(path: Path, key: Key, result: Row) -> None:
    """Appends one line in one write, so that lines of several processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({**dataclasses.asdict(key), **result}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def check_texts(path: Path, known: Mapping[Key, Row], key: Key, digest: str) -> None:
    """Raises SystemExit if the rows to compare `key` with are of other texts."""
    alike = of(known, scale=key.scale, split=key.split)
    if {row.get("texts", digest) for _, row in alike} - {digest}:
        raise SystemExit(f"{path} has rows of other texts; choose another file (--out)")


def loss_of(row: Row) -> float:
    """Returns the held-out loss in nats, which is infinite if the run diverged."""
    return math.inf if row["loss"] is None else row["loss"]


def of(rows: Mapping[Key, Row], **fields: Any) -> list[tuple[Key, Row]]:
    """Returns the rows whose keys have these values."""
    wanted: Iterable[tuple[str, Any]] = fields.items()
    return [
        (key, row)
        for key, row in rows.items()
        if all(getattr(key, name) == value for name, value in wanted)
    ]
