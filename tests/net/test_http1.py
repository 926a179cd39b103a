"""The lean client against a server that misbehaves: bodies, framing, keep-alive, silence, TLS, proxies."""

from __future__ import annotations

import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
import trio
import trustme

from rafsfs.errors import AccessDeniedError, DeadlineError, RemoteError, UnavailableError
from rafsfs.net.http1 import HttpPool
from rafsfs.net.origin import Target, parse_url
from rafsfs.net.tls import client_context
from tests.support.misbehaving import Cut, Handler, MisbehavingServer, Request, misbehaving

pytestmark = pytest.mark.io

BODY = bytes(range(256)) * 4096  # 1 MiB


@asynccontextmanager
async def talking(
    handler: Handler, *, timeout_s: float = 5.0, connections: int = 4
) -> AsyncIterator[tuple[HttpPool, MisbehavingServer, Target]]:
    """A pool and a server to use it on."""
    async with misbehaving(handler) as server:
        pool = HttpPool(ssl_context=client_context(), timeout_s=timeout_s, connections=connections)
        try:
            yield pool, server, parse_url(f"http://127.0.0.1:{server.port}/x")
        finally:
            pool.close()


async def fetch(
    pool: HttpPool, target: Target, length: int, *, step: int = 1 << 20, headers: Mapping[str, str] | None = None
) -> bytes:
    """GET and read exactly `length` bytes."""
    data = bytearray(length)
    view = memoryview(data)
    async with pool.get(target, headers or {}) as response:
        for start in range(0, length, step):
            await response.readinto(view[start : start + step])
        await response.finish()
    return bytes(data)


def chunked(data: bytes, size: int, *, extension: bytes = b"") -> bytes:
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts)


async def test_bodies_arrive_whole_and_connections_are_kept() -> None:
    async def handler(request: Request) -> None:
        await request.answer(200, BODY)

    async with talking(handler) as (pool, server, target):
        for step in (len(BODY), 1000, 99_999):
            assert await fetch(pool, target, len(BODY), step=step) == BODY
        assert server.connections == 1
        assert server.requests[0].headers["host"] == f"127.0.0.1:{server.port}"
        assert server.requests[0].headers["accept-encoding"] == "identity"


async def test_a_thread_that_waits_for_a_silent_server_ends_with_its_task_or_at_the_deadline() -> None:
    async def handler(request: Request) -> None:
        await request.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + bytes(400))
        await trio.sleep_forever()

    async with talking(handler, timeout_s=0.5) as (pool, _, target):
        async with pool.get(target, {}) as response:
            assert response.can_block
            await trio.to_thread.run_sync(response.readinto_blocking, memoryview(bytearray(100)))
            with trio.move_on_after(0.01) as scope:
                await trio.to_thread.run_sync(response.readinto_blocking, memoryview(bytearray(900)))
            assert scope.cancelled_caught
        async with pool.get(target, {}) as response:
            with pytest.raises(UnavailableError, match=r"sent nothing for 0\.5 s"):
                await trio.to_thread.run_sync(response.readinto_blocking, memoryview(bytearray(1000)))
            with pytest.raises(UnavailableError, match="after a failure"):
                await trio.to_thread.run_sync(response.readinto_blocking, memoryview(bytearray(1)))


async def test_a_body_that_ends_too_soon_is_an_error_in_a_thread_too() -> None:
    async def handler(request: Request) -> None:
        await request.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + bytes(400))
        raise Cut

    async with talking(handler) as (pool, _, target), pool.get(target, {}) as response:
        with pytest.raises(UnavailableError, match="600 bytes of the body missing"):
            await trio.to_thread.run_sync(response.readinto_blocking, memoryview(bytearray(1000)))


async def test_chunked_bodies_arrive_whole_and_connections_are_kept() -> None:
    async def handler(request: Request) -> None:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        await request.raw(head + chunked(BODY, 70_001, extension=b";a=b") + b"0\r\nTrailer: x\r\n\r\n")

    async with talking(handler) as (pool, server, target):
        for step in (len(BODY), 333_333):
            assert await fetch(pool, target, len(BODY), step=step) == BODY
        assert server.connections == 1


async def test_a_body_that_ends_with_the_connection_arrives_whole() -> None:
    async def handler(request: Request) -> None:
        await request.raw(b"HTTP/1.0 200 OK\r\n\r\n" + BODY)
        raise Cut

    async with talking(handler) as (pool, server, target):
        assert await fetch(pool, target, len(BODY)) == BODY
        assert await fetch(pool, target, len(BODY)) == BODY
        assert server.connections == 2


