"""A small HTTP/1.1 server over trio and h11: GET unless told otherwise, bodies of bytes, of a range of a file (sendfile), or streamed.

Decided here: limits of what a client may do (size of a head, time to send one, connections), keep-alive, and that a file's bytes go from
the page cache to the socket without passing through Python; what is not in the page cache is read ahead in a thread, since a sendfile
that waits for a disk holds up every task. Why our own: ASGI servers cost three times the CPU and send no ranges of files.

Concurrency: one task per connection, owned by the nursery of `serve`. A cancelled or failed answer closes its connection.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import h11
import trio

_log = logging.getLogger(__name__)

_HEAD_S: Final = 30.0
"""How long a client may take for a request, idle time of a kept connection included."""
_SEND_S: Final = 30.0
"""How long a client may take none of an answer."""
_MOST_HEAD: Final = 8 << 10
_MOST_BODY: Final = 64 << 10
_PIECE: Final = 1 << 20
CONNECTIONS: Final = 256
PER_HOST: Final = 128
"""Of these, those of one other machine: it cannot keep everybody else out."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request. `path` as sent, before any `?`."""

    path: str
    headers: Mapping[str, str]
    peer: str
    """Address of the client; empty on a UNIX socket."""
    method: str = "GET"
    body: bytes = b""
    """Empty where the server takes GET alone."""
    query: str = ""
    """What stands behind `?`, as sent."""


@dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes of an open file. The descriptor must stay open until `released` is called."""

    fd: int
    offset: int
    length: int
    released: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class FileParts:
    """Bytes of an open file that are sent as they come to be there: `parts` gives (offset, length) of what can be sent, `length` bytes in
    all; if it ends before, the connection is cut. The descriptor must stay open until `released` is called.
    """

    fd: int
    length: int
    parts: AsyncGenerator[tuple[int, int]]
    released: Callable[[], None] = lambda: None


Body = bytes | FileRange | FileParts | AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a handler returns."""

    status: int
    body: Body = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None
    """Of a streamed body, if it is known; of the answer to a HEAD."""


Handler = Callable[[Request], Awaitable[Answer]]
Pace = Callable[[int], Awaitable[None]]
"""Called with a number of bytes before they are sent; returns when they may be."""


async def no_pace(count: int) -> None:
    """Send at once."""


class HttpServer:
    """Serves connections with one handler."""

    def __init__(
        self,
        handler: Handler,
        *,
        pace: Pace = no_pace,
        ssl_context: ssl.SSLContext | None = None,
        methods: frozenset[str] = frozenset({"GET"}),
    ) -> None:
        self._handler = handler
        self._methods = methods
        self._pace = pace
        self._ssl = ssl_context
        self._connections = 0
        self._by_host: Counter[str] = Counter()

    async def serve(
        self, host: str, port: int, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen and serve for ever; `task_status` gets the port."""
        listeners = await trio.open_tcp_listeners(port, host=host or None, backlog=512)
        bound: int = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, self._connection, listeners)
            task_status.started(bound)

    async def serve_unix(
        self, path: str, *, mode: int = 0o600, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen on a UNIX socket and serve for ever; one that was left over is replaced. Who may connect is the directory's matter."""
        with suppress(FileNotFoundError):
            os.unlink(path)
        listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The path of a socket holds 107 bytes; through a descriptor of its directory it may be longer.
        directory = os.open(os.path.dirname(os.path.abspath(path)), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            await listener.bind(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
            os.chmod(os.path.basename(path), mode, dir_fd=directory)
        finally:
            os.close(directory)
        listener.listen(64)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, self._connection, [trio.SocketListener(listener)])
            task_status.started()

    async def _connection(self, stream: trio.SocketStream) -> None:
        host = _host_of(stream)
        if self._connections >= CONNECTIONS or (host and self._by_host[host] >= PER_HOST):
            await trio.aclose_forcefully(stream)
            return
        self._connections += 1
        self._by_host[host] += 1
        try:
            if stream.socket.family != socket.AF_UNIX:
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire: trio.abc.Stream = stream
            if self._ssl is not None:
                wire = trio.SSLStream(stream, self._ssl, server_side=True, https_compatible=True)
            await _Connection(wire, stream, self._ssl is None, self._handler, self._pace, self._methods).run()
        except trio.TooSlowError:
            # Of `_SEND_S`: not an OSError, and it must end this connection alone.
            _log.debug("connection ended: the client took nothing for %g s", _SEND_S)
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError, OSError, ssl.SSLError) as error:
            _log.debug("connection ended: %s", error)
        finally:
            self._connections -= 1
            self._by_host[host] -= 1
            if not self._by_host[host]:
                del self._by_host[host]
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)


def _host_of(stream: trio.SocketStream) -> str:
    """Return the address of the other machine, empty if it is this one by a UNIX socket or gone."""
    try:
        return "" if stream.socket.family == socket.AF_UNIX else str(stream.socket.getpeername()[0])
    except OSError:
        return ""


