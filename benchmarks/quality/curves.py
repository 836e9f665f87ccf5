"""Draws the race as a figure."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from benchmarks.quality import rows
from benchmarks.quality.summary import Rows


def plot(
    known: Rows, names: Mapping[str, str], times: Mapping[str, float], path: Path
) -> None:
    """Draws held-out loss against step, bytes of all state and, if timed, seconds.

    The figure has the first seed of the methods with a name; the best comes first in
    the legend. A line in the panel of states joins the ranks of `lorapre_adamw`.
    """
    panels = 3 if times else 2
    figure = Figure(figsize=(4 * panels + 2, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, sharey=True)
    steps, state = axes[:2]
    first = min(key.seed for key in known)
    finished = [run for run in rows.of(known, seed=first) if run[1]["loss"] is not None]
    finished.sort(key=lambda run: rows.loss_of(run[1]))
    named = [run for run in finished if run[0].method in names]
    for number, (key, row) in enumerate(named):
        style = {
            "color": f"C{number % 10}",
            "label": names[key.method].replace("`", ""),
        }
        # Colours repeat after ten methods; then dashes and markers differ.
        dashes, point = (("-", "o"), ("--", "^"), (":", "s"))[number // 10 % 3]
        at, losses = np.asarray(row["curve"]).T
        steps.plot(at, losses, dashes, marker=point, markersize=3, **style)
        if key.method in times:
            axes[2].plot(at * times[key.method], losses, dashes, **style)
        state.plot(sum(row["state_bytes"].values()), row["loss"], point, **style)
    ranks = [row for key, row in finished if key.method.startswith("default/")]
    points = sorted((sum(row["state_bytes"].values()), row["loss"]) for row in ranks)
    state.plot(*np.asarray(points).reshape(-1, 2).T, "x-", color="0.5", lw=1, zorder=0)
    best = min(row["loss"] for _, row in named)
    steps.set(
        xlabel="step",
        ylabel=f"held-out loss (nats), seed {first}",
        ylim=(best - 0.05, best + 1),
    )
    state.set(xlabel="optimizer state of all parameters", xscale="log")
    state.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    state.xaxis.set_major_formatter(EngFormatter("B", sep=" "))
    state.xaxis.set_minor_formatter(NullFormatter())
    if times:
        axes[2].set(xlabel="seconds on one core")
    handles, labels = steps.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    for panel in axes:
        panel.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
