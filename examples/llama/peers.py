"""Notices if a process of a job ends: each is connected to the first one.

The kernel closes the connections of a process that dies, however it dies, and answers
for one that is merely slow. So an end is noticed at once, and a compilation that takes
all cores is no false alarm. A machine that is cut off or without power is noticed when
it has not answered the kernel's own probes for half a minute.

JAX's runtime notices too, but all that it does is to abort with a trace.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import uuid
from typing import Any, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.llama.ending import Code, end_now
from examples.llama.relay import in_background

_FINE = (Code.DONE, Code.TIME_IS_UP, Code.DIVERGED, Code.TERMINATED)
"""Codes of ends to which every process comes by itself.

They need not come at the same time: the first one still has its report to write.
"""
_PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
_SECONDS_TO_CONNECT = 10
_SECONDS_TO_BLAME = 3
"""From the failure of a computation until it is known that a process is gone."""
_SECONDS_TO_FOLLOW = 5
"""For the others, once the first one has failed: they have nothing to finish."""
_SECONDS_TO_FINISH = 120
"""For the first one, which may have a checkpoint on its way."""


class Peers:
    """The first process's connections to all others, or another's to the first.

    It must be made on all processes of a job at the same time.

    Args:
      host: Of the first process; empty where that is not known.
    """

    def __init__(self, host: str):
        index = jax.process_index()
        self._name = f"process {index} (pid {os.getpid()} on {socket.gethostname()})"
        self._is_first = index == 0
        self._connections: list[socket.socket] = []
        self._followers: list[threading.Thread] = []
        self._is_connected = threading.Event()  # Or it cannot be.
        self._is_ending = False
        self._failed = threading.Event()  # Another process, as it has said:
        self._failure = ("", int(Code.UNFORESEEN))
        if self._is_first:
            token, listener = uuid.uuid4().hex, _listener()
            hosts = [host] if host else _own_addresses()
            _shared([hosts, listener.getsockname()[1], token, self._name])
            in_background(self._accept, listener, token)
        else:
            in_background(self._connect, *_shared(None))
            self._is_connected.wait()

    def settle(self) -> None:
        """Before an error is taken for this process's own: is another's behind it?

        Then end. Computations with a process that is gone may fail instead of waiting.
        """
        if self._failed.wait(_SECONDS_TO_BLAME):
            self._end_all(*self._failure)

    def code_of_first(self) -> int:
        """Returns the code with which the first process, which has failed, ends.

        It may have a checkpoint to finish before it says so. A process that ended
        before it would be taken for the cause.
        """
        if self._connections:
            self._failed.wait(_SECONDS_TO_FINISH)
        return self._failure[1]

    def leave(self, code: int) -> None:
        """Tells the others that this process ends with ``code``, and disconnects.

        Returns only after an end to which all come; else nobody can be waited for.
        """
        self._is_ending = code not in _FINE  # Or it may still wait for others.
        for connection in self._connections:
            _send(connection, {"ended": code})
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        if code in _FINE:
            jax.distributed.shutdown()
            for connection in self._connections:
                connection.close()
            return
        if self._is_first:  # JAX may abort others that are there for longer.
            for follower in self._followers:
                follower.join(_SECONDS_TO_FOLLOW + 1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _accept(self, listener: socket.socket, token: str) -> None:
        while True:
            connection, _ = listener.accept()
            in_background(self._greet, connection, token)

    def _greet(self, connection: socket.socket, token: str) -> None:
        with connection.makefile() as lines:
            try:
                hello = json.loads(lines.readline())
                known = hello["token"] == token
            except (OSError, ValueError, TypeError, KeyError):
                known = False
            if known:
                _send(connection, {"token": token})
                self._follow(connection, lines, hello["name"])
            else:  # Some other program.
                connection.close()

    def _connect(self, hosts: list[str], port: int, token: str, name: str) -> None:
        for host in hosts:
            with (
                contextlib.suppress(OSError, ValueError),
                contextlib.ExitStack() as to_close,
            ):
                address = (host, port)
                first = socket.create_connection(address, _SECONDS_TO_CONNECT)
                to_close.enter_context(first)
                lines = to_close.enter_context(first.makefile())
                _send(first, {"token": token, "name": self._name})
                if json.loads(lines.readline()) == {"token": token}:
                    to_close.pop_all()
                    first.settimeout(None)
                    self._follow(first, lines, name)
                    return
        print(
            f"{self._name} cannot reach the first one on port {port} of any of "
            f"{', '.join(hosts)}: when a process dies, JAX aborts it after a minute",
            file=sys.stderr,
        )
        self._is_connected.set()

    def _follow(self, connection: socket.socket, lines: TextIO, name: str) -> None:
        """Waits until the other process, called ``name``, ends."""
        _probe(connection)
        # In this order: whoever sees the connection finds its follower.
        self._followers.append(threading.current_thread())
        self._connections.append(connection)
        self._is_connected.set()
        has_ended = False
        with contextlib.suppress(OSError, ValueError):  # As when it ends.
            for message in map(json.loads, lines):
                if "end" in message:
                    self._end_all(message["end"], message["code"])
                else:
                    has_ended = True
                    self._hear(name, message["ended"])
        if not has_ended:
            self._end_all(
                f"{name} is gone, and no other can go on without it. Run the same "
                "command again.",
                Code.PEER_GONE,
            )

    def _hear(self, name: str, code: int) -> None:
        if code not in _FINE:
            self._failure = (f"{name} has ended with code {code}; it says why", code)
            self._failed.set()
            seconds = _SECONDS_TO_FINISH if self._is_first else _SECONDS_TO_FOLLOW
            timer = threading.Timer(seconds, self._end_all, self._failure)
            timer.daemon = True
            timer.start()

    def _end_all(self, why: str, code: int) -> None:
        if self._is_ending:
            return  # For another reason, which is told.
        self._is_ending = True
        for connection in self._connections:
            _send(connection, {"end": why, "code": code})
        end_now(why, code)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # It is gone; whoever reads there knows.
        connection.sendall(json.dumps(message).encode() + b"\n")


def _shared(value: Any) -> Any:
    """Returns the first process's value on all processes."""
    text = json.dumps(value).encode()
    size = np.int32(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    content = np.frombuffer(text.ljust(size)[:size], np.uint8)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(content)))


def _listener() -> socket.socket:
    """Listens on a free port of all addresses."""
    if socket.has_dualstack_ipv6():
        family = socket.AF_INET6
        return socket.create_server(("", 0), family=family, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _own_addresses() -> list[str]:
    """Returns addresses by which others may know this machine."""
    name = socket.gethostname()
    found = [name]
    with contextlib.suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(name, None)]
    return list(dict.fromkeys(found))


def _probe(connection: socket.socket) -> None:
    """Lets the kernel probe whether the other machine answers while nothing is sent."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES.items():
        if hasattr(socket, name):  # Not everywhere; there the kernel's own values hold.
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
