"""SHA-256 digests of every file of a run's checkpoints when they were saved."""

import dataclasses
import json
import re
import uuid
from pathlib import Path

from examples.llama import files

UNFINISHED = "its saving was interrupted"
_RUN = "run"  # A file beside the others: whose they are.


@dataclasses.dataclass(frozen=True)
class _Digest:
    run: str
    step: int
    files: dict[str, str]  # SHA-256 by path.


class Digests:
    """A folder with a file for each checkpoint, by its step, and the run's name."""

    def __init__(self, folder: Path):
        self._folder = folder

    def begin(self) -> None:
        """Makes the folder, and gives the run a name if it has none."""
        run = self._run() or uuid.uuid4().hex
        self._folder.mkdir(parents=True, exist_ok=True)
        files.clear_unfinished(self._folder)
        files.write(self._folder / _RUN, run + "\n")

    def steps(self) -> list[int]:
        """The steps with digests, in order; other files are ignored."""
        names = re.compile(r"(0|[1-9][0-9]*)\.json")
        found = [path for path in self._folder.glob("*") if names.fullmatch(path.name)]
        return sorted(int(path.stem) for path in found)

    def seal(self, checkpoint: Path) -> None:
        """Writes the digests of a checkpoint that is complete."""
        step = int(checkpoint.name)
        digest = _Digest(self._run() or "", step, files.digests(checkpoint))
        text = json.dumps(dataclasses.asdict(digest), indent=2)
        files.write(self._file(step), text + "\n")

    def remove(self, step: int) -> None:
        self._file(step).unlink(missing_ok=True)

    def fault(self, checkpoint: Path, is_newest: bool) -> str:
        """Returns why a checkpoint is not what was saved; empty if it is."""
        step, run = int(checkpoint.name), self._run()
        file = self._file(step)
        if not file.exists():
            # Imported weights, at step 0, come with all that belongs to them.
            is_unfinished = is_newest and run is not None and step > 0
            return UNFINISHED if is_unfinished else f"{file} is missing"
        digest = _read(file)
        if digest is None:
            return f"{file} cannot be read"
        if digest.step != step:
            return f"by {file} it is the checkpoint of step {digest.step}, renamed"
        if digest.run != run:
            name = self._folder / _RUN
            return f"by {file} it is of another run than that of {name}"
        now = files.digests(checkpoint)
        changed = {name for name, _ in now.items() ^ digest.files.items()}
        names = ", ".join(sorted(changed))
        return f"{names} changed since it was saved" if changed else ""

    def _file(self, step: int) -> Path:
        return self._folder / f"{step}.json"

    def _run(self) -> str | None:
        """The run's name, from its file or the newest digests; None without a run."""
        file = self._folder / _RUN
        try:
            name = file.read_text().strip() if file.exists() else ""
        except ValueError:
            name = ""
        if re.fullmatch("[0-9a-f]{32}", name):  # Else it is damaged.
            return name
        found = (_read(self._file(step)) for step in reversed(self.steps()))
        return next((digest.run for digest in found if digest), None)


def _read(file: Path) -> _Digest | None:
    """Returns a file's content; None if it cannot be read."""
    try:
        digest = _Digest(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    if not isinstance(digest.files, dict) or not isinstance(digest.run, str):
        return None
    return digest if all(isinstance(x, str) for x in digest.files.values()) else None
