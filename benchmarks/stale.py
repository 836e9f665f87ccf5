"""Lists the committed results that today's code would not reproduce.

    python -m benchmarks.stale

A row of the race has the fingerprint of its method. Any other result has those of the
methods of the race with the same rules, possibly at another rank. The command computes
today's fingerprints in some minutes, compares, and stores them in
results/fingerprints.json, from which pages are marked. Results whose code is gone are
in results/archive and are not listed. Copy the list to benchmarks/README.md.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import _record, fingerprint
from benchmarks.quality import rows
from benchmarks.quality.ablations import ENTRANTS

TODAY = _record.RESULTS / "fingerprints.json"
OTHER, UNKNOWN, GONE = "another rule", "not known", "no code"
Numbers = Sequence[float]


class Result(NamedTuple):
    file: str
    method: str
    numbers: Numbers | None


class Now(NamedTuple):
    numbers: Numbers
    tolerance: float


def today() -> dict[str, Now]:
    """Returns the fingerprints of all methods when the command was last run."""
    return {name: Now(*x) for name, x in json.loads(TODAY.read_text()).items()}


def fault(method: str, numbers: Numbers | None, now: Mapping[str, Now]) -> str:
    """Returns why a result of the method is stale; empty if it is not."""
    if method not in now:
        return GONE
    if numbers is None:
        return UNKNOWN
    return "" if fingerprint.is_same(numbers, *now[method]) else OTHER


def results(folder: Path = _record.RESULTS) -> Iterator[Result]:
    for path in sorted((folder / "quality").glob("*.jsonl")):
        for key, row in rows.read(path).items():
            name = str(path.relative_to(folder))
            yield Result(name, key.method, row.get("fingerprint"))
    for path in sorted([*folder.glob("*.json"), *(folder / "quality").glob("*.json")]):
        if path.name != TODAY.name:
            found = json.loads(path.read_text())["fingerprints"]
            for method, numbers in found.items():
                yield Result(str(path.relative_to(folder)), method, numbers)


def table(now: Mapping[str, Now], folder: Path = _record.RESULTS) -> str:
    """Returns a Markdown table of the stale results by file and method."""
    every, stale = Counter(), Counter()
    for file, method, numbers in results(folder):
        every[file, method] += 1
        if why := fault(method, numbers, now):
            stale[file, method, why] += 1
    lines = [
        {
            "file": file,
            "method": f"`{method}`",
            "rows": f"{count} of {every[file, method]}",
            "its rule": why,
        }
        for (file, method, why), count in sorted(stale.items())
    ]
    return _record.table(lines) if lines else "None."


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    now = {
        name: Now(fingerprint.of(method), fingerprint.tolerance(method))
        for name, method in sorted(ENTRANTS.items())
    }
    lines = [f" {json.dumps(name)}: {json.dumps(now[name])}" for name in now]
    TODAY.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(table(now))


if __name__ == "__main__":
    main()
