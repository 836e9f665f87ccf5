"""Two processes with four CPU devices each, as one job."""

import dataclasses
import io
import json
import re
import signal
import socket
import threading
import time

import jax
import numpy as np
import pytest
from command_line import start
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from examples.llama import hosts
from examples.llama.config import Config
from examples.llama.train import train

MESH = "fsdp=4,tensor=2"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def two_processes(config, *more):
    port = free_port()
    return [
        start(
            config, "--mesh", MESH, "--distributed", f"localhost:{port},2,{i}", *more,
            devices=4,
        )
        for i in range(2)
    ]  # fmt: skip


def records(config):
    path = config.workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in lines]


def test_two_processes_have_the_losses_of_one(make_config, tmp_path):
    one = make_config(tmp_path / "one", "lorapre_adamw", mesh=MESH)
    train(one, Console(file=io.StringIO()))
    two = dataclasses.replace(one, workdir=tmp_path / "two")
    first, second = two_processes(two)
    outputs = [process.communicate(timeout=240) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert "8 device(s)" in outputs[0][0]
    assert "step 6/12" in outputs[0][0]
    assert "step" not in outputs[1][0]  # Only the first one prints.
    assert "perplexity" not in outputs[1][0]
    assert len(records(one)) == len(records(two)) == 13
    for alone, together in zip(records(one), records(two), strict=True):
        assert together.keys() == alone.keys()
        for name in alone.keys() & {"train_loss", "held_out_loss"}:
            assert together[name] == pytest.approx(alone[name], rel=1e-4)


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_job_that_lost_a_process_goes_on_as_another_job(make_config, tmp_path):
    config = make_config(tmp_path / "run", "lorapre_adamw", steps=3000)
    first, second = two_processes(config)
    wait_for(lambda: len(records(config)) > 8)
    second.kill()
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 68, errors
    assert f"process 1 (pid {second.pid} on " in errors
    assert "is gone, and no other can go on without it" in errors
    second.communicate()

    alone = start(config, "--mesh", "fsdp=4", devices=4)
    lost = len(records(config))
    wait_for(lambda: alone.poll() is not None or len(records(config)) > lost + 8)
    alone.send_signal(signal.SIGTERM)
    printed, errors = alone.communicate(timeout=60)
    assert "going on after step" in printed, errors
    assert alone.returncode == 143
    steps = [record["step"] for record in records(config)]
    assert steps == list(range(len(steps)))


def test_a_job_told_to_stop_saves_and_the_same_command_goes_on(make_config, tmp_path):
    config = make_config(tmp_path / "run", "lorapre_adamw", steps=3000)
    first, second = job = two_processes(config)
    wait_for(lambda: len(records(config)) > 4)
    second.send_signal(signal.SIGTERM)  # One host hears of it; all stop at one step.
    outputs = [process.communicate(timeout=120) for process in job]
    assert [first.returncode, second.returncode] == [143, 143], outputs
    saved = records(config)[-1]["step"]
    assert f"saved after step {saved}" in outputs[0][0]

    first, second = job = two_processes(config, "--time-limit", "0.001")
    outputs = [process.communicate(timeout=240) for process in job]
    assert [first.returncode, second.returncode] == [75, 75], outputs
    assert f"going on after step {saved}" in outputs[0][0]
    steps = [record["step"] for record in records(config)]
    assert steps == list(range(len(steps)))
    assert saved < steps[-1] < 3000


def test_a_job_that_diverges_stops_at_one_step(make_config, tmp_path):
    config = make_config(tmp_path / "run", steps=40, checkpoint_every=5)
    first, second = job = two_processes(config, "--learning-rate", "1e20")
    outputs = [process.communicate(timeout=240) for process in job]
    assert [first.returncode, second.returncode] == [76, 76], outputs
    steps = {re.findall(r"not finite at step (\d+)", error)[0] for _, error in outputs}
    assert steps == {str(records(config)[-1]["step"])}


def test_each_process_reads_its_own_rows():
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    by_row = NamedSharding(mesh, P("x"))
    here = hosts.rows_here(8, by_row)
    assert here == list(range(8))  # Once, for both columns of devices.
    part = np.arange(8)[:, None] * np.ones(3)
    batch = hosts.place_rows(part, here, 8, by_row)
    np.testing.assert_array_equal(batch, part)
    assert batch.sharding.shard_shape(batch.shape) == (2, 3)


@pytest.mark.parametrize(
    "text",
    ["host", "host:1,2", "host:1,2,2", "host:1,two,0", "host:0,2,0", "host:65536,2,0"],
)
def test_a_bad_job_is_refused(text):
    with pytest.raises(ValueError, match="neither auto nor like host0:1234,2,0"):
        Config(distributed=text)


def test_a_job_is_read():
    assert hosts.parse_job("auto") == {}
    assert hosts.parse_job("host0:1234,4,3") == {
        "coordinator_address": "host0:1234",
        "num_processes": 4,
        "process_id": 3,
    }


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_where_the_first_one_fails_all_do(error, monkeypatch):
    def fail():
        raise error("a full disk")

    said = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", said.append)
    with pytest.raises(error, match="full disk"):
        hosts.on_first(fail)
    assert said == [1]
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda _: said[0])
    with pytest.raises(hosts.FirstFailed, match="it says why"):
        hosts.on_first(fail)


@pytest.fixture
def joined(monkeypatch):
    """Returns the coordinators that JAX was told to join."""
    addresses = []

    def initialize(coordinator_address, **_):
        addresses.append(coordinator_address)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return addresses


def test_jax_joins_others_through_a_relay(joined):
    address = f"localhost:{free_port()}"
    hosts.join(f"{address},2,0")
    hosts.join(f"{address},2,1")
    assert joined[0] == address
    assert joined[1].startswith("127.0.0.1:")


def test_a_port_of_another_job_is_not_shared(joined):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            hosts.join(f"localhost:{port},2,0")
    assert not joined


def test_a_job_that_is_never_whole_ends(monkeypatch):
    has_ended, how = threading.Event(), []

    def end(*message_and_code):
        how.extend(message_and_code)
        has_ended.set()

    monkeypatch.setattr(hosts, "_SECONDS_TO_JOIN", 0)
    monkeypatch.setattr(hosts, "end_now", end)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: has_ended.wait(60))
    hosts.join("host0:1234,2,1")
    assert how == ["not all processes of the job have come to host0:1234", 68]
