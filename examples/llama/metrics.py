"""Numbers of a run: one JSON line per step, TensorBoard, and a plot at the end."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter

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
        path = path if to_disk else Path(os.devnull)
        self.records = [record for record in kept if record["step"] <= start_step]
        self._to_disk = to_disk
        if to_disk:  # Killed here, the run must not lose what it has logged.
            files.write(path, "".join(map(_line, self.records)))
        self._file = path.open("a")
        self._board = SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=start_step + 1,
            write_to_disk=to_disk,
        )

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    def write(self, record: Record) -> None:
        self.records.append(record)
        self._file.write(_line(record))
        self._file.flush()
        for name in record.keys() - {"step"}:
            if math.isfinite(record[name]):  # TensorBoard draws nothing else
                self._board.add_scalar(name, record[name], int(record["step"]))

    def sync(self) -> None:
        """Wait for the disk: then the log outlasts the machine, as checkpoints do."""
        if self._to_disk:
            os.fsync(self._file.fileno())

    def last(self, name: str) -> float:
        return next(r[name] for r in reversed(self.records) if name in r)


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
