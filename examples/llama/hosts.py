"""Several processes as one job, on JAX's own multi-host runtime."""

import hashlib
import re
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from examples.llama.ending import Code, end_now
from examples.llama.peers import Peers
from examples.llama.relay import relay

_AUTO = "auto"
_SECONDS_TO_ABORT = 60
"""For JAX, without a heartbeat of a process, where `Peers` has not noticed before."""
_SECONDS_TO_JOIN = 300

others: Peers | None = None
"""Of the job that this process has joined."""


class FirstFailed(ValueError):
    """The first process has stopped; the message says why."""


def parse_job(text: str) -> dict[str, Any]:
    """Parses `"auto"` or `"host:port,processes,own number"` for `jax.distributed`."""
    if text == _AUTO:
        return {}
    match = re.fullmatch(r"([^,]+):(\d+),(\d+),(\d+)", text)
    port, count, own = map(int, match.groups()[1:]) if match else (0, 0, 0)
    if not match or own >= count or not 0 < port < 2**16:
        raise ValueError(
            f"`distributed`: {text!r} is neither auto nor like host0:1234,2,0 "
            "(coordinator, number of processes, own number from 0 on)"
        )
    return {
        "coordinator_address": f"{match[1]}:{port}",
        "num_processes": count,
        "process_id": own,
    }


def join(text: str) -> None:
    """Joins the job; call it before anything else asks JAX for devices."""
    global others
    job = parse_job(text)
    address = job.get("coordinator_address", "")
    if job.get("process_id"):
        job["coordinator_address"] = relay(address)
    elif address:
        # JAX would share the port with another job. Raises `OSError`.
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    late = "not all processes of the job have come"
    late += f" to {address}" if address else ""
    # Ends before JAX would abort.
    limit = threading.Timer(_SECONDS_TO_JOIN, end_now, (late, Code.PEER_GONE))
    limit.daemon = True
    limit.start()
    try:
        jax.distributed.initialize(
            **job,
            initialization_timeout=_SECONDS_TO_JOIN + 60,
            heartbeat_timeout_seconds=_SECONDS_TO_ABORT,
        )
    finally:
        limit.cancel()
    if jax.process_count() > 1:
        others = Peers(address.rpartition(":")[0].strip("[]"))


def is_first() -> bool:
    """Whether this process is the one that prints and logs."""
    return jax.process_index() == 0


def on_first(work: Callable[[], Any]) -> Any:
    """Calls `work` on the first process while others wait; returns its result or None.

    If it raises an error there, the others raise ``FirstFailed``.
    """
    result, error = None, None
    if is_first():
        try:
            result = work()
        except Exception as raised:
            error = raised
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
        if failed and not is_first():
            raise FirstFailed("the first process has stopped; it says why")
    if error is not None:
        raise error
    return result


def from_first(value: bool) -> bool:
    """Returns the first process's value on all processes, at the same time."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def check_same(text: str, what: str) -> None:
    """Raises an error unless the value is the same on all processes."""
    if jax.process_count() > 1:
        code = np.frombuffer(hashlib.sha256(text.encode()).digest()[:4], np.int32)
        if len(np.unique(multihost_utils.process_allgather(code))) > 1:
            raise ValueError(f"{what} is not the same on all hosts")


def rows_here(count: int, by_row: Sharding) -> list[int]:
    """Returns which of `count` rows are on this process's devices, in order."""
    mine: Any = by_row.addressable_devices_indices_map((count,))
    return sorted({row for index in mine.values() for row in _range(index, count)})


def place_rows(
    part: np.ndarray, rows: Sequence[int], count: int, by_row: Sharding
) -> jax.Array:
    """Returns (count, ...) on all devices; `part` has the `rows` of this process."""

    def of_device(index: Any) -> np.ndarray:
        places = np.searchsorted(rows, _range(index, count))
        return part[places][(slice(None), *index[1:])]

    return jax.make_array_from_callback((count, *part.shape[1:]), by_row, of_device)


def _range(index: Any, count: int) -> range:
    return range(*index[0].indices(count))
