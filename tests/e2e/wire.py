"""A TCP relay in front of a registry: counts what passes each way, holds it to a rate, cuts it on demand.

Rule: bytes are passed on unchanged, so that what is proved through it is proved of the real registry behind it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Final

_STEP: Final = 64 * 1024


class Wire:
    """A running relay. `to_server` and `to_client` count bytes, `port` is where clients connect."""

    def __init__(self, target_port: int, *, bytes_per_s: float | None = None) -> None:
        self.target_port = target_port
        self.bytes_per_s = bytes_per_s
        self.to_server = 0
        self.to_client = 0
        self._lock = threading.Lock()
        self._due = time.monotonic()
        self._closing = False
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target_port))
            except OSError:
                client.close()
                continue
            with self._lock:
                self._sockets += [client, server]
            for one in (client, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._start(self._pass, client, server, True)
            self._start(self._pass, server, client, False)

    def _pass(self, source: socket.socket, target: socket.socket, to_server: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_STEP):
                self._pace(len(data))
                target.sendall(data)
                with self._lock:
                    if to_server:
                        self.to_server += len(data)
                    else:
                        self.to_client += len(data)
            target.shutdown(socket.SHUT_WR)
            return
        # One side is gone: so is the other.
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _pace(self, size: int) -> None:
        """Wait until `size` more bytes may pass, both ways and all connections together."""
        if self.bytes_per_s is None:
            return
        with self._lock:
            now = time.monotonic()
            self._due = max(self._due, now - 0.05) + size / self.bytes_per_s
            wait = self._due - now
        if wait > 0:
            time.sleep(wait)

    def cut(self) -> None:
        """Break every connection; new ones are taken."""
        with self._lock:
            broken = list(self._sockets)
        for one in broken:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop listening, break every connection, wait for the threads."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(5)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)
        for one in self._sockets:
            one.close()


@contextlib.contextmanager
def wire_to(port: int, *, bytes_per_s: float | None = None) -> Iterator[Wire]:
    """Run a relay to a loopback port."""
    wire = Wire(port, bytes_per_s=bytes_per_s)
    try:
        yield wire
    finally:
        wire.close()
