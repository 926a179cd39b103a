"""A lean HTTP/1.1 client for one job: GET a range of bytes into the caller's buffer.

Why our own: bulk bytes through httpx cost 1.8 CPU seconds per GB on the reference machine, recv_into of the caller's buffer
0.35 (docs/decisions/0006-own-http-body-path.md). Decided here: connections, response heads, body framing, keep-alive. Not here:
redirects, authentication, retries (registry/). Responses are hostile until checked: the head is bounded, lengths are parsed
strictly, and no more than the framed body is ever delivered.

Concurrency: the pool is used by any number of tasks; a connection belongs to one response at a time. Taking and giving back a
connection have no checkpoint, so the idle lists need no lock. A cancelled or failed response closes its connection.
"""

from __future__ import annotations

import socket as stdlib_socket
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import trio

from ..errors import RemoteError, UnavailableError

_HEAD_LIMIT: Final = 64 << 10
_IDLE_LIMIT: Final = 16
"""Idle connections kept per origin."""
_LOW_WATER: Final = 256 << 10
"""SO_RCVLOWAT while a body is read: fewer wake-ups, 2.3 to 3.2 GB/s on loopback."""

Origin = tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class Target:
    """Where a URL points: scheme, host, port and the path with its query."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str) -> Target:
        """Split an http or https URL. Raises RemoteError for anything else."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError as error:
            raise RemoteError(f"URL {display_url(url)} has a bad port") from error
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise RemoteError(f"URL {display_url(url)} is not http or https")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if any(character in path + parts.hostname for character in "\r\n "):
            raise RemoteError(f"URL {display_url(url)} holds blanks or line ends")
        return cls(parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80), path)

    @property
    def origin(self) -> Origin:
        """What a connection is made to, and credentials are bound to."""
        return self.scheme, self.host, self.port


def display_url(url: str) -> str:
    """Return a URL without its query, which may hold a signature, for messages."""
    return url.split("?", 1)[0][:200]