async def test_a_body_that_is_not_read_to_its_end_costs_its_connection_only() -> None:
    async def handler(request: Request) -> None:
        await request.answer(200, BODY)

    async with talking(handler) as (pool, server, target):
        assert await fetch(pool, target, 100) == BODY[:100]
        assert await fetch(pool, target, len(BODY)) == BODY
        assert server.connections == 2


async def test_a_body_that_is_cut_off_is_unavailable_and_spent() -> None:
    async def handler(request: Request) -> None:
        await request.answer(200, BODY, cut_after=1000)

    async with talking(handler) as (pool, _, target):
        buffer = memoryview(bytearray(len(BODY)))
        async with pool.get(target, {}) as response:
            with pytest.raises(UnavailableError):
                await response.readinto(buffer)
            with pytest.raises(UnavailableError):
                await response.readinto(buffer[:1])
        assert bytes(buffer[:1000]) == BODY[:1000], "the bytes so far are in the buffer"


async def test_a_cancelled_body_is_spent() -> None:
    async def handler(request: Request) -> None:
        await request.answer(200, BODY, cut_after=1000)

    async with talking(handler) as (pool, _, target), pool.get(target, {}) as response:
        with trio.CancelScope() as scope:
            scope.cancel()
            await response.readinto(memoryview(bytearray(2000)))
        with pytest.raises(UnavailableError):
            await response.readinto(memoryview(bytearray(1)))


async def test_silence_is_unavailable_after_the_timeout() -> None:
    async def handler(request: Request) -> None:
        if request.headers.get("x-head"):
            await request.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")
        await trio.sleep_forever()

    async with talking(handler, timeout_s=0.2) as (pool, _, target):
        for headers in ({}, {"x-head": "1"}):
            with pytest.raises(UnavailableError, match=r"nothing for 0\.2 s"):
                await fetch(pool, target, 10, headers=headers)


async def test_a_slow_drip_is_not_silence() -> None:
    async def handler(request: Request) -> None:
        await request.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n")
        for start in range(0, 300_000, 60_000):
            await trio.sleep(0.2)
            await request.raw(BODY[start : start + 60_000])

    async with talking(handler, timeout_s=0.5) as (pool, _, target):
        assert await fetch(pool, target, 300_000) == BODY[:300_000]


async def test_a_kept_connection_that_the_server_closed_is_not_an_error() -> None:
    async def handler(request: Request) -> None:
        await request.answer(200, b"12345")
        raise Cut

    async with talking(handler) as (pool, server, target):
        for _ in range(3):
            assert await fetch(pool, target, 5) == b"12345"
        assert server.connections == 3


async def test_a_server_that_hangs_up_on_every_request_is_asked_once() -> None:
    async def handler(request: Request) -> None:
        raise Cut

    async with talking(handler) as (pool, server, target):
        with pytest.raises(UnavailableError, match="closed before the answer"):
            await fetch(pool, target, 5)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"\x15\x03\x01\x00\x02\x02\x16\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 100_000,
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 20,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n12345\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 100_000,
    ],
)
async def test_what_is_not_http_is_refused_in_bounded_memory(answer: bytes) -> None:
    async def handler(request: Request) -> None:
        await request.raw(answer)

    async with talking(handler) as (pool, _, target):
        with pytest.raises(RemoteError) as caught:
            await fetch(pool, target, 5)
        assert len(str(caught.value)) < 200


async def test_interim_answers_are_passed_over() -> None:
    async def handler(request: Request) -> None:
        await request.raw(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
        await request.answer(200, b"12345")

    async with talking(handler) as (pool, _, target):
        assert await fetch(pool, target, 5) == b"12345"


async def test_connections_are_bounded_and_waiting_for_one_is_too() -> None:
    release = trio.Event()

    async def handler(request: Request) -> None:
        await release.wait()
        await request.answer(200, b"12345")

    async with talking(handler, connections=2, timeout_s=0.3) as (pool, server, target):
        outcomes: list[str] = []

        async def one() -> None:
            try:
                await fetch(pool, target, 5)
            except DeadlineError:
                outcomes.append("busy")
            except UnavailableError:
                outcomes.append("silent")

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one)
        assert server.connections <= 4
        assert "busy" in outcomes
        release.set()
        assert await fetch(pool, target, 5) == b"12345", "all slots were given back"
        assert await fetch(pool, target, 5) == b"12345"


async def test_nobody_there_is_unavailable_with_the_reason() -> None:
    async def handler(request: Request) -> None:
        raise Cut

    async with misbehaving(handler) as server:
        port = server.port
    pool = HttpPool(ssl_context=client_context(), timeout_s=5)
    with pytest.raises(UnavailableError, match=f"cannot connect to 127.0.0.1:{port}: .*refused"):
        await fetch(pool, parse_url(f"http://127.0.0.1:{port}/"), 1)


