"""The scheduler as a process: one TCP connection per peer, one engine, and HTTP for people and Prometheus.

Decided here: deadlines of connections, queues towards peers, and that a peer which does not read is dropped. Concurrency: one task reads
and one writes per connection, owned by the connection's nursery; the engine is called from these and from the tick, never across a
checkpoint, so it needs no lock. A connection that ends, however it does, is told to the engine at once.
"""

from __future__ import annotations

import hmac
import json
import logging
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import trio

from p2p.protocol.frames import FrameStream
from p2p.protocol.messages import VERSION, Contact, FromScheduler, Hello, Ping, Welcome, decode_from_peer, encode
from rafsfs.errors import FormatError, RafsError
from rafsfs.net.http_server import Answer, HttpServer, Request

from .engine import Engine, Out

_log = logging.getLogger(__name__)

_HELLO_S: Final = 10.0
HEARTBEAT_S: Final = 5.0
_QUEUE: Final = 4096
"""Messages waiting for one peer; one that lets more pile up is cut off, and announces itself again."""
_TICK_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """What a scheduler is run with."""

    host: str = "0.0.0.0"  # noqa: S104 - a service for other machines
    port: int = 7946
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None
    """None: no admin pages."""
    token: str = ""


class Scheduler:
    """The shell around an engine."""

    def __init__(
        self, settings: SchedulerSettings, rng: random.Random, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._now = now
        self.engine = Engine(rng)
        self._outboxes: dict[str, trio.MemorySendChannel[FromScheduler]] = {}
        self._scopes: dict[str, trio.CancelScope] = {}
        self.counters: Counter[str] = Counter()
        self.engine_s = 0.0

    async def run(self, ready: Callable[[int, int | None], None]) -> None:
        """Serve for ever; `ready` gets the ports."""
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(
                self._settings.port, host=self._settings.host or None, backlog=1024
            )
            port: int = listeners[0].socket.getsockname()[1]
            admin = None
            if self._settings.admin_port is not None:
                admin = await nursery.start(
                    HttpServer(self._admin).serve, self._settings.admin_host, self._settings.admin_port
                )
            nursery.start_soon(trio.serve_listeners, self._connection, listeners)
            nursery.start_soon(self._tick)
            ready(port, admin)

    async def _connection(self, stream: trio.SocketStream) -> None:
        host = str(stream.socket.getpeername()[0]).removeprefix("::ffff:")
        frames = FrameStream(stream)
        try:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            hello = None
            with trio.move_on_after(_HELLO_S):
                body = await frames.receive()
                hello = decode_from_peer(body) if body is not None else None
            if not isinstance(hello, Hello) or not self._may_enter(hello, host):
                return
            await self._peer(hello, host, frames)
        except RafsError as error:
            _log.debug("connection of %s ended: %s", host, error)
        except BaseExceptionGroup as group:
            _, rest = group.split(RafsError)
            if rest is not None:
                raise
            _log.debug("connection of %s ended: %s", host, group.exceptions[0])
        finally:
            with trio.CancelScope(shield=True):
                await frames.aclose()

    def _may_enter(self, hello: Hello, host: str) -> bool:
        if hello.version != VERSION:
            _log.warning("peer refused: host=%s version=%d, expected %d", host, hello.version, VERSION)
            return False
        if not hmac.compare_digest(hello.token.encode(), self._settings.token.encode()):
            _log.warning("peer refused: host=%s wrong token", host)
            return False
        return True

    async def _peer(self, hello: Hello, host: str, frames: FrameStream) -> None:
        older = self._scopes.get(hello.id)
        if older is not None:
            older.cancel()
        send, receive = trio.open_memory_channel[FromScheduler](_QUEUE)
        async with trio.open_nursery() as nursery:
            self._scopes[hello.id] = nursery.cancel_scope
            self._outboxes[hello.id] = send
            try:
                self._deliver(self._timed(lambda: self.engine.connect(hello, host, self._now())))
                _log.info("peer connected: id=%s host=%s port=%d kind=%s", hello.id, host, hello.port, hello.kind.name)
                await frames.send(encode(Welcome(VERSION, HEARTBEAT_S)))
                nursery.start_soon(_write, frames, receive)
                async for body in frames:
                    message = decode_from_peer(body)
                    self.counters["messages_in"] += 1
                    self._deliver(self._timed(partial(self.engine.handle, hello.id, message, self._now())))
                nursery.cancel_scope.cancel()
            finally:
                if self._outboxes.get(hello.id) is send:
                    del self._outboxes[hello.id], self._scopes[hello.id]
                    self._deliver(self._timed(lambda: self.engine.disconnect(hello.id, self._now())))
                    _log.info("peer gone: id=%s host=%s", hello.id, host)

    def _deliver(self, out: Out) -> None:
        for peer, message in out:
            outbox = self._outboxes.get(peer)
            if outbox is None:
                continue
            try:
                outbox.send_nowait(message)
                self.counters["messages_out"] += 1
            except trio.WouldBlock:
                _log.warning("peer does not read and is cut off: id=%s", peer)
                self._scopes[peer].cancel()

    def _timed(self, act: Callable[[], Out]) -> Out:
        started = time.perf_counter()
        out = act()
        self.engine_s += time.perf_counter() - started
        return out

    async def _tick(self) -> None:
        while True:
            await trio.sleep(_TICK_S)
            out, silent = self.engine.tick(self._now())
            self._deliver(out)
            for peer in silent:
                _log.info("peer is silent: id=%s", peer)
                if peer in self._scopes:
                    self._scopes[peer].cancel()
            self._deliver([(peer, Ping()) for peer in self._outboxes])

    # ---- HTTP ----------------------------------------------------------------------------------------------------

    async def _admin(self, request: Request) -> Answer:
        if request.path == "/healthz":
            return Answer(200, b"ok\n", {"Content-Type": "text/plain"})
        if request.path == "/metrics":
            return Answer(200, self._metrics().encode(), {"Content-Type": "text/plain; version=0.0.4"})
        if request.path == "/swarm":
            return Answer(
                200, json.dumps(self.describe(), indent=1).encode() + b"\n", {"Content-Type": "application/json"}
            )
        return Answer(404, b"/healthz, /metrics, /swarm\n", {"Content-Type": "text/plain"})

    def _metrics(self) -> str:
        engine = self.engine
        figures = {
            "rafs_scheduler_peers": (len(engine.peers), "gauge", "Connected peers."),
            "rafs_scheduler_tasks": (len(engine.tasks), "gauge", "Data spaces with peers."),
            "rafs_scheduler_leases": (sum(len(t.leases) for t in engine.tasks.values()), "gauge", "Live leases."),
            "rafs_scheduler_messages_in_total": (self.counters["messages_in"], "counter", "Messages from peers."),
            "rafs_scheduler_messages_out_total": (self.counters["messages_out"], "counter", "Messages to peers."),
            "rafs_scheduler_engine_seconds_total": (round(self.engine_s, 6), "counter", "Time spent in decisions."),
        }
        return "".join(
            f"# HELP {name} {text}\n# TYPE {name} {kind}\n{name} {value}\n"
            for name, (value, kind, text) in figures.items()
        )

    def describe(self) -> dict[str, Any]:
        """Return tasks, peers and leases as the admin page shows them."""
        now = self._now()
        return {
            "peers": {
                name: {
                    **_contact(peer.contact),
                    "zone": peer.place.zone,
                    "rack": peer.place.rack,
                    "tasks": len(peer.tasks),
                    "neighbours": peer.degree,
                    "silent_s": round(now - peer.last_seen, 1),
                    "accused_by": sorted(peer.accused_by),
                }
                for name, peer in self.engine.peers.items()
            },
            "tasks": {
                task.hex(): {
                    "image": state.image,
                    "groups": state.groups,
                    "held": sum(1 for count in state.copies if count),
                    "peers": {name: member.count for name, member in state.members.items()},
                    "leases": {
                        str(group): {"peer": lease.peer, "expires_s": round(lease.expires - now, 1)}
                        for group, lease in state.leases.items()
                    },
                }
                for task, state in self.engine.tasks.items()
            },
        }


def _contact(contact: Contact) -> dict[str, Any]:
    return {"host": contact.host, "port": contact.port, "kind": contact.kind.name.lower()}


async def _write(frames: FrameStream, outbox: trio.MemoryReceiveChannel[FromScheduler]) -> None:
    async for message in outbox:
        try:
            frame = encode(message)
        except FormatError as error:
            _log.error("message cannot be sent: %s", error)
            continue
        with trio.fail_after(HEARTBEAT_S * 4):
            await frames.send(frame)
