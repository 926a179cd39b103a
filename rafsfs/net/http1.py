"""A lean HTTP/1.1 client for one job: GET bytes into the caller's buffer.

Why our own: bulk bytes through httpx cost 1.8 CPU seconds per GB on the reference machine, recv_into of the caller's
buffer 0.35. Decided here: the pool, requests, framing of bodies, keep-alive. Not here: redirects, authentication,
retries (registry/). Not supported, and refused where it matters: request bodies, HTTP/2, content codings, multipart
ranges, upgrade. Responses are hostile until checked: the head is bounded, lengths are parsed strictly, and no more
than the framed body is ever delivered.

Concurrency: any number of tasks use one pool; a connection belongs to one response at a time. Taking and giving back
a connection have no checkpoint, so the idle lists need no lock. A cancelled or failed response closes its connection.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from ..errors import AccessDeniedError, DeadlineError, RemoteError, UnavailableError
from .http_head import MAX_HEAD, Head, Headers, ProtocolError, parse_head
from .origin import Origin, Target
from .proxy import Proxy, proxy_for
from .wire import Wire, connect

CONNECTIONS_PER_ORIGIN: Final = 32
"""Bound of open connections to one origin; further requests wait for one to come free."""
IDLE_S: Final = 30.0
"""An idle connection older than this is not used again: servers commonly close at 60 s."""
_READ_AHEAD: Final = 8 << 10
"""Bytes asked for while a head is read: what is body among them is copied, so it is kept small."""
_MAX_LINE: Final = 8 << 10
_MAX_TRAILERS: Final = 64
_MAX_INTERIM: Final = 8
_CHUNK_SIZE: Final = re.compile(rb"\A([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\Z")


class Response:
    """One response; its body is read once, in order."""

    def __init__(self, connection: _Connection, head: Head, release: Callable[[Response], None]) -> None:
        self._connection = connection
        self._release: Callable[[Response], None] | None = release
        self.head = head
        self._left: int | None = head.length  # of the body or of the chunk; None: until the connection ends
        self._ended = head.length == 0 or head.status in {204, 304}
        self._spent = False
        if head.chunked:
            self._left = 0
        elif head.length is None:
            self._left = None

    @property
    def status(self) -> int:
        """The status code."""
        return self.head.status

    @property
    def headers(self) -> Headers:
        """The header fields."""
        return self.head.headers

    @property
    def can_reuse(self) -> bool:
        """Whether the connection may carry another request: the body was read to its end and nobody wants it closed."""
        return self._ended and not self._spent and self.head.keep_alive

    async def readinto(self, buffer: memoryview) -> None:
        """Fill `buffer` with the next bytes of the body. Raises UnavailableError if it ends or stalls before."""
        done = 0
        while done < len(buffer):
            got = await self.read_some(buffer[done:])
            if got == 0:
                self._spent = True
                raise UnavailableError(f"the body ended {len(buffer) - done} bytes too soon")
            done += got

    async def read_some(self, buffer: memoryview) -> int:
        """Read some bytes into `buffer`; 0 at the end of the body. Raises UnavailableError, RemoteError (bad framing)."""
        if self._spent:
            raise UnavailableError("the body cannot be read on after a failure")
        if self._ended or not buffer:
            return 0
        self._spent = True  # unless what follows ends well: also a cancellation leaves it so
        got = await self._read(buffer)
        self._spent = False
        return got

    @property
    def can_block(self) -> bool:
        """Whether `readinto_blocking` may be used: the body's length is known and nothing is encrypted."""
        return self._left is not None and not self.head.chunked and self._connection.wire.is_plain

    def readinto_blocking(self, buffer: memoryview) -> None:
        """Do as `readinto`, in a thread, while no task reads; only if `can_block`. Raises UnavailableError, trio.Cancelled."""
        if self._spent:
            raise UnavailableError("the body cannot be read on after a failure")
        self._spent = True
        done = 0
        while done < len(buffer):
            if not self._left:
                raise UnavailableError(f"the body ended {len(buffer) - done} bytes too soon")
            got = self._connection.receive_into_blocking(buffer[done : done + self._left])
            if got == 0:
                raise UnavailableError(f"the connection closed with {self._left} bytes of the body missing")
            self._left -= got
            done += got
        self._ended = self._left == 0
        self._spent = False

    async def read_text(self, limit: int) -> bytes:
        """Return the body, or its first `limit` bytes; also what came before it broke off. For messages of refusals."""
        text = bytearray(limit)
        done = 0
        try:
            while done < limit and (got := await self.read_some(memoryview(text)[done:])):
                done += got
        except RemoteError:
            self._spent = True
        return bytes(text[:done])

    async def finish(self) -> None:
        """Read the end mark of a chunked body that has been read to its last byte, so that its connection is kept."""
        if self.head.chunked and not self._ended and not self._spent and self._left == 0:
            self._spent = True
            await self._next_chunk()
            self._spent = False

    def close(self) -> None:
        """Give the connection back, or close it if the body was not read to its end. Idempotent, does not wait."""
        release, self._release = self._release, None
        self._spent = self._spent or not self._ended
        if release is not None:
            release(self)

    async def _read(self, buffer: memoryview) -> int:
        if self.head.chunked and self._left == 0:
            await self._next_chunk()
            if self._ended:
                return 0
        if self._left is None:
            got = await self._connection.receive_some(buffer)
            self._ended = got == 0
            return got
        got = await self._connection.receive_into(buffer[: min(len(buffer), self._left)])
        if got == 0:
            raise UnavailableError(f"the connection closed with {self._left} bytes of the body missing")
        self._left -= got
        if self._left == 0:
            if not self.head.chunked:
                self._ended = True
            elif await self._connection.read_line():
                raise RemoteError("a chunk of the body is longer than it says")
        return got

    async def _next_chunk(self) -> None:
        line = await self._connection.read_line()
        match = _CHUNK_SIZE.match(line)
        if match is None:
            raise RemoteError(f"the body's chunk size {line[:20]!r} is not hexadecimal")
        self._left = int(match[1], 16)
        if self._left == 0:
            for _ in range(_MAX_TRAILERS):
                if not await self._connection.read_line():
                    self._ended = True
                    return
            raise RemoteError(f"the body has more than {_MAX_TRAILERS} trailer lines")


