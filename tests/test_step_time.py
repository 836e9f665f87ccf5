"""The benchmark of a step runs on the trainer's own state."""

import argparse

import jax
import numpy as np
import pytest

from benchmarks import step_time
from examples.llama.config import PRESETS
from examples.llama.data.rows import Batch

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_each_part_is_timed_and_the_state_goes_on():
    smallest = min(PRESETS, key=lambda name: PRESETS[name].width)
    args = argparse.Namespace(preset=smallest, rank=4)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 16), np.int32)
    batch = Batch(tokens, np.roll(tokens, -1, 1), np.ones(tokens.shape, np.float32))
    subject = step_time.Subject("lorapre_adamw", args, jax.device_put(batch))
    for _ in range(2):
        subject.measure()
    assert {name: len(times) for name, times in subject.times.items()} == {
        "gradient": 2,
        "update": 2,
        "step": 2,
    }
    assert int(subject.state.step) == 2
    assert subject.peak_bytes > 0
    (row,) = step_time.rows_of({"adamw": subject}, micro=2)
    assert row["step, ratio"] == 1
