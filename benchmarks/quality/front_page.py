"""The README's table and figure, from the committed rows.

    python -m benchmarks.quality.front_page

prints the table, and draws held-out loss against the optimizer state of all
parameters into `results/quality/front_page.png`.
"""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from benchmarks import _record
from benchmarks.quality import rows
from benchmarks.quality.report import plain_only, seconds_a_step
from benchmarks.quality.summary import REFERENCE, Line, summary

SCALE = "a"
FIGURE = rows.FOLDER / "front_page.png"

FULL_MEMORY = {
    "soap": "SOAP",
    "muon": "`optax.contrib.muon`",
    "adamw_b1_0.5": "AdamW, b1 = 0.5",
}
"""Peers that keep a dense moment of every matrix, as AdamW does."""
LOW_RANK = {
    "fira/4": "Fira",
    "galore/4": "`optax.contrib.galore`",
    "galore_published/4": "GaLore",
    "q_galore/4": "Q-GaLore",
    "apollo/4": "APOLLO",
    "apollo_mini": "APOLLO-Mini",
    "flora/4": "Flora",
    "mlorc/8": "MLorc",
    "dct/4": "DCT basis",
}
"""Peers that keep moments of low rank."""
OURS = {
    "default_all/8": "`lorapre_adamw`",
    "default_all/32": "`lorapre_adamw`",
    "default_muon/8": "`lorapre_muon`",
}

POINTS = {
    "adamw": ("AdamW", (8, -3), "left"),
    "adamw_b1_0.5": ("AdamW, b1 = 0.5", (-8, -3), "right"),
    "soap": ("SOAP", (-8, -3), "right"),
    "muon": ("Muon", (8, -3), "left"),
    "fira/4": ("Fira", (8, -7), "left"),
    "galore_published/4": ("GaLore", (8, 2), "left"),
    "apollo/4": ("APOLLO", (8, -3), "left"),
    "adafactor": ("Adafactor", (8, -3), "left"),
    "racs": ("RACS", (-8, -3), "right"),
    "default_all/8": ("lorapre_adamw, width/8", (8, -3), "left"),
    "default_all/32": ("lorapre_adamw, width/32", (8, -3), "left"),
    "default_muon/8": ("lorapre_muon, width/8", (6, -13), "center"),
}
"""By method in the figure: its label, the label's offset in points, its alignment."""


def front_table(by_method: Mapping[str, Line], times: Mapping[str, float]) -> str:
    """Returns seven rows: AdamW, three peers and three of ours.

    The peers are the best two that keep a dense moment, and the best of low rank.
    """

    def best(names: Mapping[str, str], count: int) -> list[str]:
        return sorted(names, key=lambda method: by_method[method].loss)[:count]

    names = {"adamw": "AdamW"} | FULL_MEMORY | LOW_RANK | OURS
    methods = ["adamw", *best(FULL_MEMORY, 2), *best(LOW_RANK, 1), *OURS]
    return _record.table(
        [_row(names[method], by_method[method], times) for method in methods]
    )


def _row(name: str, line: Line, times: Mapping[str, float]) -> dict[str, str]:
    _, _, share = line.key.method.partition("/")
    return {
        "optimizer": name,
        "rank": f"width / {share}" if share else "",
        "held-out loss": f"{line.loss:.3f} ± {line.spread:.3f}",
        "optimizer state": f"{line.all_state:.1%}".replace("100.0%", "100%"),
        "time of a step": f"{times[line.key.method] / times[REFERENCE]:.2f}",
    }


def draw(by_method: Mapping[str, Line], path: Path) -> Axes:
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for method, (label, offset, side) in POINTS.items():
        line = by_method[method]
        color = "#c2410c" if method in OURS else "0.45"
        axes.errorbar(
            line.all_state, line.loss, line.spread, fmt="o", color=color, markersize=7
        )
        axes.annotate(
            label,
            (line.all_state, line.loss),
            offset,
            textcoords="offset points",
            ha=side,
            color=color,
            weight="bold" if method in OURS else "normal",
            fontsize=10,
        )
    axes.set(
        xlabel="optimizer state of all parameters, share of AdamW's",
        ylabel="held-out loss (nats per byte)",
        xscale="log",
        xlim=(0.025, 4),
        ylim=(1.55, 1.735),
    )
    axes.xaxis.set_major_locator(FixedLocator([0.03, 0.1, 0.3, 1, 3]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    paper = by_method["paper_0.25/8"].loss
    notes = {
        0.03: "lower and further left is better",
        0.94: f"above the axis: Algorithm 1 of LoRA-Pre, {paper:.2f}",
    }
    for height, note in notes.items():
        axes.text(
            0.02, height, note, color="0.45", style="italic", transform=axes.transAxes
        )
    figure.savefig(path, dpi=130)
    return axes


def committed() -> dict[str, Line]:
    """Returns the plain race at the README's scale, by method."""
    known = rows.read(rows.FOLDER / f"table_{SCALE}.jsonl")
    return {line.key.method: line for line in summary(plain_only(known))}


def main() -> None:
    by_method = committed()
    draw(by_method, FIGURE)
    print(front_table(by_method, seconds_a_step(SCALE)))


if __name__ == "__main__":
    main()