class Response:
    """One response whose body is read into the caller's buffers."""

    def __init__(self, connection: _Connection, status: int, headers: Mapping[str, str], timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self.status = status
        self.headers = headers
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        self._left = 0
        self._ended = False
        if not self._chunked:
            self._left = _content_length(headers)
            self._ended = self._left == 0
        self.reusable = headers.get("connection", "").lower() != "close"

    @property
    def ended(self) -> bool:
        """Whether the whole body has been read."""
        return self._ended

    async def readinto(self, buffer: memoryview) -> None:
        """Fill `buffer` with the next bytes of the body. Raises UnavailableError if the body ends or stalls before."""
        done = 0
        while done < len(buffer):
            got = await self.read_some(buffer[done:])
            if not got:
                raise UnavailableError(f"the body ended after {done} of {len(buffer)} bytes")
            done += got

    async def read_some(self, buffer: memoryview) -> int:
        """Read some bytes into `buffer`; 0 at the end of the body."""
        if self._chunked and not self._left and not self._ended:
            await self._next_chunk()
        if self._ended or not buffer:
            return 0
        want = min(len(buffer), self._left)
        got = await self._connection.recv_into(buffer[:want], self._timeout_s)
        if not got:
            raise UnavailableError(f"the connection closed with {self._left} bytes of the body missing")
        self._left -= got
        if not self._left:
            if self._chunked:
                await self._connection.read_line(self._timeout_s)
            else:
                self._ended = True
        return got

    async def _next_chunk(self) -> None:
        line = (await self._connection.read_line(self._timeout_s)).split(b";", 1)[0].strip()
        try:
            self._left = int(line, 16)
        except ValueError as error:
            raise RemoteError(f"chunk size {line[:20]!r} is not hexadecimal") from error
        if self._left < 0:
            raise RemoteError("negative chunk size")
        if not self._left:
            while await self._connection.read_line(self._timeout_s):
                pass
            self._ended = True


class _Connection:
    """One TCP or TLS connection with what was received ahead of need."""

    def __init__(self, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]) -> None:
        self._stream = stream
        self._ahead = bytearray()
        self._low_water = 1

    async def send(self, data: bytes, timeout_s: float) -> None:
        try:
            with trio.fail_after(timeout_s):
                await self._stream.send_all(data)
        except trio.TooSlowError as error:
            raise UnavailableError(f"sending a request took over {timeout_s:g} s") from error
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise UnavailableError("the connection broke while a request was sent") from error

    async def recv_into(self, buffer: memoryview, timeout_s: float) -> int:
        if self._ahead:
            taken = min(len(self._ahead), len(buffer))
            buffer[:taken] = self._ahead[:taken]
            del self._ahead[:taken]
            return taken
        try:
            with trio.fail_after(timeout_s):
                if isinstance(self._stream, trio.SocketStream):
                    self._set_low_water(min(_LOW_WATER, len(buffer)))
                    return await self._stream.socket.recv_into(buffer)
                data = await self._stream.receive_some(min(len(buffer), 1 << 18))
                buffer[: len(data)] = data
                return len(data)
        except trio.TooSlowError as error:
            raise UnavailableError(f"no bytes came for {timeout_s:g} s") from error
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise UnavailableError(f"the connection broke: {error}") from error

    async def read_line(self, timeout_s: float) -> bytes:
        """Return the next line without its end."""
        return await self._read_until(b"\n", 8192, timeout_s)

    async def read_head(self, timeout_s: float) -> tuple[int, dict[str, str]]:
        """Return status and headers (lower-case names; a repeated one is joined by commas)."""
        lines = []
        size = 0
        while line := await self.read_line(timeout_s):
            lines.append(line)
            size += len(line)
            if size > _HEAD_LIMIT:
                raise RemoteError(f"response head is over {_HEAD_LIMIT} bytes")
        parts = lines[0].split(None, 2) if lines else []
        if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
            raise RemoteError(f"answer begins with {bytes(lines[0][:40]) if lines else b''!r}, expected HTTP/1.1")
        headers: dict[str, str] = {}
        for line in lines[1:]:
            name, colon, value = line.partition(b":")
            if not colon:
                raise RemoteError("response head has a line without a colon")
            key = name.decode("latin-1").strip().lower()
            text = value.decode("latin-1").strip()
            headers[key] = f"{headers[key]},{text}" if key in headers and key != "content-length" else text
        return int(parts[1]), headers

    def close(self) -> None:
        """Close without waiting, also from a cancelled task."""
        stream = self._stream
        transport = stream if isinstance(stream, trio.SocketStream) else stream.transport_stream
        transport.socket.close()

    def is_quiet(self) -> bool:
        """Tell whether an idle connection is still good: nothing to read, not closed by the other side."""
        stream = self._stream
        transport = stream if isinstance(stream, trio.SocketStream) else stream.transport_stream
        if self._ahead or transport.socket.fileno() < 0:
            return False
        try:
            probe = stdlib_socket.fromfd(transport.socket.fileno(), stdlib_socket.AF_INET, stdlib_socket.SOCK_STREAM)
        except OSError:
            return False
        with probe:
            try:
                probe.recv(1, stdlib_socket.MSG_PEEK | stdlib_socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            except OSError:
                return False
            return False

    async def _read_until(self, end: bytes, limit: int, timeout_s: float) -> bytes:
        with trio.move_on_after(timeout_s) as scope:
            while (at := self._ahead.find(end)) < 0:
                if len(self._ahead) > limit:
                    raise RemoteError(f"response line is over {limit} bytes")
                try:
                    if isinstance(self._stream, trio.SocketStream):
                        self._set_low_water(1)
                        data = await self._stream.socket.recv(16384)
                    else:
                        data = bytes(await self._stream.receive_some(16384))
                except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    raise UnavailableError(f"the connection broke: {error}") from error
                if not data:
                    raise UnavailableError("the connection closed before the answer was complete")
                self._ahead += data
        if scope.cancelled_caught:
            raise UnavailableError(f"no answer came for {timeout_s:g} s")
        line = bytes(self._ahead[:at])
        del self._ahead[: at + len(end)]
        return line.rstrip(b"\r")

    def _set_low_water(self, value: int) -> None:
        if value != self._low_water and isinstance(self._stream, trio.SocketStream):
            self._stream.socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_RCVLOWAT, value)
            self._low_water = value