class _Connection:
    """A wire with what was received ahead of need."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._ahead = bytearray()
        self.idle_since = 0.0
        self.answered = False
        """Whether the request under way has got a first byte back."""

    async def ask(self, request: bytes) -> Head:
        """Send a request and return the head of its final answer. Raises UnavailableError, RemoteError."""
        self.answered = False
        await self.wire.send(request)
        for _ in range(_MAX_INTERIM):
            head = await self._read_head()
            if head.status >= 200:
                return head
        raise RemoteError(f"more than {_MAX_INTERIM} interim answers to one request")

    async def receive_into(self, buffer: memoryview) -> int:
        """Read into `buffer`, whose every byte belongs to the body."""
        return self._take(buffer) if self._ahead else await self.wire.receive_into(buffer)

    def receive_into_blocking(self, buffer: memoryview) -> int:
        """Do as `receive_into`, in a thread."""
        return self._take(buffer) if self._ahead else self.wire.receive_into_blocking(buffer)

    async def receive_some(self, buffer: memoryview) -> int:
        """Read what there is of a body that ends with the connection."""
        if self._ahead:
            return self._take(buffer)
        data = await self.wire.receive(min(len(buffer), 64 << 10))
        buffer[: len(data)] = data
        return len(data)

    async def read_line(self) -> bytes:
        """Return the next line of chunk framing without its end."""
        end = await self._fill_until(b"\r\n", _MAX_LINE)
        line = bytes(self._ahead[:end])
        del self._ahead[: end + 2]
        return line

    async def _read_head(self) -> Head:
        end = await self._fill_until(b"\r\n\r\n", MAX_HEAD)
        try:
            head = parse_head(self._ahead[:end])
        except ProtocolError as error:
            raise RemoteError(str(error)) from None
        del self._ahead[: end + 4]
        return head

    async def _fill_until(self, mark: bytes, limit: int) -> int:
        """Receive until `mark` is there; return where. Raises RemoteError past `limit` bytes."""
        searched = 0
        while (at := self._ahead.find(mark, searched)) < 0:
            if len(self._ahead) > limit:
                raise RemoteError(f"the answer has a head or line of more than {limit} bytes: {self._ahead[:20]!r}...")
            searched = max(0, len(self._ahead) - len(mark) + 1)
            data = await self.wire.receive(_READ_AHEAD)
            if not data:
                if self._ahead and not self._ahead.startswith(b"HTTP/"[: len(self._ahead)]) and limit == MAX_HEAD:
                    raise RemoteError(f"the answer does not begin like HTTP/1.1: {bytes(self._ahead[:40])!r}")
                raise UnavailableError("the connection closed before the answer was complete")
            self.answered = True
            self._ahead += data
        return at

    def _take(self, buffer: memoryview) -> int:
        taken = min(len(self._ahead), len(buffer))
        buffer[:taken] = self._ahead[:taken]
        del self._ahead[:taken]
        return taken

    def is_fit(self) -> bool:
        """Tell whether an idle connection may be used again."""
        fresh = trio.current_time() - self.idle_since < IDLE_S
        return fresh and not self._ahead and self.wire.is_quiet()

    def close(self) -> None:
        self.wire.close()


@dataclass(slots=True)
class _Lane:
    """What the pool has for one origin."""

    slots: trio.Semaphore
    idle: list[_Connection] = field(default_factory=list)


class HttpPool:
    """Keep-alive connections for GETs, to any number of origins. `ssl_context` is used for https."""

    def __init__(
        self,
        *,
        ssl_context: ssl.SSLContext,
        timeout_s: float,
        connections: int = CONNECTIONS_PER_ORIGIN,
        use_proxies: bool = True,
        user_agent: str = "rafs",
    ) -> None:
        self._ssl_context = ssl_context
        self._timeout_s = timeout_s
        self._connections = connections
        self._use_proxies = use_proxies
        self._user_agent = user_agent
        self._lanes: dict[Origin, _Lane] = {}
        self._closed = False

    async def open(self, target: Target, headers: Mapping[str, str]) -> Response:
        """Send a GET and return its response, which the caller must close.

        Raises UnavailableError (not reached, silent, cut off), DeadlineError (all connections stayed busy), RemoteError
        (what came is no HTTP we accept, or TLS is not right).
        """
        lane = self._lane(target.origin)
        await self._take_slot(lane, target.origin)
        try:
            connection, head = await self._exchange(lane, target, headers)
        except BaseException:
            lane.slots.release()
            raise
        return Response(connection, head, lambda response: self._give_back(lane, connection, response))

    @asynccontextmanager
    async def get(self, target: Target, headers: Mapping[str, str]) -> AsyncIterator[Response]:
        """Like `open`; the response is closed at the end of the block."""
        response = await self.open(target, headers)
        try:
            yield response
        finally:
            response.close()

    def close(self) -> None:
        """Close idle connections; those in use are closed when their response ends."""
        self._closed = True
        for lane in self._lanes.values():
            for connection in lane.idle:
                connection.close()
            lane.idle.clear()

    def _lane(self, origin: Origin) -> _Lane:
        lane = self._lanes.get(origin)
        if lane is None:
            lane = self._lanes[origin] = _Lane(trio.Semaphore(self._connections))
        return lane

    async def _take_slot(self, lane: _Lane, origin: Origin) -> None:
        with trio.move_on_after(self._timeout_s):
            await lane.slots.acquire()
            return
        raise DeadlineError(
            f"none of {self._connections} connections to {origin.netloc} came free in {self._timeout_s:g} s"
        )

    def _give_back(self, lane: _Lane, connection: _Connection, response: Response) -> None:
        lane.slots.release()
        if response.can_reuse and not self._closed:
            connection.idle_since = trio.current_time()
            lane.idle.append(connection)
        else:
            connection.close()

    async def _exchange(self, lane: _Lane, target: Target, headers: Mapping[str, str]) -> tuple[_Connection, Head]:
        proxy = proxy_for(target.origin) if self._use_proxies else None
        request = self._render(target, headers, proxy)
        while lane.idle:
            connection = lane.idle.pop()
            if not connection.is_fit():
                connection.close()
                continue
            try:
                return connection, await _ask(connection, request)
            except UnavailableError:
                # The server may close a kept connection just as the request is on its way. That says nothing of the
                # server, so the next connection is tried; but an answer that broke off in its middle does.
                if connection.answered:
                    raise
        connection = await self._connect(target.origin, proxy)
        return connection, await _ask(connection, request)

    async def _connect(self, origin: Origin, proxy: Proxy | None) -> _Connection:
        wire = await connect(origin, proxy, self._timeout_s)
        try:
            if origin.is_tls:
                if proxy is not None:
                    await _open_tunnel(wire, origin, proxy)
                await wire.start_tls(self._ssl_context, origin.host)
        except BaseException:
            wire.close()
            raise
        return _Connection(wire)

    def _render(self, target: Target, headers: Mapping[str, str], proxy: Proxy | None) -> bytes:
        through = proxy is not None and not target.origin.is_tls
        lines = [
            f"GET {target.url if through else target.path} HTTP/1.1",
            f"Host: {target.origin.netloc}",
            f"User-Agent: {self._user_agent}",
            "Accept-Encoding: identity",
        ]
        if through and proxy is not None and proxy.authorization is not None:
            lines.append(f"Proxy-Authorization: {proxy.authorization}")
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if any("\r" in line or "\n" in line for line in lines):
            raise ValueError("a request line or header holds a line end")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def _ask(connection: _Connection, request: bytes) -> Head:
    try:
        return await connection.ask(request)
    except BaseException:
        connection.close()
        raise


async def _open_tunnel(wire: Wire, origin: Origin, proxy: Proxy) -> None:
    """Have the proxy connect us through to the origin (CONNECT, RFC 9110 §9.3.6)."""
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    lines = [f"CONNECT {host}:{origin.port} HTTP/1.1", f"Host: {host}:{origin.port}"]
    if proxy.authorization is not None:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    head = await _Connection(wire).ask(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
    if head.status == 407:
        raise AccessDeniedError(f"proxy {proxy} wants other credentials; put them into the proxy variable's URL")
    if not 200 <= head.status < 300:
        raise UnavailableError(f"proxy {proxy} answered {head.status} to a connection to {origin.netloc}")
