"""The rows as Markdown tables and curves, beside the rows.

    python -m benchmarks.quality.report --scale a

Differences are to AdamW on the same seed and text (the same rows in the same order);
their 95 % interval is Student's, over seeds. Times are those of timing.py.
"""

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import _record
from benchmarks.quality import rows
from benchmarks.quality.rows import Key, Row
from benchmarks.quality.search import DENSE_RATES

# 97.5 % points of Student's t for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Rows = Mapping[Key, Row]
HEAD = """\
Rows by `python -m benchmarks.quality.search` and `.table`, times by `.timing`, this
page by `.report`, all with `--scale {0}`, the first three with `--data DIR`."""


def summary(
    known: Rows, times: Mapping[str, float], reference: str = "adamw"
) -> list[dict[str, Any]]:
    """One line a method, the best first; `times` of a step, as `seconds_a_step`."""
    by_method: dict[str, dict[int, tuple[Key, Row]]] = {}
    for key, row in known.items():
        runs = by_method.setdefault(key.method, {})
        if key.seed in runs:
            raise SystemExit(f"{key.method}, seed {key.seed}: rows of two rates")
        runs[key.seed] = key, row
    base = by_method.get(reference, {})
    lines = []
    for method, runs in by_method.items():
        losses = [rows.loss_of(row) for _, row in runs.values()]
        paired = [
            rows.loss_of(row) - rows.loss_of(base[seed][1])
            for seed, (_, row) in runs.items()
            if seed in base
        ]
        key, row = next(iter(runs.values()))
        line = {
            "method": method,
            "rate": f"{key.rate:.3g}",
            "dense rate": _dense_rate(key),
            "seeds": len(runs),
            "held-out loss": statistics.fmean(losses),
            "spread": f"{_deviation(losses):.4f}" if len(runs) > 1 else "",
            "minus AdamW": "" if method == reference else interval(paired),
        }
        for name in row["other_losses"]:
            others = [r["other_losses"].get(name, math.inf) for _, r in runs.values()]
            line[f"on {name}"] = statistics.fmean(others)
        timed = method in times and reference in times
        time = f"{times[method] / times[reference]:.2f}" if timed else ""
        lines.append(line | _cost(row, base) | {"time": time})
    return sorted(lines, key=lambda line: line["held-out loss"])


def interval(differences: Sequence[float]) -> str:
    """Mean and half-width of the 95 % interval."""
    if not differences:
        return ""
    mean = f"{statistics.fmean(differences):+.4f}"
    if len(differences) == 1:
        return mean
    freedom = len(differences) - 1
    half = _T[freedom - 1] * _deviation(differences) / math.sqrt(len(differences))
    return f"{mean} ± {half:.4f}"


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _cost(row: Row, base: Mapping[int, tuple[Key, Row]]) -> dict[str, Any]:
    matrices, total = row["state_bytes"]["matrices"], sum(row["state_bytes"].values())
    if not base:
        return {"matrix state, bytes": matrices}
    _, adamw = next(iter(base.values()))
    return {
        "matrix state": f"{matrices / adamw['state_bytes']['matrices']:.3f}",
        "all state": f"{total / sum(adamw['state_bytes'].values()):.3f}",
    }


def _dense_rate(key: Key) -> str:
    """That of the embedding, the head and the norms, where it is not the common one."""
    return "" if key.dense_rate == DENSE_RATES[key.scale] else f"{key.dense_rate:.3g}"


def seconds_a_step(scale: str) -> dict[str, float]:
    path = rows.FOLDER / f"timing_{scale}.json"
    if not path.exists():
        return {}
    lines = json.loads(path.read_text())["rows"]
    return {line["method"]: line["seconds a step"] for line in lines}


def searched(known: Rows) -> list[dict[str, Any]]:
    """Loss at every rate that was tried, over seeds, and how wide the valley is."""
    by_method: dict[tuple[str, str], dict[float, list[float]]] = {}
    for key, row in known.items():
        found = by_method.setdefault((key.method, _dense_rate(key)), {})
        found.setdefault(key.rate, []).append(rows.loss_of(row))
    lines = []
    for (method, dense), all_losses in by_method.items():
        losses = {rate: statistics.fmean(seeds) for rate, seeds in all_losses.items()}
        best = min(losses, key=losses.__getitem__)
        cells = (f"{rate:g}: {losses[rate]:.4f}" for rate in sorted(losses))
        lines.append(
            {
                "method": method,
                "dense rate": dense,
                "loss by rate": ", ".join(cells),
                "within 0.05": valley(losses) if len(losses) > 2 else "",
                "best": f"{best:g}",
            }
        )
    return sorted(lines, key=lambda line: line["method"])