class HttpPool:
    """Keep-alive connections for ranged GETs. `ssl_context` is used for https."""

    def __init__(self, *, ssl_context: ssl.SSLContext, timeout_s: float) -> None:
        self._ssl_context = ssl_context
        self._timeout_s = timeout_s
        self._idle: defaultdict[Origin, list[_Connection]] = defaultdict(list)
        self._closed = False

    @asynccontextmanager
    async def get(self, target: Target, headers: Mapping[str, str]) -> AsyncIterator[Response]:
        """Send a GET and yield its response. The connection goes back to the pool if the body was read to its end."""
        connection, response = await self._exchange(target, headers)
        try:
            yield response
        finally:
            if response.ended and response.reusable and not self._closed:
                idle = self._idle[target.origin]
                if len(idle) < _IDLE_LIMIT:
                    idle.append(connection)
                else:
                    connection.close()
            else:
                connection.close()

    async def _exchange(self, target: Target, headers: Mapping[str, str]) -> tuple[_Connection, Response]:
        request = _render(target, headers)
        while self._idle[target.origin]:
            connection = self._idle[target.origin].pop()
            if not connection.is_quiet():
                connection.close()
                continue
            try:
                return connection, await self._ask(connection, request)
            except UnavailableError:
                continue  # a kept connection may die between the check and the request: not the server's refusal
        connection = await self._connect(target)
        return connection, await self._ask(connection, request)

    async def _ask(self, connection: _Connection, request: bytes) -> Response:
        try:
            await connection.send(request, self._timeout_s)
            status, headers = await connection.read_head(self._timeout_s)
            return Response(connection, status, headers, self._timeout_s)
        except BaseException:
            connection.close()
            raise

    async def _connect(self, target: Target) -> _Connection:
        where = f"{target.host}:{target.port}"
        try:
            with trio.fail_after(self._timeout_s):
                stream = await trio.open_tcp_stream(target.host, target.port)
                stream.setsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY, 1)
                if target.scheme == "http":
                    return _Connection(stream)
                tls = trio.SSLStream(stream, self._ssl_context, server_hostname=target.host, https_compatible=True)
                try:
                    await tls.do_handshake()
                except BaseException:
                    stream.socket.close()
                    raise
                return _Connection(tls)
        except trio.TooSlowError as error:
            raise UnavailableError(f"connecting to {where} took over {self._timeout_s:g} s") from error
        except (OSError, trio.BrokenResourceError) as error:
            cause = error.__cause__ or error
            raise UnavailableError(f"cannot connect to {where}: {cause}") from error

    def close(self) -> None:
        """Close idle connections; those in use are closed when their response ends."""
        self._closed = True
        for idle in self._idle.values():
            for connection in idle:
                connection.close()
            idle.clear()


def _render(target: Target, headers: Mapping[str, str]) -> bytes:
    host = f"[{target.host}]" if ":" in target.host else target.host
    if target.port != (443 if target.scheme == "https" else 80):
        host += f":{target.port}"
    lines = [f"GET {target.path} HTTP/1.1", f"Host: {host}", "User-Agent: rafs", "Accept-Encoding: identity"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if any("\r" in line or "\n" in line for line in lines):
        raise RemoteError("a request header holds a line end")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _content_length(headers: Mapping[str, str]) -> int:
    text = headers.get("content-length", "")
    if not text.isdigit() or len(text) > 18:
        raise RemoteError(f"answer has content length {text[:20]!r}, expected a number")
    return int(text)
