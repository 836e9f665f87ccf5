"""Numbers of a run: one JSON line per step, TensorBoard, and a plot at the end."""

import json
import math
import os
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
    steps are about to run again; ``start_step`` 0 drops everything. Where not
    ``to_disk``, there are only ``records``.
    """

    def __init__(self, workdir: Path, start_step: int, to_disk: bool = True):
        path = workdir / "metrics.jsonl"
        kept = _read(path) if start_step else []
        hosts.on_first(lambda: None)  # All have read before the first one writes.
        self.records = [record for record in kept if record["step"] <= start_step]
        self._file = self._board = None
        if to_disk:
            # Killed here, the run must not lose what it has logged.
            files.write(path, "".join(map(_line, self.records)))
            self._file = path.open("a")
            self._board = TensorBoard(workdir / "tensorboard", start_step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file and self._board:
            try:
                self._file.close()
            finally:
                self._board.close()

    def write(self, record: Record) -> None:
        self.records.append(record)
        if self._file and self._board:
            self._file.write(_line(record))
            self._file.flush()
            self._board.write(record)

    def sync(self) -> None:
        """Wait for the disk: then the log outlasts the machine, as checkpoints do."""
        if self._file and self._board:
            os.fsync(self._file.fileno())
            self._board.sync()

    def last(self, name: str) -> float:
        return next(r[name] for r in reversed(self.records) if name in r)


class TensorBoard:
    """Events of the steps after ``start_step``; any that are there already are hidden.

    They are written here and now. The thread in which tensorboardX likes to do it ends
    when the disk is full, and the run would wait for it forever.
    """

    def __init__(self, folder: Path, start_step: int):
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        self._write(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, record: Record) -> None:
        # Of numbers that are not finite it draws nothing.
        values = [
            Summary.Value(tag=name, simple_value=record[name])
            for name in record.keys() - {"step"}
            if math.isfinite(record[name])
        ]
        self._write(int(record["step"]), summary=Summary(value=values))

    def sync(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()

    def _write(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))


def perplexity(loss: float) -> float:
    """Of a loss in nats per token; infinite where a run has diverged."""
    return math.exp(loss) if loss < 700 else math.inf


def plot_losses(records: Iterable[Record], title: str, path: Path) -> None:
    """Training and held-out loss against the step, as PNG."""
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
    figure.savefig(path, dpi=150)


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _read(path: Path) -> list[Record]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    # A run that was killed may have left half a line at the end.
    return [json.loads(line) for line in lines if line.endswith("\n")]
