"""Numbers of a run: one JSON line per step, TensorBoard, and a plot at the end."""

import io
import json
import math
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore

from examples.llama import files, hosts

Record = dict[str, float]


class MetricsLog:
    """``workdir/metrics.jsonl`` and TensorBoard events, from after ``start_step``.

    What an interrupted run wrote past its last checkpoint is dropped, since those
    steps are about to run again; ``start_step`` 0 drops everything. A file that is
    damaged is no reason not to go on: its good lines are kept, and all of it is copied
    to ``workdir/damaged``. Where not ``to_disk``, there are only ``records``.

    Numbers that are not finite, which JSON does not have, are null in the file.

    Attributes:
      records: By step; NaN for null.
      note: What was damaged or is missing; empty where nothing is.
    """

    def __init__(self, workdir: Path, start_step: int, to_disk: bool = True):
        self._path = path = workdir / "metrics.jsonl"
        kept, bad = _read(path) if start_step else ([], [])
        hosts.on_first(lambda: None)  # All have read before the first one writes.
        self.records = [record for record in kept if record["step"] <= start_step]
        self.note = ""
        self._file = self._board = None
        missing = start_step - len({r["step"] for r in self.records if r["step"] > 0})
        if bad:
            lines = ", ".join(map(str, bad[:5])) + (", ..." if bad[5:] else "")
            copy = workdir / "damaged" / path.name
            self.note = f"{path}: damaged in lines {lines}, left out; a copy is {copy}"
        elif missing:
            self.note = (
                f"{path}: without {missing:,} of the {start_step:,} steps done; the "
                "run goes on without them"
            )
        if to_disk:
            if bad:
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
            # A run that is killed here must not lose its log.
            files.write(path, "".join(map(_line, self.records)))
            self._file = path.open("a")
            self._board = TensorBoard(workdir / "tensorboard", start_step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file and self._board:
            with files.named(self._path):
                try:
                    self._file.close()
                finally:
                    self._board.close()

    def write(self, record: Record) -> None:
        self.records.append(record)
        if self._file and self._board:
            with files.named(self._path):
                self._file.write(_line(record))
                self._file.flush()
            self._board.write(record)

    def sync(self) -> None:
        """Waits for the disk, so that the log survives a crash, as checkpoints do."""
        if self._file and self._board:
            with files.named(self._path):
                os.fsync(self._file.fileno())
            self._board.sync()

    def value(self, name: str, step: int | None) -> float | None:
        """Returns a value of a step; None if it was not logged."""
        found = (r[name] for r in self.records if r["step"] == step and name in r)
        return next(found, None)


class TensorBoard:
    """Writes events of steps after ``start_step``, and hides earlier ones.

    They are written in this thread. The thread in which tensorboardX would do it ends
    when the disk is full, and the run would wait for it forever. (clu.metric_writers
    imports TensorFlow for it, and has no log that goes on where a checkpoint is.)
    """

    def __init__(self, folder: Path, start_step: int):
        self._folder = folder
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        self._write(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, record: Record) -> None:
        # It does not draw numbers that are not finite.
        values = [
            Summary.Value(tag=name, simple_value=record[name])
            for name in record.keys() - {"step"}
            if math.isfinite(record[name])
        ]
        self._write(int(record["step"]), summary=Summary(value=values))

    def sync(self) -> None:
        with files.named(self._folder):
            self._events.flush()

    def close(self) -> None:
        with files.named(self._folder):
            self._events.close()

    def _write(self, step: int, **content: Any) -> None:
        with files.named(self._folder):
            self._events.write_event(Event(wall_time=time.time(), step=step, **content))


def perplexity(loss: float) -> float:
    """Returns the perplexity of a loss in nats per token, or infinity."""
    return math.exp(loss) if loss < 700 else math.inf


def plot_losses(records: Iterable[Record], title: str, path: Path) -> None:
    """Draws training and held-out loss against the step, as PNG."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(
        title=title, xlabel="step", ylabel="loss (nats per token)"
    )
    records = list(records)
    for name, marker, width in (("train_loss", "", 0.8), ("held_out_loss", "o", 1.5)):
        with_it = [record for record in records if name in record]
        axes.plot(
            [record["step"] for record in with_it],
            [record[name] for record in with_it],
            marker=marker,
            linewidth=width,
            label=name.replace("_", " "),
        )
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    files.write(path, picture.getvalue())


def _line(record: Record) -> str:
    finite = {name: x if math.isfinite(x) else None for name, x in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _read(path: Path) -> tuple[list[Record], list[int]]:
    """Returns the records, and the numbers of lines without one."""
    records, bad = [], []
    if not path.exists():
        return records, bad
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                records.append(_parse(line))
            except (ValueError, OverflowError, RecursionError):
                if line.endswith(b"\n"):
                    bad.append(number)
                # Else a run that was killed has left half a line.
    return records, bad


def _parse(line: bytes) -> Record:
    found = json.loads(line)
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise ValueError("no record of a step")
    record = {name: math.nan if x is None else x for name, x in found.items()}
    if not all(isinstance(x, (int, float)) for x in record.values()):
        raise ValueError("not numbers alone")
    _line(record)  # Raises `OverflowError` for an integer that is no float.
    return record
