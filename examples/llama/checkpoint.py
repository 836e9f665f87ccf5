"""The checkpoints of a run: written in the background, verified before use."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

import lorapre_jax as lp
from examples.llama import files, hosts
from examples.llama.digests import UNFINISHED, Digests

_KEPT = 2
_SUFFIX = "-unfinished"  # In `damaged`, of one whose saving was interrupted.


class SaveFailed(OSError):
    """A checkpoint could not be written; earlier checkpoints are unchanged."""


class DamagedCheckpoint(ValueError):
    """The files of every checkpoint of the run differ from what was saved."""


def newest(workdir: Path) -> Path:
    """Returns the last good checkpoint; a run may be writing more.

    Raises ``DamagedCheckpoint``, also if there is none.
    """
    steps = _steps(workdir.resolve() / "checkpoints")
    digests = Digests(workdir.resolve() / "digests")
    faults = []
    for path in reversed(steps):
        fault = digests.fault(path, path == steps[-1])
        if not fault:
            return path
        faults.append(f"\n{path}: {fault}")
    raise DamagedCheckpoint(f"{workdir} has no good checkpoint{''.join(faults)}")


class Checkpoints:
    """Orbax checkpoints in ``workdir/checkpoints``, by number of steps done.

    Orbax writes in the background and commits a checkpoint by renaming its folder, but
    keeps no checksums of arrays. So the digests of all files are written after the
    commit, with the run and the step that they are of, and compared before anything is
    restored. A checkpoint that differs is moved to ``workdir/damaged``, and the one
    before it is the latest. A checkpoint without digests, whose process was killed
    before it wrote them, is moved there too, until another checkpoint is safe.

    Attributes:
      set_aside: What was moved there and why, one line each.

    Raises:
      DamagedCheckpoint: None is as it was saved, or all have been taken away.
    """

    def __init__(self, workdir: Path):
        workdir = workdir.resolve()
        self._folder = workdir / "checkpoints"
        self._digests, self._damaged = Digests(workdir / "digests"), workdir / "damaged"
        self.set_aside = hosts.on_first(self._begin) or []
        options = ocp.CheckpointManagerOptions(
            max_to_keep=_KEPT,
            cleanup_tmp_directories=True,  # Those of saves that were killed.
        )
        self._manager = ocp.CheckpointManager(
            self._folder, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )
        self._sealer = ThreadPoolExecutor(1)
        self._sealing: Future[None] | None = None
        self._saving = 0  # The step that is being saved, or was last.

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        failures = []
        for end in (self.wait, self._sealer.shutdown, self._manager.close):
            try:
                with self._failure_named():
                    end()
            except SaveFailed as failed:
                failures.append(failed)
        if failures and error is None:
            raise failures[0]
        if failures and error:
            error.add_note(str(failures[0]))  # What ended the run comes first.

    @property
    def latest(self) -> Path | None:
        """The folder of ``latest_step``."""
        return None if self.latest_step is None else self.path(self.latest_step)

    @property
    def latest_step(self) -> int | None:
        """The last step of all that were saved before or passed to ``save``."""
        return self._manager.latest_step()

    def last_good(self) -> Path | None:
        """Waits, and returns the folder of the last checkpoint that is safe on disk.

        On several hosts, all of them must call it.
        """
        hosts.on_first(self._finish_writing)
        sealed = map(self.path, reversed(self._digests.steps()))
        return next((path for path in sealed if path.exists()), None)

    def _finish_writing(self) -> None:
        with contextlib.suppress(SaveFailed):  # Told when the manager is closed.
            self.wait()

    def path(self, step: int) -> Path:
        return self._folder / str(step)

    def save(self, step: int, state: Any) -> None:
        """Starts to write ``state``, a pytree of arrays, unless it is saved already.

        The arrays may be donated at once: by then accelerators have copied them to the
        host. A CPU lends its own buffers to the writer, and JAX gives the results of a
        donation fresh memory where a buffer is lent.

        Raises ``SaveFailed`` also if the save before this one failed.
        """
        if step == self.latest_step:
            return
        self.wait()
        self._saving = step
        with self._failure_named():
            self._manager.save(
                step,
                args=ocp.args.StandardSave(state),
                custom_metadata=lp.state_record(state),
            )
        if hosts.is_first():
            self._sealing = self._sealer.submit(self._seal, step)

    def wait(self) -> None:
        """Waits until everything passed to ``save`` is safe on disk."""
        with self._failure_named():
            self._manager.wait_until_finished()
            if self._sealing:
                self._sealing.result()

    def restore(self, abstract_state: Any) -> Any:
        """Returns the latest state, with the given shapes, dtypes and shardings.

        Raises ``ValueError`` if it is the state of another optimizer or model.
        """
        metadata = self._manager.metadata(self.latest_step)
        lp.check_state_record(metadata.custom_metadata, abstract_state)
        return self._manager.restore(
            self.latest_step, args=ocp.args.StandardRestore(abstract_state)
        )

    def _seal(self, step: int) -> None:
        """Writes the digests after Orbax's commit."""
        self._manager.wait_until_finished()
        self._digests.seal(self.path(step))
        for old in set(self._digests.steps()) - set(self._manager.all_steps()):
            self._digests.remove(old)
        for unfinished in self._damaged.glob(f"*{_SUFFIX}"):
            shutil.rmtree(unfinished)

    @contextlib.contextmanager
    def _failure_named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax passes on whatever its parts raise.
            raise SaveFailed(
                f"checkpoint {self.path(self._saving)} could not be written: {error}"
            ) from error

    def _begin(self) -> list[str]:
        """Moves checkpoints that are not good; see ``set_aside``."""
        steps = _steps(self._folder)
        self._require_history(steps)
        lines = self._set_aside(steps)
        self._digests.begin()
        files.clear_unfinished(self._folder.parent)
        return lines

    def _require_history(self, steps: list[Path]) -> None:
        """Raises an error if a run has lost all of its checkpoints."""
        log = self._folder.with_name("metrics.jsonl")
        has_log = log.exists() and log.stat().st_size > 0
        is_gone = not self._folder.exists() and has_log
        if not steps and (is_gone or self._digests.steps()):
            raise DamagedCheckpoint(
                f"{self._folder}: the checkpoints of this run are gone, though "
                f"{self._folder.with_name('digests')} or {log} tell of them. Bring "
                "them back (is a disk not mounted?), or give another `workdir` to "
                "start anew."
            )

    def _set_aside(self, steps: list[Path]) -> list[str]:
        faults = {path: self._digests.fault(path, path == steps[-1]) for path in steps}
        faults = {path: fault for path, fault in faults.items() if fault}
        lines = [f"checkpoint {path} refused: {why}" for path, why in faults.items()]
        # The very first one may have been interrupted: then nothing is lost.
        is_alone = list(faults.values()) == [UNFINISHED]
        is_first = is_alone and not self._digests.steps()
        if faults and len(faults) == len(steps) and not is_first:
            end = "None is left. Give another `workdir` to start anew."
            raise DamagedCheckpoint("\n".join([*lines, end]))
        moved = []
        for path, line in zip(faults, lines, strict=True):
            # Or they would be taken for those of the checkpoint that replaces it.
            self._digests.remove(int(path.name))
            if path in steps[:-_KEPT]:  # Orbax was deleting it, as was due.
                shutil.rmtree(path)
                continue
            suffix = _SUFFIX if faults[path] == UNFINISHED else ""
            target = self._damaged / f"{path.name}{suffix}"
            self._damaged.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
            moved.append(f"{line}; moved to {target}")
        return moved


def _steps(folder: Path) -> list[Path]:
    """Returns the folders of checkpoints by number of steps."""
    names = re.compile(r"0|[1-9][0-9]*")
    steps = [path for path in folder.glob("*") if names.fullmatch(path.name)]
    return sorted(steps, key=lambda path: int(path.name))
