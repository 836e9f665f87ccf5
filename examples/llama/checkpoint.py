"""The checkpoints of a run: written in the background, verified before use."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

import lorapre_jax as lp
from examples.llama import files, hosts
from examples.llama.config import differences

_KEPT = 2
_UNFINISHED = "its saving was interrupted"


class SaveFailed(OSError):
    """A checkpoint could not be written; those before it are as they were."""


class DamagedCheckpoint(ValueError):
    """No checkpoint of the run is what was saved."""


def newest(workdir: Path) -> Path:
    """The last checkpoint there that is what was saved; a run may be at work on more.

    Raises ``DamagedCheckpoint``, also where there is none.
    """
    steps = _steps(workdir.resolve() / "checkpoints")
    faults = []
    for path in reversed(steps):
        fault = _fault(path, path == steps[-1])
        if not fault:
            return path
        faults.append(f"\n{path}: {fault}")
    raise DamagedCheckpoint(f"{workdir} has no good checkpoint{''.join(faults)}")


class Checkpoints:
    """Orbax checkpoints in ``workdir/checkpoints``, by number of steps done.

    Orbax writes in the background and commits a checkpoint by renaming its folder, but
    keeps no checksums of arrays. So the digests of all files are written after the
    commit, and compared before anything is restored. A checkpoint that differs, or has
    none because the process was killed just there, is moved to ``workdir/damaged``, and
    the one before it is the latest.

    Attributes:
      set_aside: What was moved there and why, one line each.
    """

    def __init__(self, workdir: Path):
        self._folder = workdir.resolve() / "checkpoints"
        self._digests = workdir.resolve() / "digests"
        damaged = workdir.resolve() / "damaged"
        self.set_aside = hosts.on_first(lambda: self._set_aside(damaged)) or []
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
        try:
            self.wait()
        except SaveFailed as failed:
            if error is None:
                raise
            error.add_note(str(failed))  # What ended the run comes first.
        finally:
            self._sealer.shutdown()
            self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """Of all that ``save`` was given, or that were there before."""
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        return self._folder / str(step)

    def save(self, step: int, state: Any) -> None:
        """Begin to write ``state``, a pytree of arrays; nothing if it is there.

        The arrays may be donated at once: by then accelerators have copied them to the
        host. A CPU lends its own buffers to the writer, and JAX gives the results of a
        donation fresh memory where a buffer is lent.

        Raises ``SaveFailed`` also where the save before this one did not succeed.
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
        """Until all that was given to ``save`` is safe on disk."""
        with self._failure_named():
            self._manager.wait_until_finished()
            if self._sealing:
                self._sealing.result()

    def restore(self, abstract_state: Any) -> Any:
        """The latest state, with the shapes, dtypes and shardings asked for.

        Raises ``ValueError`` where that is the state of another optimizer or model.
        """
        metadata = self._manager.metadata(self.latest_step)
        lp.check_state_record(metadata.custom_metadata, abstract_state)
        return self._manager.restore(
            self.latest_step, args=ocp.args.StandardRestore(abstract_state)
        )

    def _seal(self, step: int) -> None:
        """Write the digests, once Orbax has committed."""
        self._manager.wait_until_finished()
        self._digests.mkdir(exist_ok=True)
        found = json.dumps(files.digests(self.path(step)), indent=2)
        files.write(_digest_file(self.path(step)), found + "\n")
        for file in self._digests.glob("*.json"):
            if int(file.stem) not in self._manager.all_steps():
                file.unlink()

    @contextmanager
    def _failure_named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax passes on whatever its parts raise.
            raise SaveFailed(
                f"checkpoint {self.path(self._saving)} could not be written: {error}"
            ) from error

    def _set_aside(self, damaged: Path) -> list[str]:
        steps = _steps(self._folder)
        faults = {path: _fault(path, path == steps[-1]) for path in steps}
        faults = {path: fault for path, fault in faults.items() if fault}
        lines = [f"checkpoint {path} refused: {why}" for path, why in faults.items()]
        # The very first one may have been interrupted: then nothing is lost.
        if len(faults) == len(steps) and list(faults.values()) not in (
            [],
            [_UNFINISHED],
        ):
            raise DamagedCheckpoint(
                "\n".join([*lines, "None is left. Remove the folder to start anew."])
            )
        moved = []
        for path, line in zip(faults, lines, strict=True):
            # Or they would be taken for those of the checkpoint that replaces it.
            _digest_file(path).unlink(missing_ok=True)
            if path in steps[:-_KEPT]:  # Orbax was deleting it, as was due.
                shutil.rmtree(path)
                continue
            damaged.mkdir(exist_ok=True)
            shutil.rmtree(damaged / path.name, ignore_errors=True)
            path.rename(damaged / path.name)
            moved.append(f"{line}; moved to {damaged}")
        return moved


def _steps(folder: Path) -> list[Path]:
    """By the number of steps."""
    steps = [path for path in folder.glob("*") if path.name.isdigit()]
    return sorted(steps, key=lambda path: int(path.name))


def _digest_file(path: Path) -> Path:
    return path.parents[1] / "digests" / f"{path.name}.json"


def _fault(path: Path, is_newest: bool) -> str:
    """Why the checkpoint is not what was saved; empty where it is."""
    file = _digest_file(path)
    if not file.exists():
        return _UNFINISHED if is_newest else f"{file} is missing"
    try:
        recorded = json.loads(file.read_text())
    except ValueError:
        return f"{file} cannot be read"
    names = ", ".join(sorted(differences(recorded, files.digests(path))))
    return f"{names} changed since it was saved" if names else ""
