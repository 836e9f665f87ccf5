"""Writes the rows as Markdown tables and curves into the folder of the rows.

    python -m benchmarks.quality.report --scale a

The page begins with the table of docs/results/loss.md. Differences are to AdamW on the
same seed and text (the same rows in the same order); their 95 % interval is Student's,
over seeds. Times are those of timing.py. With `--rows FILE` the page is about the rows
of that file alone, without times, searched rates and ablations. `--against METHOD` only
prints the differences to that method, and writes nothing.
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _record
from benchmarks.quality import rows
from benchmarks.quality.curves import plot
from benchmarks.quality.methods import METHODS
from benchmarks.quality.search import DENSE_RATES
from benchmarks.quality.summary import (
    REFERENCE,
    Line,
    Rows,
    interval,
    searched,
    summary,
    under_conditions,
    valley,
)
from benchmarks.stale import fault, today

HEAD = """\
Rows by `python -m benchmarks.quality.search` and `.table`, times by `.timing`, this
page by `.report`, all with `--scale {0}`, the first three with `--data DIR`."""
HEAD_OF_ROWS = """\
Rows of `{0}`, by `python -m benchmarks.quality.table --scale {1}{2}`;
held-out text: {3}."""

RESULTS_PAGE = {
    "soap": ("SOAP", ""),
    "muon": ("optax muon", ""),
    "default_muon/8": ("`lorapre_muon`", "width / 8"),
    "default_muon/32": ("`lorapre_muon`", "width / 32"),
    "adamw_b1_0.5": ("AdamW, b1 = 0.5", ""),
    "default/8": ("`lorapre_adamw`", "width / 8"),
    "default/32": ("`lorapre_adamw`", "width / 32"),
    "default_all/8": ("`lorapre_adamw`, embedding and head too", "width / 8"),
    "default_all/32": ("`lorapre_adamw`, embedding and head too", "width / 32"),
    "fira/4": ("Fira", "width / 4"),
    "adamw": ("AdamW", ""),
    "racs": ("RACS", ""),
    "scale": ("SCALE", ""),
    "adafactor": ("Adafactor", ""),
    "apollo/4": ("APOLLO", "width / 4"),
    "galore_published/4": ("GaLore", "width / 4"),
    "galore/4": ("optax galore", "width / 4"),
    "paper_common/8": ("Algorithm 1, embedding at the common rate", "width / 8"),
    "paper_0.25/8": ("Algorithm 1, `update_scale=0.25`", "width / 8"),
}
"""The methods in docs/results/loss.md, with their names and ranks there."""


def results_page(known: Rows, times: Mapping[str, float]) -> str:
    """Returns the table of docs/results/loss.md, with fewer methods and columns."""
    lines = [line for line in summary(known) if line.key.method in RESULTS_PAGE]
    counts = {len(line.losses) for line in lines}
    table, stale = [], stale_methods(known)
    for line in lines:
        name, rank = RESULTS_PAGE[line.key.method]
        spread = "" if line.spread is None else f" ({line.spread:.3f})"
        seeds = {} if len(counts) == 1 else {"seeds": len(line.losses)}
        cells = {
            "method": _mark(name, line.key.method, stale),
            "rank": rank,
            "learning rate": _rate(line),
            **seeds,
            "held-out loss": f"{line.loss:.3f}{spread}",
            "minus AdamW": interval(line.differences, digits=3),
            "state of the matrices": _share(line.matrix_state),
            "of all": _share(line.all_state),
        }
        table.append(cells | _time(line, times))
    return _record.table(table)


def _rate(line: Line) -> str:
    """Returns the rate that a user sets, before a method multiplies it for matrices."""
    tied = METHODS[line.key.method].dense_factor is not None
    mantissa, exponent = f"{line.key.dense_rate if tied else line.key.rate:.2e}".split(
        "e"
    )
    return f"{float(mantissa):g}e{int(exponent)}"


def _share(ratio: float) -> str:
    return "1" if ratio == 1 else f"{ratio:.3f}"


def _time(line: Line, times: Mapping[str, float]) -> dict[str, str]:
    """Returns the time of a step in units of AdamW's; nothing if none was timed."""
    if not times:
        return {}
    seconds = times.get(line.key.method)
    ratio = "" if seconds is None else f"{seconds / times[REFERENCE]:.2f}"
    return {"time of a step": ratio}


def all_methods(known: Rows, times: Mapping[str, float]) -> str:
    """Returns the table of all methods, and the number of parameters."""
    sizes = next(iter(known.values()))["params"]
    total = sum(sizes.values())
    share, stale = f"{sizes['matrices'] / total:.1%}", stale_methods(known)
    table = _record.table(
        [
            {
                "method": _mark(line.key.method, line.key.method, stale),
                "rate": f"{line.key.rate:.3g}",
                "dense rate": _dense_rate(line.key.scale, line.key.dense_rate),
                "seeds": len(line.losses),
                "held-out loss": f"{line.loss:.4f}",
                "spread": "" if line.spread is None else f"{line.spread:.4f}",
                "minus AdamW": interval(line.differences),
                **{f"on {name}": f"{x:.4f}" for name, x in line.others.items()},
                "matrix state": _share(line.matrix_state),
                "all state": _share(line.all_state),
                **_time(line, times),
            }
            for line in summary(known)
        ]
    )
    return f"{table}\n\nOf {total:,} parameters, {share} are the matrices'."


def against(known: Rows, reference: str) -> str:
    """Returns the differences to a method, on the seeds that both have."""
    return _record.table(
        [
            {
                "method": line.key.method,
                "seeds": len(line.differences),
                f"minus {reference}": interval(line.differences),
            }
            for line in summary(known, reference)
            if line.differences
        ]
    )


