"""The benchmark of a step runs on the trainer's own state."""

import pytest

from benchmarks import step_time
from examples.llama.config import PRESETS, OptimizerConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_each_part_is_timed_and_the_state_goes_on():
    smallest = min(PRESETS, key=lambda name: PRESETS[name].width)
    batch = step_time.random_batch(rows=2, seq_len=16)
    optimizer = OptimizerConfig("lorapre_adamw", rank=4)
    subject = step_time.Subject(smallest, optimizer, batch, micro=1)
    step_time.take_turns([subject], repeats=2)
    assert {name: len(times) for name, times in subject.times.items()} == {
        "gradient": 2,
        "update": 2,
        "step": 2,
    }
    assert int(subject.state.step) == 1 + 2  # The first one was a warm-up.
    assert subject.peak_bytes > 0
    (row,) = step_time.rows_of({"adamw": subject})
    assert row["step, ratio"] == 1
    assert row["rows"] == 2
