"""Clients that misbehave towards the upload server and the scheduler: real sockets. The guilty are cut off, the others go on."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
import trio

import rafsfs.net.http_server as http_server
import scheduler.server as server
from p2p.protocol.frames import FrameStream
from p2p.protocol.messages import (
    MAX_GROUPS,
    VERSION,
    Ask,
    Hello,
    Join,
    Kind,
    Leave,
    NodeProgress,
    Preheated,
    Welcome,
    decode_from_scheduler,
    encode,
)
from p2p.protocol.messages import Answer as Answer_
from rafsfs.errors import UnavailableError
from rafsfs.net.http_server import Answer, HttpServer, Request
from scheduler.address import usable_address
from scheduler.engine import GROUPS_PER_PEER, TASKS_PER_PEER, Engine
from scheduler.server import Scheduler, SchedulerSettings

pytestmark = pytest.mark.io
LIMIT_S = 30.0
_opened: list[trio.SocketStream] = []


async def end(nursery: trio.Nursery) -> None:
    while _opened:
        await trio.aclose_forcefully(_opened.pop())
    nursery.cancel_scope.cancel()


async def connect(port: int) -> trio.SocketStream:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    _opened.append(stream)
    return stream


async def scheduler_in(nursery: trio.Nursery) -> tuple[Scheduler, int]:
    running = Scheduler(SchedulerSettings(host="127.0.0.1", port=0), random.Random(1))
    ports: list[int] = []
    ready = trio.Event()

    def started(port: int, admin: int | None) -> None:
        ports.append(port)
        ready.set()

    nursery.start_soon(running.run, started)
    await ready.wait()
    return running, ports[0]


async def welcomed(port: int, name: str) -> FrameStream:
    frames = FrameStream(await connect(port))
    await frames.send(encode(Hello(VERSION, name, 1, Kind.PEER)))
    body = await frames.receive()
    assert body is not None
    assert isinstance(decode_from_scheduler(body), Welcome)
    return frames


async def test_a_client_that_takes_no_answer_ends_its_connection_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_SEND_S", 0.1)

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1 << 20)

    async def handle(request: Request) -> Answer:
        return Answer(200, endless() if request.path == "/endless" else b"here\n")

    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            serving = HttpServer(handle)
            port = await nursery.start(serving.serve, "127.0.0.1", 0)
            idle = await connect(port)
            await idle.send_all(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
            while serving._connections != 1:
                await trio.sleep(0.01)
            while serving._connections:
                await trio.sleep(0.01)
            other = await connect(port)
            await other.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert bytes(await other.receive_some(64)).startswith(b"HTTP/1.1 200")
            await end(nursery)


async def test_a_peer_that_reads_nothing_does_not_end_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_UNREAD_S", 0.1)
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            running, port = await scheduler_in(nursery)
            await welcomed(port, "deaf")
            big = Preheated(1, [NodeProgress("x", 0, 0, "e" * 4000)] * 200)
            while "deaf" in running._outboxes:
                running._deliver([("deaf", big)])
                await trio.sleep(0.001)
            await (await welcomed(port, "other")).aclose()
            await end(nursery)


async def test_giant_frames_garbage_and_half_open_connections_leave_the_scheduler_to_others() -> None:
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            running, port = await scheduler_in(nursery)
            for sent in (b"\xff" * 4, b"\x00\x00\x00\x05hello", b"GET / HTTP/1.1\r\n\r\n"):
                stream = await connect(port)
                await stream.send_all(sent)
                with pytest.raises((trio.BrokenResourceError, AssertionError)):
                    assert await stream.receive_some(1), "closed"
            mute = [await connect(port) for _ in range(server.UNKNOWN_PER_HOST + 8)]
            while running.refused["too many"] < 8:
                await trio.sleep(0.01)
            for stream in mute:
                await stream.aclose()
            while running._unknown:
                await trio.sleep(0.01)
            await (await welcomed(port, "other")).aclose()
            await end(nursery)


def test_a_peer_can_make_the_scheduler_hold_only_so_much() -> None:
    engine = Engine(random.Random(1))
    engine.connect(Hello(VERSION, "greedy", 1, Kind.PEER), "10.0.0.1", 0.0)
    for number in range(10):
        engine.handle("greedy", Join(number.to_bytes(32, "big"), MAX_GROUPS), 0.0)
    assert sum(task.groups for task in engine.tasks.values()) <= GROUPS_PER_PEER
    engine.connect(Hello(VERSION, "many", 1, Kind.PEER), "10.0.0.2", 0.0)
    for number in range(TASKS_PER_PEER + 20):
        engine.handle("many", Join((1000 + number).to_bytes(32, "big"), 1), 0.0)
    assert len(engine.peers["many"].tasks) == TASKS_PER_PEER


@pytest.mark.logs_warnings
async def test_who_says_the_id_of_another_does_not_cut_it_off() -> None:
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            running, port = await scheduler_in(nursery)

            async def hello(key: str) -> bool:
                frames = FrameStream(await connect(port))
                await frames.send(encode(Hello(VERSION, "victim", 1, Kind.PEER, key=key)))
                return await frames.receive() is not None

            assert await hello("secret")
            first = running._scopes["victim"]
            assert not await hello("")
            assert not await hello("guess")
            assert running._scopes["victim"] is first
            assert running.refused["id"] == 2
            assert await hello("secret"), "it comes back before its old connection is known to be dead"
            assert running._scopes["victim"] is not first
            await end(nursery)


@pytest.mark.parametrize(
    ("said", "seen", "usable"),
    [
        ("10.0.0.7", "10.0.0.1", True),
        ("node-7.rack.example", "10.0.0.1", True),
        ("fd00::7", "10.0.0.1", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("localhost", "127.0.0.1", True),
        ("127.0.0.1", "10.0.0.1", False),
        ("LOCALHOST", "10.0.0.1", False),
        ("::1", "10.0.0.1", False),
        ("0.0.0.0", "10.0.0.1", False),
        ("::", "10.0.0.1", False),
        ("255.255.255.255", "10.0.0.1", False),
        ("224.0.0.1", "10.0.0.1", False),
        ("169.254.169.254", "10.0.0.1", False),
        ("fe80::1%eth0", "10.0.0.1", False),
        ("", "10.0.0.1", False),
        ("a b", "10.0.0.1", False),
        ("x/../y", "10.0.0.1", False),
        ("host\r\nX: y", "10.0.0.1", False),
        ("user@host", "10.0.0.1", False),
        ("a." * 200 + "b", "10.0.0.1", False),
    ],
)
def test_nobody_is_sent_to_an_address_that_stands_for_all_or_for_the_asker_himself(
    said: str, seen: str, *, usable: bool
) -> None:
    assert usable_address(said, seen) is usable
    engine = Engine(random.Random(1))
    engine.connect(Hello(VERSION, "peer", 1, Kind.PEER, address=said), seen, 0.0)
    assert engine.peers["peer"].contact.host == (said if usable else seen)


async def test_a_flood_holds_up_whoever_sends_it_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MESSAGES_PER_S", 10)
    monkeypatch.setattr(server, "_BURST", 20)
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            running, port = await scheduler_in(nursery)
            flooder, other = await welcomed(port, "flooder"), await welcomed(port, "other")

            async def flood() -> None:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError, UnavailableError):
                    for number in range(100_000):
                        await flooder.send(encode(Leave(number.to_bytes(32, "big"))))

            began = trio.current_time()
            nursery.start_soon(flood)
            while running.messages_in["leave"] < 20:
                await trio.sleep(0.01)
            await other.send(encode(Join(b"t" * 32, 4)))
            await other.send(encode(Ask(1, b"t" * 32, [0])))
            while True:
                body = await other.receive()
                assert body is not None
                if isinstance(decode_from_scheduler(body), Answer_):
                    break
            assert running.messages_in["leave"] <= 22 + 10 * (trio.current_time() - began)
            await end(nursery)
