"""A client's end of the daemon socket: many calls at once over one stream.

Concurrency: `Connection` belongs to one trio run. One reader task (owned by the nursery given to `open_connection`) hands replies
to the callers; writes are serialised by a lock. When the stream breaks, every call in flight gets a DaemonError and
`closed` is set. A cancelled call leaves its request with the daemon; the reply is dropped.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from .. import __version__
from ..errors import DaemonError, FormatError
from .protocol import VERSION, Event, FrameReader, Hello, Message, Reply, Request, encode, raise_error

ProgressCallback = Callable[[dict[str, Any]], None]


def socket_path(cache_dir: str) -> str:
    """Return the path of the control socket of a cache directory."""
    return os.path.join(os.path.abspath(cache_dir), "daemon.sock")


async def open_socket(cache_dir: str) -> trio.SocketStream:
    """Connect to a daemon's socket. Raises DaemonError if nobody listens.

    A path of a UNIX socket holds 107 bytes; a longer one is reached through a descriptor of its directory.
    """
    path = socket_path(cache_dir)
    stream = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    directory = -1
    try:
        if len(os.fsencode(path)) > 100:
            directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            path = f"/proc/self/fd/{directory}/{os.path.basename(path)}"
        await stream.connect(path)
    except OSError as error:
        stream.close()
        raise DaemonError(f"no daemon answers for cache directory {cache_dir}: {error.strerror}") from error
    finally:
        if directory >= 0:
            os.close(directory)
    return trio.SocketStream(stream)


class Connection:
    """An open connection. Made by `open_connection`."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._write_lock = trio.Lock()
        self._calls: dict[int, _Call] = {}
        self._next = 0
        self.closed = trio.Event()
        self.server = Hello(0, "")

    async def hello(self, mount: str = "", pid: int = 0) -> None:
        """Exchange greetings. Raises DaemonError if the versions do not fit."""
        try:
            await self._stream.send_all(encode(Hello(VERSION, f"rafs {__version__}", mount, pid)))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise DaemonError("the daemon closed the connection") from error

    async def call(
        self, method: str, params: dict[str, Any], progress: ProgressCallback | None = None
    ) -> dict[str, Any]:
        """Call a method and return its result. Raises the daemon's error, DaemonError if the connection breaks."""
        if self.closed.is_set():
            raise DaemonError("the daemon went away")
        self._next += 1
        call = _Call(trio.Event(), progress)
        self._calls[self._next] = call
        number = self._next
        try:
            await self._send(Request(number, method, params))
            await call.done.wait()
        finally:
            self._calls.pop(number, None)
        if call.reply is None:
            raise DaemonError("the daemon went away before it answered")
        if call.reply.error:
            raise_error(call.reply)
        return call.reply.result or {}

    async def _send(self, message: Message) -> None:
        async with self._write_lock:
            try:
                await self._stream.send_all(encode(message))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self._fail()
                raise DaemonError("the daemon went away") from error

    async def read(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hand out what arrives until the stream ends; started by `open_connection`."""
        reader = FrameReader()
        greeted = False
        try:
            while data := await self._stream.receive_some(65536):
                for message in reader.feed(data):
                    if isinstance(message, Hello):
                        self.server = message
                        greeted = True
                        task_status.started()
                    else:
                        self._deliver(message)
        except (trio.BrokenResourceError, trio.ClosedResourceError, FormatError):
            pass
        finally:
            self._fail()
        if not greeted:
            task_status.started()

    def _deliver(self, message: Message) -> None:
        if isinstance(message, Hello | Request):
            return
        call = self._calls.get(message.id)
        if call is None:
            return
        if isinstance(message, Event):
            if call.progress:
                call.progress(message.data)
        else:
            call.reply = message
            call.done.set()

    def _fail(self) -> None:
        self.closed.set()
        for call in self._calls.values():
            call.done.set()

    async def aclose(self) -> None:
        """Close the stream."""
        self._fail()
        await self._stream.aclose()


class _Call:
    """One call in flight."""

    def __init__(self, done: trio.Event, progress: ProgressCallback | None) -> None:
        self.done = done
        self.progress = progress
        self.reply: Reply | None = None


@asynccontextmanager
async def open_connection(cache_dir: str, *, mount: str = "") -> AsyncIterator[Connection]:
    """Connect to the daemon of a cache directory. Raises DaemonError if none answers or it speaks another version."""
    stream = await open_socket(cache_dir)
    connection = Connection(stream)
    async with trio.open_nursery() as nursery:
        try:
            with trio.move_on_after(10):
                await connection.hello(mount, os.getpid() if mount else 0)
                await nursery.start(connection.read)
            if connection.server.version != VERSION:
                raise DaemonError(
                    f"the daemon of {cache_dir} speaks protocol {connection.server.version or 'nothing known'}, this program "
                    f"{VERSION}; stop it with `rafs daemon --stop` and try again"
                )
            yield connection
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await connection.aclose()
