"""An HTTP server on loopback that does what registries should not: the test says what, byte by byte.

Decided here: reading requests, and the few ways to answer. Everything else is the test's handler, which is called once
per request; what it raises ends the connection and nothing more. Runs in the test's own event loop, so there is nothing
to clean up but the nursery.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qs, urlsplit

import trio

_REASONS: Final = {200: "OK", 206: "Partial Content", 404: "Not Found"}


class Cut(Exception):  # noqa: N818 - what a handler raises to hang up
    """End the connection here."""


@dataclass
class Request:
    """One request as it came, and the ways to answer it."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    stream: trio.abc.Stream

    @property
    def path(self) -> str:
        """The target without its query."""
        return urlsplit(self.target).path

    @property
    def query(self) -> Mapping[str, list[str]]:
        """The parameters of the query."""
        return parse_qs(urlsplit(self.target).query)

    @property
    def range(self) -> tuple[int, int]:
        """Start and stop of the byte range that is asked for."""
        first, last = self.headers["range"].removeprefix("bytes=").split("-")
        return int(first), int(last) + 1

    async def raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        await self.stream.send_all(data)

    async def answer(
        self,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        length: int | None = None,
        cut_after: int | None = None,
    ) -> None:
        """Send an answer; `length` lies about its length, `cut_after` hangs up after so many bytes of the body."""
        fields = {"Content-Length": str(len(body) if length is None else length), **(headers or {})}
        lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Whatever')}"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        sent = b"" if self.method == "HEAD" else body[:cut_after]
        await self.raw("\r\n".join([*lines, "", ""]).encode() + sent)
        if cut_after is not None:
            raise Cut

    async def partial(self, whole: bytes, *, cut_after: int | None = None) -> None:
        """Answer a range request as it should be."""
        start, stop = self.range
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(whole)}"}
        await self.answer(206, whole[start:stop], headers, cut_after=cut_after)


Handler = Callable[[Request], Awaitable[None]]


@dataclass
class MisbehavingServer:
    """A running server: its port, and what it was asked, in order."""

    port: int
    requests: list[Request] = field(default_factory=list)
    connections: int = 0

    @property
    def address(self) -> str:
        """`localhost:PORT`."""
        return f"localhost:{self.port}"

    def asked(self, method: str, ending: str = "") -> list[Request]:
        """Return the requests of a method whose path ends so."""
        return [request for request in self.requests if request.method == method and request.path.endswith(ending)]


@asynccontextmanager
async def misbehaving(handler: Handler, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[MisbehavingServer]:
    """Serve on a free loopback port until the end of the block."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        server = MisbehavingServer(listeners[0].socket.getsockname()[1])

        async def serve(stream: trio.SocketStream) -> None:
            server.connections += 1
            wire: trio.abc.Stream = stream
            if tls is not None:
                wire = trio.SSLStream(stream, tls, server_side=True, https_compatible=True)
            try:
                await _serve_connection(wire, server, handler)
            except (Cut, trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError, EOFError):
                pass
            finally:
                stream.socket.close()

        nursery.start_soon(trio.serve_listeners, serve, listeners)
        try:
            yield server
        finally:
            nursery.cancel_scope.cancel()


async def _serve_connection(stream: trio.abc.Stream, server: MisbehavingServer, handler: Handler) -> None:
    ahead = bytearray()
    while True:
        head = await _until(stream, ahead, b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        method, target, _ = lines[0].split(" ")
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = await _exactly(stream, ahead, int(headers.get("content-length", "0")))
        request = Request(method, target, headers, body, stream)
        server.requests.append(request)
        await handler(request)


async def _until(stream: trio.abc.Stream, ahead: bytearray, mark: bytes) -> bytes:
    while (at := ahead.find(mark)) < 0:
        await _more(stream, ahead)
    found = bytes(ahead[:at])
    del ahead[: at + len(mark)]
    return found


async def _exactly(stream: trio.abc.Stream, ahead: bytearray, length: int) -> bytes:
    while len(ahead) < length:
        await _more(stream, ahead)
    found = bytes(ahead[:length])
    del ahead[:length]
    return found


async def _more(stream: trio.abc.Stream, ahead: bytearray) -> None:
    data = await stream.receive_some(1 << 18)
    if not data:
        raise EOFError
    ahead += data