async def test_header_values_cannot_smuggle_lines() -> None:
    async def handler(request: Request) -> None:
        await request.answer(200, b"12345")

    async with talking(handler) as (pool, _, target):
        with pytest.raises(ValueError):
            await fetch(pool, target, 5, headers={"X": "a\r\nY: b"})
        assert await fetch(pool, target, 5) == b"12345"


# ---- TLS -------------------------------------------------------------------------------------------------------------


def server_context(authority: trustme.CA, name: str = "localhost") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = client_context()
    authority.configure_trust(context)
    return context


async def big(request: Request) -> None:
    await request.answer(200, BODY)


async def test_bodies_come_through_tls() -> None:
    authority = trustme.CA()
    async with misbehaving(big, tls=server_context(authority)) as server:
        pool = HttpPool(ssl_context=trusting(authority), timeout_s=5)
        target = parse_url(f"https://localhost:{server.port}/x")
        for _ in range(2):
            assert await fetch(pool, target, len(BODY)) == BODY
        assert server.connections == 1
        pool.close()


@pytest.mark.parametrize("wrong", ["authority", "name"])
async def test_a_certificate_that_is_not_right_is_refused_with_the_remedy(wrong: str) -> None:
    authority = trustme.CA()
    name = "elsewhere.example" if wrong == "name" else "localhost"
    async with misbehaving(big, tls=server_context(authority, name)) as server:
        context = trusting(authority) if wrong == "name" else client_context()
        pool = HttpPool(ssl_context=context, timeout_s=5)
        with pytest.raises(RemoteError, match=r"certificate of localhost:\d+ is not accepted.*--ca-file") as caught:
            await fetch(pool, parse_url(f"https://localhost:{server.port}/x"), 5)
        assert not isinstance(caught.value, UnavailableError), "another try would not help"


# ---- proxies ---------------------------------------------------------------------------------------------------------


async def test_a_proxy_is_asked_for_plain_http_by_whole_url(monkeypatch: pytest.MonkeyPatch) -> None:
    async def proxy(request: Request) -> None:
        await request.answer(200, b"12345")

    async with misbehaving(proxy) as server:
        monkeypatch.setenv("http_proxy", f"http://ada:secret@127.0.0.1:{server.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        pool = HttpPool(ssl_context=client_context(), timeout_s=5)
        assert await fetch(pool, parse_url("http://registry.example/v2/x"), 5) == b"12345"
        pool.close()
        assert server.requests[0].target == "http://registry.example/v2/x"
        assert server.requests[0].headers["proxy-authorization"].startswith("Basic ")


async def test_a_proxy_opens_tunnels_for_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    async with misbehaving(big, tls=server_context(authority, "registry.example")) as origin:

        async def proxy(request: Request) -> None:
            assert (request.method, request.target) == ("CONNECT", "registry.example:443")
            if "proxy-authorization" not in request.headers:
                await request.answer(407)
                return
            await request.raw(b"HTTP/1.1 200 Connected\r\n\r\n")
            async with await trio.open_tcp_stream("127.0.0.1", origin.port) as onward, trio.open_nursery() as nursery:
                nursery.start_soon(pump, request.stream, onward)
                await pump(onward, request.stream)
                nursery.cancel_scope.cancel()
            raise Cut

        async with misbehaving(proxy) as server:
            monkeypatch.delenv("no_proxy", raising=False)
            pool = HttpPool(ssl_context=trusting(authority), timeout_s=5)
            target = parse_url("https://registry.example/x")
            monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.port}")
            with pytest.raises(AccessDeniedError, match="proxy"):
                await fetch(pool, target, len(BODY))
            monkeypatch.setenv("https_proxy", f"http://ada:secret@127.0.0.1:{server.port}")
            assert await fetch(pool, target, len(BODY)) == BODY
            pool.close()


async def pump(source: trio.abc.ReceiveStream, sink: trio.abc.SendStream) -> None:
    try:
        async for data in source:
            await sink.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return


# ---- cost ------------------------------------------------------------------------------------------------------------


async def test_a_big_body_costs_few_wakeups() -> None:
    """With SO_RCVLOWAT a body is read in large pieces: far fewer than one per segment."""
    whole = bytes(8 << 20)

    async def handler(request: Request) -> None:
        await request.answer(200, whole)

    async with talking(handler) as (pool, _, target):
        buffer = memoryview(bytearray(len(whole)))
        begin = time.process_time()
        async with pool.get(target, {}) as response:
            reads = done = 0
            while done < len(whole):
                done += await response.read_some(buffer[done:])
                reads += 1
        assert reads <= 80, f"{reads} reads for 8 MiB in {time.process_time() - begin:.3f} CPU s"
