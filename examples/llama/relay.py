"""A connection to JAX's coordinator that stays open if the coordinator ends.

JAX's runtime watches its connection to the first process. When that closes, it aborts
with a trace a millisecond later, which `Peers` would have to outrun. So the connection
goes through this process itself, and JAX keeps its end of it.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

_SECONDS_TO_CONNECT = 300
"""As long as JAX waits for the first process to come up."""


def relay(address: str) -> str:
    """Starts a relay; returns the address to use instead of ``address``, host:port."""
    host, _, port = address.rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))
    in_background(_accept, listener, (host.strip("[]"), int(port)))
    return f"127.0.0.1:{listener.getsockname()[1]}"


def in_background(work: Callable[..., None], *args: Any) -> None:
    """Runs work in a thread until the process ends."""
    threading.Thread(target=work, args=args, daemon=True).start()


def _accept(listener: socket.socket, address: tuple[str, int]) -> None:
    kept = []  # Or they would be closed.
    while True:
        here, _ = listener.accept()
        kept.append(here)
        in_background(_connect, here, address)


def _connect(here: socket.socket, address: tuple[str, int]) -> None:
    end = time.monotonic() + _SECONDS_TO_CONNECT
    while time.monotonic() < end:
        try:
            there = socket.create_connection(address, _SECONDS_TO_CONNECT)
        except OSError:  # It is not there yet.
            time.sleep(0.2)
            continue
        there.settimeout(None)
        in_background(_pass_on, there, here)
        _pass_on(here, there)
        there.close()
        return


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while content := source.recv(2**16):
            target.sendall(content)
