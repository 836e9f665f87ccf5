"""A job notices the end of each process. Here all of them are in this process."""

import contextlib
import queue
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest
from command_line import REPOSITORY
from test_llama_hosts import free_port

from examples.llama import peers
from examples.llama.peers import Peers
from examples.llama.relay import relay


@pytest.fixture
def ends(monkeypatch):
    """Records the codes with which `end_now` and `os._exit` are called, in order."""
    found = queue.Queue()

    monkeypatch.setattr(peers, "end_now", lambda *how: found.put(how))
    monkeypatch.setattr(peers.os, "_exit", lambda *how: found.put(how))
    return found


@pytest.fixture
def job(monkeypatch, ends):
    """Returns `job(n)`, which makes a job of n processes."""
    invitation, made = {}, []

    def shared(own):
        return invitation.setdefault("is", own)

    def make(count):
        monkeypatch.setattr(peers, "_shared", shared)
        monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
        for index in range(count):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            made.append(Peers(host="localhost"))
            if index:
                wait_for(made[0], index)
        return made

    yield make
    for process in made:
        process._is_ending = True  # Nothing that comes later ends this process here.
        killed(process)
        for follower in process._followers:
            follower.join()
        for connection in process._connections:
            connection.close()


def wait_for(process, count):
    end = time.monotonic() + 60
    while len(process._connections) < count:
        assert time.monotonic() < end
        time.sleep(0.01)


def killed(process):
    """Closes the sockets of a process, as the kernel does if it is killed."""
    for connection in process._connections:
        with contextlib.suppress(OSError):  # It is closed already.
            connection.shutdown(socket.SHUT_RDWR)


def test_the_end_of_one_ends_all_and_is_named(job, ends):
    _, second, _ = job(3)
    name = second._name
    second._is_ending = True  # Dead, it does not notice.
    killed(second)
    assert name.startswith("process 1 (pid ")
    for message, code in (ends.get(timeout=60), ends.get(timeout=60)):
        assert message.startswith(f"{name} is gone, and no other can go on without it")
        assert code == 68


def test_the_end_of_the_first_ends_all(job, ends):
    first, *_ = job(3)
    first._is_ending = True
    killed(first)
    for message, code in (ends.get(timeout=60), ends.get(timeout=60)):
        assert message.startswith(f"{first._name} is gone")
        assert code == 68


@pytest.mark.parametrize("code", [0, 75, 143])
def test_an_end_to_which_all_come_is_no_alarm(job, ends, monkeypatch, code):
    both = threading.Barrier(2)
    first, second = processes = job(2)
    monkeypatch.setattr(jax.distributed, "shutdown", both.wait)
    leaving = threading.Thread(target=second.leave, args=[code])
    leaving.start()
    first._followers[0].join()  # It has heard that the second one ends.
    first.leave(code)
    leaving.join()
    second._followers[0].join()
    assert ends.empty()
    assert not any(process._failed.is_set() for process in processes)


def test_all_end_with_the_code_of_the_one_that_fails(job, ends, monkeypatch):
    monkeypatch.setattr(peers, "_SECONDS_TO_FINISH", 0)
    _, second, _ = job(3)
    second.leave(74)
    found = sorted(
        [ends.get(timeout=60), ends.get(timeout=60), ends.get(timeout=60)], key=len
    )
    why = f"{second._name} has ended with code 74; it says why"
    assert found == [(74,), (why, 74), (why, 74)]


def test_the_others_learn_the_code_of_the_first(job, ends, monkeypatch):
    monkeypatch.setattr(peers, "_SECONDS_TO_FOLLOW", 60)
    first, second = job(2)
    first._followers.clear()  # It waits for none.
    first.leave(69)
    assert second.code_of_first() == 69
    assert ends.get(timeout=60) == (69,)
    # An error that follows from it is not the process's own.
    second.settle()
    assert ends.get(timeout=60) == (
        f"{first._name} has ended with code 69; it says why",
        69,
    )


def test_they_wait_until_it_says_so(job, ends, monkeypatch):
    monkeypatch.setattr(peers, "_SECONDS_TO_FOLLOW", 0)
    first, second = job(2)
    first._followers.clear()
    later = threading.Timer(0.2, first.leave, (69,))
    later.start()
    assert second.code_of_first() == 69
    later.join()


def test_an_error_of_ones_own_is_ones_own(job, ends, monkeypatch):
    monkeypatch.setattr(peers, "_SECONDS_TO_BLAME", 0)
    for process in job(2):
        process.settle()
    assert ends.empty()


def test_strangers_are_not_taken_for_processes(job, ends):
    first, second = job(2)
    port = second._connections[0].getpeername()[1]
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"token": "x"}\n'):
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(words)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(9) == b""
    assert len(first._connections) == 1


def test_a_first_process_out_of_reach_is_told(monkeypatch, capsys):
    port = free_port()
    monkeypatch.setattr(peers, "_shared", lambda _: [["localhost"], port, "", ""])
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    Peers(host="localhost")
    told = capsys.readouterr().err
    assert f"cannot reach the first one on port {port} of any of localhost" in told


def test_a_relay_waits_for_its_target_and_outlives_it():
    port = free_port()
    host, _, here = relay(f"localhost:{port}").rpartition(":")
    with socket.create_connection((host, int(here))) as client:
        client.sendall(b"question")
        with socket.create_server(("localhost", port)) as server:
            target, _ = server.accept()
        with target:
            assert target.recv(99) == b"question"
            target.sendall(b"answer")
            assert client.recv(99) == b"answer"
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):  # No end of it: that would be b"".
            client.recv(99)


WAIT = """
import sys
from examples.llama import hosts
hosts.join(sys.argv[1])
print("joined", flush=True)
sys.stdin.read()
"""


def test_a_kill_of_the_first_process_is_noticed():
    address = f"localhost:{free_port()}"
    first, second = (
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WAIT, f"{address},2,{index}"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    )
    for process in (first, second):
        assert process.stdout is not None
        while process.stdout.readline() != "joined\n":  # Gloo prints too.
            assert process.poll() is None
    first.kill()
    _, told = second.communicate(timeout=60)
    first.communicate()
    assert second.returncode == 68
    assert told.startswith(f"error: process 0 (pid {first.pid} on ")
