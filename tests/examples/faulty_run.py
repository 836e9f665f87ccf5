"""The example with one fault: `python -m tests.examples.faulty_run FAULT OPTIONS`.

A fault happens at a fixed point of a run that saves after steps 6 and 12. Functions of
the example and of the standard library are replaced for it; the rest is as it ships.
"""

import hashlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np

from examples.llama import prepare
from examples.llama.checkpoint import Checkpoints
from examples.llama.main import run


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_between_saves() -> None:
    """Kills the run when checkpoint 6 is safe and step 7 has not begun."""
    save = Checkpoints.save

    def save_and_die(self, step, state):
        save(self, step, state)
        self.wait()
        kill()

    Checkpoints.save = save_and_die


def killed_before_the_commit() -> None:
    """Kills the run when checkpoint 12 is written, before the folder is renamed."""
    rename = os.rename

    def rename_or_die(source, target, **more):
        if Path(target).name == "12":
            kill()
        rename(source, target, **more)

    os.rename = rename_or_die


def killed_before_the_digests() -> None:
    """Kills the run when checkpoint 12 is committed, before a file is hashed."""
    file_digest = hashlib.file_digest

    def digest_or_die(file, *more):
        if "12" in Path(file.name).parts:
            kill()
        return file_digest(file, *more)

    hashlib.file_digest = digest_or_die


def told_to_stop_in_the_last_save() -> None:
    """Sends SIGTERM before the files of checkpoint 12 are hashed."""
    file_digest = hashlib.file_digest

    def stop_and_digest(file, *more):
        if "12" in Path(file.name).parts:
            hashlib.file_digest = file_digest
            time.sleep(1)  # All but the saving is over by now.
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        return file_digest(file, *more)

    hashlib.file_digest = stop_and_digest


def disk_full() -> None:
    """Limits files to 32 kB from the save of step 12 on; arrays need more.

    A limit on the size of files needs no privileges and no second file system; the
    system call that writes fails in the same way, by EFBIG instead of ENOSPC.
    """
    save = Checkpoints.save

    def save_on_a_full_disk(self, step, state):
        if step == 12:
            self.wait()
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, hard))
        save(self, step, state)

    Checkpoints.save = save_on_a_full_disk


def digest(batch) -> str:
    parts = (np.asarray(part).tobytes() for part in batch)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def recorded() -> None:
    """Writes each step's batch to batches.jsonl in the workdir, without a fault."""
    folder = Path(sys.argv[sys.argv.index("--workdir") + 1])
    make_train_step = prepare.make_train_step

    def make_recorded(*arguments, **more):
        step = make_train_step(*arguments, **more)

        def record(state, batch):
            line = json.dumps([int(state.step) + 1, digest(batch)])
            with (folder / "batches.jsonl").open("a") as file:
                file.write(line + "\n")
            return step(state, batch)

        return record

    prepare.make_train_step = make_recorded


def recorded_and_killed() -> None:
    recorded()
    killed_between_saves()


FAULTS = {
    fault.__name__: fault
    for fault in (
        killed_between_saves,
        killed_before_the_commit,
        killed_before_the_digests,
        told_to_stop_in_the_last_save,
        disk_full,
        recorded,
        recorded_and_killed,
    )
}

if __name__ == "__main__":
    FAULTS[sys.argv.pop(1)]()
    sys.exit(run(sys.argv[1:]))
