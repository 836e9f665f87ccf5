"""Stores results: rows, the command that made them, and versions and device."""

import hashlib
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
    name: str, rows: Sequence[Row], methods: Iterable[str], folder: Path | None = None
) -> Path:
    """Writes `<name>.json` in the folder, by default `RESULTS`; returns its path.

    Args:
      methods: The methods of the race whose rules made the results; see `stale.py`.
    """
    spec = sys.modules["__main__"].__spec__  # None if it is run by path.
    module = spec.name if spec else f"benchmarks.{Path(sys.argv[0]).stem}"
    module = module.removesuffix(".__main__")
    path = (folder or RESULTS) / f"{name}.json"
    known = _of_this_commit(path).get("fingerprints", {})  # They take a while.
    record = {
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        "commit": commit(),
        "versions": {p: version(p) for p in ("jax", "jaxlib", "optax")},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "fingerprints": {
            x: known[x] if x in known else fingerprint.of(ENTRANTS[x]) for x in methods
        },
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def rows_of_this_commit(name: str, folder: Path | None = None) -> list[dict[str, Any]]:
    """Returns the rows in the file of `save` if they are of this commit, or none."""
    return _of_this_commit((folder or RESULTS) / f"{name}.json").get("rows", [])


def _of_this_commit(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text()) if path.exists() else {}
    return record if record.get("commit") == commit() else {}


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
    """Returns the short HEAD.

    If tracked Python files differ from it, or there is no repository, there is a digest
    of the code in it as well, so that other code always has another name.
    """
    head = _git("rev-parse", "--short", "HEAD")
    if head and not _git("diff", "--name-only", "HEAD", "--", "*.py"):
        return head
    return f"{head}-dirty-{_digest()}" if head else f"no-commit-{_digest()}"


def _digest() -> str:
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for folder in ("lorapre_jax", "examples", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:10]


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
