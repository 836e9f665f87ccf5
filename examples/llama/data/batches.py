"""Batches by number: shuffled, sharded over hosts, and placed ahead of time."""

from collections.abc import Sequence
from typing import Any

import grain
from absl import flags
from jax.sharding import Sharding

from examples.llama import hosts
from examples.llama.data.rows import Batch, Rows, stack

# How many batches each worker reads ahead, and how many wait on the devices.
_READ_AHEAD, _ON_DEVICES = 2, 2


def train_rows(rows: Rows, seed: int) -> grain.MapDataset[Batch]:
    """Returns endless rows, in another order every epoch.

    Random access makes a row a pure function of (seed, number): a resumed run continues
    with exactly the tokens it would have seen, and a host reads its own rows alone.
    """
    return grain.MapDataset.source(rows).seed(seed).shuffle().repeat()


def train_batches(rows: Rows, batch_size: int, seed: int) -> grain.MapDataset[Batch]:
    """Returns endless batches of NumPy arrays; number ``step`` is ``batches[step]``."""
    return train_rows(rows, seed).batch(batch_size)


class SomeRows:
    """Some rows of each batch, by the batch's number."""

    def __init__(self, rows: Rows, batch_size: int, seed: int, places: Sequence[int]):
        self._rows: Any = train_rows(rows, seed)
        self._batch_size, self._places = batch_size, places

    def __call__(self, step: int) -> Batch:
        first = step * self._batch_size
        return stack([self._rows[first + place] for place in self._places])


def placed(batch: Batch, by_row: Sharding) -> Batch:
    """Places a batch, of which this process has all rows, on all devices."""
    size = len(batch.mask)
    places = hosts.rows_here(size, by_row)
    return Batch(*(hosts.place_rows(x[places], places, size, by_row) for x in batch))


def batches_on_devices(
    rows: Rows,
    batch_size: int,
    seed: int,
    steps: range,
    by_row: Sharding,
    workers: int = 0,
) -> grain.DatasetIterator[Batch]:
    """Returns the batches of ``steps``, sharded ``by_row``; close it after use.

    Each process reads the rows of its own devices, in ``workers`` processes (0: in a
    thread of this one), and a thread places the batches ahead of time.

    A checkpoint needs nothing of this iterator but how many batches were taken, which
    is the number of steps: that is valid for any mesh, hosts and workers, while grain's
    own state has an entry per worker and is bound to grain's version.
    """
    if workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read absl's flags; we have none.
    places = hosts.rows_here(batch_size, by_row)

    def place(part: Batch) -> Batch:
        return Batch(*(hosts.place_rows(x, places, batch_size, by_row) for x in part))

    read = grain.MapDataset.range(steps.start, steps.stop).map(
        SomeRows(rows, batch_size, seed, places)
    )
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_READ_AHEAD)
    batches = read.to_iter_dataset(ahead).mp_prefetch(
        grain.MultiprocessingOptions(workers, per_worker_buffer_size=_READ_AHEAD)
    )
    return iter(
        grain.experimental.ThreadPrefetchIterDataset(
            batches.map(place), prefetch_buffer_size=_ON_DEVICES
        )
    )