def valley(losses: Mapping[float, float], depth: float = 0.05) -> str:
    """Ratio of the ends of the rates within `depth` nats of the best.

    Between tried rates the loss is taken as linear in the logarithm of the rate; where
    the range goes on beyond the tried ones, the ratio is a lower bound.
    """
    rates = np.log(sorted(losses))
    values = np.minimum([losses[r] for r in sorted(losses)], 1e3)
    grid = np.linspace(rates[0], rates[-1], 2001)
    inside = grid[np.interp(grid, rates, values) <= values.min() + depth]
    bound = "≥ " if inside[0] == grid[0] or inside[-1] == grid[-1] else ""
    return f"{bound}x{np.exp(inside[-1] - inside[0]):.1f}"


def plot(known: Rows, times: Mapping[str, float], path: Path) -> None:
    """Held-out loss against step, bytes of matrix state and, if timed, seconds."""
    panels = 3 if times else 2
    figure = Figure(figsize=(4 * panels + 1, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, sharey=True)
    steps, state = axes[:2]
    first = min(key.seed for key in known)
    for number, (key, row) in enumerate(rows.of(known, seed=first)):
        if row["loss"] is None:
            continue
        style = {"color": f"C{number % 10}", "label": key.method}
        # The colours come round: then dashes, and other points, tell methods apart.
        dashes, point = (("-", "o"), ("--", "^"), (":", "s"))[number // 10 % 3]
        at, losses = np.asarray(row["curve"]).T
        steps.plot(at, losses, dashes, marker=point, markersize=3, **style)
        if key.method in times:
            axes[2].plot(at * times[key.method], losses, dashes, **style)
        state.plot(row["state_bytes"]["matrices"], row["loss"], point, **style)
    best = min(rows.loss_of(row) for row in known.values())
    steps.set(
        xlabel="step", ylabel="held-out loss (nats)", ylim=(best - 0.05, best + 1)
    )
    state.set(xlabel="state of the matrices (bytes)", xscale="log")
    if times:
        axes[2].set(xlabel="seconds on one core")
    steps.legend(fontsize="x-small", ncols=2)
    for panel in axes:
        panel.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def robustness(table: Rows, reference: str = "adamw") -> list[dict[str, Any]]:
    """One line a condition: mean held-out losses, and how far they are from AdamW's.

    Of the methods and seeds that raced under every condition.
    """
    losses: dict[str, dict[tuple[str, int], float]] = {}
    for key, row in table.items():
        found = losses.setdefault(key.condition, {})
        found[key.method, key.seed] = rows.loss_of(row)
    if len(losses) < 2:
        return []
    runs = set.intersection(*(set(found) for found in losses.values()))
    lines = []
    for condition, found in losses.items():
        line: dict[str, Any] = {"condition": condition}
        for method in sorted({method for method, _ in runs} | {reference}):
            seeds = [seed for name, seed in runs if name == method]
            mean = statistics.fmean(found[method, seed] for seed in seeds)
            base = statistics.fmean(found[reference, seed] for seed in seeds)
            apart = "" if method == reference else f" ({mean - base:+.4f})"
            line[method] = f"{mean:.4f}{apart}"
        lines.append(line)
    return lines


def sections(table: Rows, scale: str) -> list[str]:
    """Markdown: the table, the other conditions, the searched rates, the ablations.

    With the commits that their rows come from.
    """
    plain = {key: row for key, row in table.items() if key.condition == "plain"}
    parts = [_section("plain", plain, summary(plain, seconds_a_step(scale)))]
    if compared := robustness(table):
        parts.append(_section("conditions", table, compared))
    for kind in ("search", "ablations"):
        known = rows.read(rows.FOLDER / f"{kind}_{scale}.jsonl")
        if known:
            parts.append(_section(kind, known, searched(known)))
    return parts


def _section(title: str, known: Rows, lines: list[dict[str, Any]]) -> str:
    by_commit: dict[str, set[str]] = {}
    for key, row in known.items():
        by_commit.setdefault(row.get("commit", "unknown"), set()).add(key.method)
    sources = (f"{c} ({', '.join(sorted(ms))})" for c, ms in by_commit.items())
    return f"## {title}\n\n{_record.table(lines)}\n\nCommits: {'; '.join(sources)}."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=("a", "b", "c"), default="a")
    parser.add_argument("--rows", type=Path, help="default: the committed table's")
    args = parser.parse_args()
    path = args.rows or rows.FOLDER / f"table_{args.scale}.jsonl"
    known = rows.read(path)
    if not known:
        raise SystemExit(f"{path}: no rows; run benchmarks.quality.table first")
    text = "\n\n".join([HEAD.format(args.scale), *sections(known, args.scale)]) + "\n"
    path.with_suffix(".md").write_text(text)
    plain = {k: v for k, v in known.items() if k.condition == "plain"}
    plot(plain, seconds_a_step(args.scale), path.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