class _Connection:
    """One connection."""

    def __init__(
        self,
        wire: trio.abc.Stream,
        stream: trio.SocketStream,
        is_plain: bool,
        handler: Handler,
        pace: Pace,
        methods: frozenset[str],
    ) -> None:
        self._wire = wire
        self._stream = stream
        self._is_plain = is_plain
        self._handler = handler
        self._pace = pace
        self._methods = methods
        self._is_head = False
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=_MOST_HEAD)

    async def run(self) -> None:
        """Answer requests until the connection ends."""
        is_local = self._stream.socket.family == socket.AF_UNIX
        peer = "" if is_local else str(self._stream.socket.getpeername()[0])
        while True:
            with trio.move_on_after(_HEAD_S) as scope:
                event = await self._next()
            if scope.cancelled_caught or not isinstance(event, h11.Request):
                return
            headers: dict[str, str] = {}
            for name, value in event.headers:  # a field that comes more than once is a list (RFC 9110, 5.3)
                key, text = name.decode("latin-1"), value.decode("latin-1")
                headers[key] = f"{headers[key]}, {text}" if key in headers else text
            path, _, query = event.target.decode("latin-1").partition("?")
            method = event.method.decode("latin-1")
            self._is_head = method == "HEAD"
            body = bytearray()
            with trio.move_on_after(_HEAD_S) as scope:
                while not isinstance(part := await self._next(), h11.EndOfMessage | h11.ConnectionClosed):
                    if isinstance(part, h11.Data) and method != "GET":  # a body of a GET is read and dropped
                        body += part.data
                    if len(body) > _MOST_BODY:
                        await self._send(Answer(413, b"the body is too long\n"))
                        return
            if scope.cancelled_caught:
                return
            if method not in self._methods:
                await self._send(Answer(405, f"only {', '.join(sorted(self._methods))}\n".encode()))
            else:
                await self._send(await self._handler(Request(path, headers, peer, method, bytes(body), query)))
            if self._h11.our_state is not h11.DONE or self._h11.their_state is not h11.DONE:
                return
            self._h11.start_next_cycle()

    async def _next(self) -> object:
        while True:
            event = self._h11.next_event()
            if event is h11.NEED_DATA:
                self._h11.receive_data(bytes(await self._wire.receive_some(16 << 10)))
                continue
            return event

    async def _send(self, answer: Answer) -> None:
        body, given = answer.body, answer.body
        headers = [(name.encode(), value.encode()) for name, value in answer.headers.items()]
        try:
            length = (
                len(body)
                if isinstance(body, bytes)
                else body.length
                if isinstance(body, FileRange | FileParts)
                else answer.length
            )
            if self._is_head:
                length = answer.length if answer.length is not None else length
                body = b""
            if length is not None:
                headers.append((b"Content-Length", b"%d" % length))
            else:
                headers.append((b"Transfer-Encoding", b"chunked"))
            await self._write(self._h11.send(h11.Response(status_code=answer.status, headers=headers)) or b"")
            if isinstance(body, bytes):
                await self._write(self._h11.send(h11.Data(data=body)) or b"" if body else b"")
            elif isinstance(body, FileRange):
                # h11 counts the bytes; they go past it.
                self._h11.send_with_data_passthrough(h11.Data(data=_Length(body.length)))  # type: ignore[arg-type]
                await self._send_file(body.fd, body.offset, body.length)
            elif isinstance(body, FileParts):
                self._h11.send_with_data_passthrough(h11.Data(data=_Length(body.length)))  # type: ignore[arg-type]
                left = body.length
                async for offset, length in body.parts:
                    await self._send_file(body.fd, offset, length)
                    left -= length
                if left:
                    raise OSError("what was promised did not come")
            else:
                async for part in body:
                    await self._write(self._h11.send(h11.Data(data=part)) or b"")
            await self._write(self._h11.send(h11.EndOfMessage()) or b"")
        finally:
            if isinstance(given, FileRange):
                given.released()
            elif isinstance(given, FileParts):
                with trio.CancelScope(shield=True):
                    await given.parts.aclose()
                given.released()
            elif isinstance(given, AsyncGenerator):
                # Not left to the garbage collector: what it holds (a subscriber of news) would go on growing.
                with trio.CancelScope(shield=True):
                    await given.aclose()

    async def _write(self, data: bytes) -> None:
        if data:
            with trio.fail_after(_SEND_S):
                await self._wire.send_all(data)

    async def _send_file(self, fd: int, offset: int, left: int) -> None:
        sock = self._stream.socket
        while left:
            piece = min(left, _PIECE)
            await self._pace(piece)
            if not is_cached(fd, offset, piece):
                await trio.to_thread.run_sync(_read_ahead, fd, offset, piece)
            if not self._is_plain:
                data = await trio.to_thread.run_sync(os.pread, fd, piece, offset)
                if not data:
                    raise OSError("the file ends before its range")
                await self._write(data)
                offset, left = offset + len(data), left - len(data)
                continue
            done = 0
            # One scope for the piece, its deadline moved on: a scope for each wait was a third of what sending costs.
            with trio.CancelScope() as scope:
                while done < piece:
                    try:
                        sent = os.sendfile(sock.fileno(), fd, offset + done, piece - done)
                    except BlockingIOError:
                        scope.deadline = trio.current_time() + _SEND_S
                        await trio.lowlevel.wait_writable(sock)
                        continue
                    if not sent:
                        raise OSError("the file ends before its range")
                    done += sent
            if scope.cancelled_caught:
                raise trio.TooSlowError
            offset, left = offset + piece, left - piece
            await trio.lowlevel.checkpoint()


class _Length:
    """What h11 asks of a body that it does not see: its length."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


def is_cached(fd: int, offset: int, length: int) -> bool:
    """Tell whether both ends of a range of a file are in the page cache: a guess at all of it."""
    probe = bytearray(1)
    for position in (offset, offset + length - 1):
        try:
            if not os.preadv(fd, [probe], position, os.RWF_NOWAIT):
                return True  # past the end: no disk to wait for
        except BlockingIOError:
            return False
        except OSError:
            return True  # a file system that cannot tell
    return True


def _read_ahead(fd: int, offset: int, length: int) -> None:
    with suppress(OSError):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)
        for position in range(offset, offset + length, 128 << 10):
            os.pread(fd, 1, position)
