"""Several processes as one job, on JAX's own multi-host runtime."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

_AUTO = "auto"
_SECONDS_TO_NOTICE = 10
"""That another process is gone: then all end, since none can go on without it."""


def parse_job(text: str) -> dict[str, Any]:
    """`"auto"`, or `"host:port,processes,own number"`, for `jax.distributed`."""
    if text == _AUTO:
        return {}
    match = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", text)
    if not match or int(match[3]) >= int(match[2]):
        raise ValueError(
            f"distributed: {text!r} is neither auto nor like host0:1234,2,0 "
            "(coordinator, number of processes, own number from 0 on)"
        )
    return {
        "coordinator_address": match[1],
        "num_processes": int(match[2]),
        "process_id": int(match[3]),
    }


def join(text: str) -> None:
    """Before anything else asks JAX for its devices."""
    job = parse_job(text)
    jax.distributed.initialize(**job, heartbeat_timeout_seconds=_SECONDS_TO_NOTICE)


def is_first() -> bool:
    """Whether this process is the one that prints and logs."""
    return jax.process_index() == 0


def wait_for_all(why: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(why)


def batch_from_rows(
    row: Callable[[int], Any], count: int, by_row: Sharding
) -> jax.Array:
    """(count, ...) of which each process reads the rows of its own devices alone."""
    shape = (count, *row(0).shape)

    def part(index: Any) -> np.ndarray:
        rows = range(*index[0].indices(count))
        return np.stack([row(i) for i in rows])[(slice(None), *index[1:])]

    return jax.make_array_from_callback(shape, by_row, part)
