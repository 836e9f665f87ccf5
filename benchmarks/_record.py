"""Stores results: rows, the command that made them, and versions and device."""

import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from benchmarks import fingerprint
from benchmarks.quality.ablations import ENTRANTS

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, Any]
OF_TRAINER = {
    "adamw": "adamw",
    "muon": "muon",
    "galore": "galore/4",
    "lorapre_adamw": "default/8",
    "lorapre_muon": "default_muon/8",
}
"""The race's names for the rules of the trainer's optimizers."""


def save(
    name: str, rows: Sequence[Row], methods: Iterable[str], **numbers: Any
) -> Path:
    """Writes `results/<name>.json`; returns its path.

    Args:
      methods: The methods of the race whose rules made the results; see `stale.py`.
      numbers: What holds for all rows, such as the machine's rates.
    """
    spec = sys.modules["__main__"].__spec__  # None if it is run by path.
    module = spec.name if spec else f"benchmarks.{Path(sys.argv[0]).stem}"
    module = module.removesuffix(".__main__")
    record = {
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        "commit": commit(),
        "versions": {p: version(p) for p in ("jax", "jaxlib", "optax", "lorapre-jax")},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "fingerprints": {x: fingerprint.of(ENTRANTS[x]) for x in methods},
        **numbers,
        "rows": list(rows),
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def rows_of_this_commit(name: str) -> list[dict[str, Any]]:
    """Returns the rows in `results/<name>.json` if they are of this commit, or none."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    return record["rows"] if record["commit"] == commit() else []


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as a Markdown table."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([_cell(r[k]) for k in head] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def commit() -> str:
    """Returns the short HEAD, with "-dirty" if tracked Python files differ from it."""
    head = _git("rev-parse", "--short", "HEAD") or "unknown"
    return head + "-dirty" * bool(_git("diff", "--name-only", "HEAD", "--", "*.py"))


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()
