"""Neighbours that lie, drip and babble: real sockets. What they hold up is bounded, nothing of theirs is kept that is not right."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

import p2p.neighbour as neighbour_module
import rafsfs.net.http_server as http_server
from p2p.core.task import NeighbourView, Standing
from p2p.have import HaveReader, all_frame, more_frame
from p2p.keeping import Keeper
from p2p.neighbour import AbsentError, BusyError, Neighbour
from p2p.protocol.frames import FrameStream
from p2p.protocol.messages import Contact, Kind
from p2p.selection import Run
from rafsfs.errors import FormatError, IntegrityError, RafsError, RemoteError, UnavailableError
from rafsfs.fetch.buffers import BufferPool
from rafsfs.format.codec import chunk_digest
from rafsfs.format.space_table import SpaceTable, pack_record
from rafsfs.net.http1 import HttpPool
from rafsfs.net.http_server import Answer, HttpServer
from rafsfs.net.http_server import Request as Asked
from rafsfs.net.origin import Origin
from rafsfs.store.data_space import DataSpace, create, open_space_directory
from tests.support.misbehaving import Request, misbehaving

LIMIT_S = 60.0
CHUNK = 64 << 10
COUNT = 4


@pytest.fixture
def space(tmp_path: Path) -> DataSpace:
    data = [bytes([number]) * CHUNK for number in range(COUNT)]
    records = (pack_record(chunk_digest(chunk), number * CHUNK, CHUNK) for number, chunk in enumerate(data))
    table = SpaceTable(b"".join(records), COUNT * CHUNK)
    where = tmp_path / table.space_id.hex()
    create(str(where), table)
    return open_space_directory(str(where))[0]


async def met(space: DataSpace, lie: Callable[[Request], Awaitable[None]], *, listen: bool = False) -> list[int]:
    """Ask a liar for all chunks, or for its have-map; return what landed, raise what was found wrong."""
    landed: list[int] = []
    caught: list[RafsError] = []
    with trio.fail_after(LIMIT_S):
        async with misbehaving(lie) as server:
            view = NeighbourView(Standing(Contact("liar", "127.0.0.1", server.port, Kind.PEER)), bytearray(COUNT))
            neighbour = Neighbour(view, Origin("http", "127.0.0.1", server.port), space)
            pool = HttpPool(ssl_context=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), timeout_s=5, use_proxies=False)
            try:
                if listen:
                    await neighbour.listen(pool, {}, lambda who, fresh, fetching: landed.extend(fresh), lambda: None)
                else:
                    run = Run("liar", 0, COUNT, COUNT * CHUNK)
                    keeper = Keeper(BufferPool(4 << 20))
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(keeper.run)
                        try:
                            await neighbour.fetch(run, pool, {}, keeper, landed.append)
                        finally:
                            nursery.cancel_scope.cancel()
            except RafsError as error:
                caught.append(error)
            except BaseExceptionGroup as group:
                caught += [error for error in group.exceptions if isinstance(error, RafsError)]
            assert view.standing.under_way == 0
            assert not view.listening
            pool.close()
    assert all(space.is_present(chunk) for chunk in landed) or listen
    if caught:
        raise caught[0]
    return landed


def raw(head: str, body: bytes = b"") -> Callable[[Request], Awaitable[None]]:
    async def lie(request: Request) -> None:
        await request.stream.send_all(head.replace("\n", "\r\n").encode() + body)
        await trio.sleep_forever()

    return lie


GOOD = b"\0" * CHUNK


@pytest.mark.io
@pytest.mark.parametrize(
    ("head", "body", "error"),
    [
        ("HTTP/1.1 409 Conflict\nContent-Length: 0\n\n", b"", AbsentError),
        ("HTTP/1.1 404 Not Found\nContent-Length: 0\n\n", b"", AbsentError),
        ("HTTP/1.1 503 Busy\nContent-Length: 0\n\n", b"", BusyError),
        ("HTTP/1.1 302 Found\nLocation: http://127.0.0.1:1/\nContent-Length: 0\n\n", b"", RemoteError),
        ("HTTP/1.1 200 OK\nContent-Length: 5\n\n", b"12345", RemoteError),
        ("HTTP/1.1 200 OK\nRafs-Chunks: 0\nContent-Length: 5\n\n", b"12345", RemoteError),
        ("HTTP/1.1 200 OK\nRafs-Chunks: 5\nContent-Length: 5\n\n", b"12345", RemoteError),
        ("HTTP/1.1 200 OK\nRafs-Chunks: 1e9\nContent-Length: 5\n\n", b"12345", RemoteError),
        ("HTTP/1.1 200 OK\nRafs-Chunks: 1\nContent-Length: 5\n\n", b"12345", UnavailableError),
        ("HTTP/1.1 200 OK\nRafs-Chunks: 1\nContent-Length: x\n\n", b"", RemoteError),
        ("garbage\n\n", b"", RemoteError),
        ("HTTP/1.1 200 OK\n" + "X: y\n" * 20000, b"", RemoteError),
        (f"HTTP/1.1 200 OK\nRafs-Chunks: 1\nContent-Length: {CHUNK}\n\n", b"\7" * CHUNK, IntegrityError),
        (f"HTTP/1.1 200 OK\nRafs-Chunks: 2\nContent-Length: {CHUNK}\n\n", GOOD, UnavailableError),
    ],
)
async def test_answers_that_are_none_are_errors(
    space: DataSpace, head: str, body: bytes, error: type[RafsError]
) -> None:
    with pytest.raises(error):
        await met(space, raw(head, body))
    assert not space.is_present(0) or body == GOOD


@pytest.mark.io
async def test_more_than_was_promised_is_not_read(space: DataSpace) -> None:
    head = f"HTTP/1.1 200 OK\nRafs-Chunks: 1\nContent-Length: {9 * CHUNK}\n\n"
    assert await met(space, raw(head, GOOD + b"\7" * 8 * CHUNK)) == [0]


@pytest.mark.io
async def test_who_drips_in_a_chunk_is_left_in_bounded_time(space: DataSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbour_module, "STALL_S", 0.1)
    monkeypatch.setattr(neighbour_module, "MOST_STALL_S", 0.3)

    async def drip(request: Request) -> None:
        head = f"HTTP/1.1 200 OK\r\nRafs-Chunks: 1\r\nContent-Length: {CHUNK}\r\n\r\n"
        await request.stream.send_all(head.encode())
        for _ in range(CHUNK):
            await request.stream.send_all(b"\0")
            await trio.sleep(0.02)

    with pytest.raises(UnavailableError, match="no whole chunk"):
        await met(space, drip)


def framed(*frames: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(frame), frame) for frame in frames)


CHUNKED = "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n"


@pytest.mark.io
@pytest.mark.parametrize(
    "body",
    [
        framed(b"\xff\xff\xff\xff"),
        framed(b"\0\0\0\1\xc1"),
        framed(more_frame([COUNT])),
        framed(all_frame(b"\1"), all_frame(b"\1")),
        framed(*[more_frame([1] * 50)] * 10),
        b"zz\r\n",
    ],
)
async def test_have_maps_that_make_no_sense_end_the_neighbourhood(space: DataSpace, body: bytes) -> None:
    with pytest.raises((FormatError, RemoteError)):
        await met(space, raw(CHUNKED, body), listen=True)


@pytest.mark.io
async def test_single_bytes_of_a_have_map_are_no_sign_of_life(
    space: DataSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbour_module, "_FRAME_S", 0.3)

    async def drip(request: Request) -> None:
        await request.stream.send_all(CHUNKED.replace("\n", "\r\n").encode())
        for byte in b"\0\0\1\0" + bytes(256):
            await request.stream.send_all(framed(bytes([byte])))
            await trio.sleep(0.02)

    with pytest.raises(UnavailableError, match="nothing whole"):
        await met(space, drip, listen=True)


@pytest.mark.io
async def test_one_host_cannot_take_all_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "PER_HOST", 3)

    async def handle(request: Asked) -> Answer:
        return Answer(200, b"here\n")

    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            port = await nursery.start(HttpServer(handle).serve, "0.0.0.0", 0)
            greedy = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(4)]
            assert not await greedy[3].receive_some(1), "closed"
            other = await trio.open_tcp_stream("127.0.0.1", port, local_address="127.0.0.2")
            await other.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert bytes(await other.receive_some(64)).startswith(b"HTTP/1.1 200")
            for stream in (*greedy, other):
                await trio.aclose_forcefully(stream)
            nursery.cancel_scope.cancel()


@given(st.lists(st.binary(max_size=80), max_size=8), st.integers(0, 300))
def test_any_bytes_of_a_have_map_give_chunks_or_a_format_error(pieces: list[bytes], count: int) -> None:
    reader = HaveReader(bytearray(count))
    try:
        for piece in pieces:
            assert all(0 <= chunk < count for chunk in reader.feed(len(piece).to_bytes(4, "big") + piece))
            reader.feed(b"")
    except FormatError:
        pass


class Bytes(trio.abc.Stream):
    """A stream that says something and ends."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data, self._data = self._data[:7], self._data[7:]
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        raise NotImplementedError

    async def wait_send_all_might_not_block(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        pass


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=20).map(lambda body: len(body).to_bytes(4, "big") + body)))
def test_any_bytes_of_frames_give_bodies_or_our_error(data: bytes) -> None:
    async def read() -> None:
        try:
            frames = FrameStream(Bytes(data), 64)
            while (body := await frames.receive()) is not None:
                assert len(body) <= 64
        except (FormatError, UnavailableError):
            pass

    trio.run(read)