def _dense_rate(scale: str, rate: float | None) -> str:
    """Returns the rate of embedding, head and norms, if it is not the common one."""
    if rate is None:
        return "tied"
    return "" if rate == DENSE_RATES[scale] else f"{rate:.3g}"


def all_rates(known: Rows, scale: str) -> str:
    """Returns the loss at every rate that was tried, and the range of good rates."""
    table, stale = [], stale_methods(known)
    for (method, dense_rate), losses in sorted(
        searched(known).items(), key=lambda item: item[0][0]
    ):
        cells = (f"{rate:g}: {loss:.4f}" for rate, loss in losses.items())
        line = {
            "method": _mark(method, method, stale),
            "dense rate": _dense_rate(scale, dense_rate),
            "loss by rate": ", ".join(cells),
            "within 0.05": valley(losses) if len(losses) > 2 else "",
            "best": f"{min(losses, key=losses.__getitem__):g}",
        }
        table.append(line)
    return _record.table(table)


def conditions(found: Mapping[str, Mapping[str, Sequence[float]]], known: Rows) -> str:
    """Returns a line per condition: mean losses, and their differences to AdamW's."""
    table = []
    methods = sorted({method for losses in found.values() for method in losses})
    for condition, losses in found.items():
        base = losses[REFERENCE]
        line: dict[str, Any] = {"condition": condition, "seeds": len(base)}
        line |= dict.fromkeys(methods, "")  # Some did not race.
        for method, seeds in losses.items():
            line[method] = f"{statistics.fmean(seeds):.4f}"
            if method != REFERENCE:
                apart = [a - b for a, b in zip(seeds, base, strict=True)]
                line[method] += f" ({interval(apart)})"
        stale = stale_methods(dict(rows.of(known, condition=condition)))
        table.append(line | {"stale": ", ".join(sorted(stale))})
    return _record.table(table)


def page(table: Rows, scale: str, file: str | None = None) -> str:
    """Returns a Markdown page of tables, with stale rows marked (see `stale.py`).

    Args:
      file: Name of the file that the rows are from; None means the committed table.
    """
    times = {} if file else seconds_a_step(scale)
    plain = plain_only(table)
    parts = [_section("the results page", plain, results_page(plain, times))]
    if file:
        held_out = next(iter(table.values())).get("held_out", "of an older run")
        head = HEAD_OF_ROWS.format(file, scale, _options(table, scale), held_out)
        return "\n\n".join([head, *parts]) + "\n"
    parts.append(_section("all methods", plain, all_methods(plain, times)))
    if found := under_conditions(table):
        methods = {method for losses in found.values() for method in losses}
        rows_of = {key: row for key, row in table.items() if key.method in methods}
        parts.append(_section("conditions", rows_of, conditions(found, rows_of)))
    for kind in ("search", "ablations"):
        known = rows.read(rows.FOLDER / f"{kind}_{scale}.jsonl")
        if known:
            parts.append(_section(kind, known, all_rates(known, scale)))
    return "\n\n".join([HEAD.format(scale), *parts]) + "\n"


def _options(known: Rows, scale: str) -> str:
    """Returns the command's options for these rows, except `--data` and `--out`."""
    methods = {key.method for key in known}
    options = f" --methods {' '.join(sorted(methods))}"
    rates = {k.dense_rate for k in known if METHODS[k.method].dense_factor is None}
    if len(rates) == 1 and rates != {DENSE_RATES[scale]}:
        options += f" --dense-rate {rates.pop():g}"
    return options


def plain_only(known: Rows) -> Rows:
    return {key: row for key, row in known.items() if key.condition == "plain"}


def _section(title: str, known: Rows, table: str) -> str:
    stale = [f"{name} ({why})" for name, why in sorted(stale_methods(known).items())]
    said = f"Stale (†): {'; '.join(stale)}." if stale else "None is stale."
    return f"## {title}\n\n{table}\n\n{said}"


def stale_methods(known: Rows) -> dict[str, str]:
    """Returns the methods with rows that today's code would not make, and why."""
    now = today()
    counts: dict[str, Counter[str]] = {}
    for key, row in known.items():
        why = fault(key.method, row.get("fingerprint"), now)
        counts.setdefault(key.method, Counter())[why] += 1
    return {
        method: ", ".join(f"{n} of {found.total()}: {why}" for why, n in each)
        for method, found in counts.items()
        if (each := [(why, n) for why, n in sorted(found.items()) if why])
    }


def _mark(name: str, method: str, stale: Container[str]) -> str:
    return f"{name} †" if method in stale else name


def seconds_a_step(scale: str) -> dict[str, float]:
    path = rows.FOLDER / f"timing_{scale}.json"
    if not path.exists():
        return {}
    lines = json.loads(path.read_text())["rows"]
    return {line["method"]: line["seconds a step"] for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=("a", "b", "c"), default="a")
    parser.add_argument("--rows", type=Path, help="default: the committed table's")
    parser.add_argument("--against", metavar="METHOD", help="by its name in methods.py")
    args = parser.parse_args()
    path = args.rows or rows.FOLDER / f"table_{args.scale}.jsonl"
    known = rows.read(path)
    if not known:
        raise SystemExit(f"{path}: no rows; run benchmarks.quality.table first")
    if args.against:
        print(against(plain_only(known), args.against))
        return
    text = page(known, args.scale, args.rows and path.name)
    path.with_suffix(".md").write_text(text)
    names = {method: " ".join(each) for method, each in RESULTS_PAGE.items()}
    times = {} if args.rows else seconds_a_step(args.scale)
    plot(plain_only(known), names, times, path.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
