"""The scheduler as a process: one TCP connection per peer, one engine, and HTTP for people and Prometheus.

Decided here: deadlines of connections, queues towards peers, and that a peer which does not read is dropped. Concurrency: one task reads
and one writes per connection, owned by the connection's nursery; the engine is called from these and from the tick, never across a
checkpoint, so it needs no lock. A connection that ends, however it does, is told to the engine at once.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import random
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import trio

from p2p.protocol.frames import FrameStream
from p2p.protocol.messages import (
    VERSION,
    Answer,
    Ask,
    Contact,
    Failed,
    Fill,
    FromPeer,
    FromScheduler,
    Hello,
    Join,
    Leave,
    Neighbours,
    Order,
    Ping,
    Report,
    Revoke,
    Welcome,
    decode_from_peer,
    encode,
)
from rafsfs.errors import FormatError, RafsError, UnavailableError
from rafsfs.metrics import CONTENT_TYPE, Values, render
from rafsfs.net.http_server import Answer as Page
from rafsfs.net.http_server import HttpServer, Request
from rafsfs.net.mutual_tls import MutualTls, follow_files

from .address import usable_address
from .engine import Engine, Out
from .metrics import SCHEDULER

_log = logging.getLogger(__name__)

_HELLO_S: Final = 10.0
HEARTBEAT_S: Final = 5.0
_UNREAD_S: Final = 20.0
"""How long a peer may take none of what is sent to it; then it is cut off, and it alone."""
_QUEUE: Final = 4096
"""Messages waiting for one peer; one that lets more pile up is cut off, and announces itself again."""
_TICK_S: Final = 1.0
CONNECTIONS: Final = 20_000
"""Open connections: twice the largest swarm that is simulated."""
UNKNOWN_PER_HOST: Final = 64
"""Connections of one host that have not said who they are: half-open ones must not take the place of others."""
MESSAGES_PER_S: Final = 2000
"""Of one peer, in the long run: one that sends more is read no faster, so it holds up itself alone."""
_HEAVY: Final = 512
"""Bytes of a message after which it counts as one more: a question about 60,000 groups is work for half a second."""
_BURST: Final = 4000
"""Messages at once: a node that announces its tasks after a restart."""


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """What a scheduler is run with."""

    host: str = "0.0.0.0"  # noqa: S104 - a service for other machines
    port: int = 7946
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None
    """None: no admin pages."""
    token: str = field(default="", repr=False)
    tls: MutualTls | None = field(default=None, repr=False)
    """For the port of peers: who shows no certificate of the swarm's authority is refused."""


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
        self._keys: dict[str, str] = {}
        self._open = 0
        self._unknown: Counter[str] = Counter()
        self.counters: Counter[str] = Counter()
        self.messages_in: Counter[str] = Counter()
        self.messages_out: Counter[str] = Counter()
        self.rulings: Counter[str] = Counter()
        self.complaints: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.engine_s: Counter[str] = Counter()
        """Seconds by kind of event."""

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
            if self._settings.tls is not None:
                nursery.start_soon(follow_files, self._settings.tls)
            ready(port, admin)

    async def _connection(self, stream: trio.SocketStream) -> None:
        host = "?"
        wire: trio.abc.Stream = stream
        if self._settings.tls is not None:
            wire = trio.SSLStream(stream, self._settings.tls.server, server_side=True, https_compatible=True)
        frames = FrameStream(wire)
        self._open += 1
        try:
            host = str(stream.socket.getpeername()[0]).removeprefix("::ffff:")
            if self._open > CONNECTIONS or self._unknown[host] >= UNKNOWN_PER_HOST:
                self.refused["too many"] += 1
                return
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            hello = await self._hello(wire, frames, host)
            if hello is None or not self._may_enter(hello, host):
                return
            await self._peer(hello, host, frames)
        except OSError as error:  # gone before it was looked at
            _log.debug("connection of %s ended: %s", host, error)
        except RafsError as error:
            _log.debug("connection of %s ended: %s", host, error)
        except BaseExceptionGroup as group:
            _, rest = group.split(RafsError)
            if rest is not None:
                raise
            _log.debug("connection of %s ended: %s", host, group.exceptions[0])
        finally:
            self._open -= 1
            with trio.CancelScope(shield=True):
                await frames.aclose()

    async def _hello(self, wire: trio.abc.Stream, frames: FrameStream, host: str) -> Hello | None:
        self._unknown[host] += 1
        try:
            with trio.move_on_after(_HELLO_S):
                if isinstance(wire, trio.SSLStream) and not await self._shake_hands(wire, host):
                    return None
                body = await frames.receive()
                message = decode_from_peer(body) if body is not None else None
                return message if isinstance(message, Hello) else None
            return None
        finally:
            self._unknown[host] -= 1
            if not self._unknown[host]:
                del self._unknown[host]

    async def _shake_hands(self, wire: trio.SSLStream[trio.SocketStream], host: str) -> bool:
        try:
            await wire.do_handshake()
        except trio.BrokenResourceError as error:
            if isinstance(error.__cause__, ssl.SSLError):  # which the other side is not told: trio sends no alert
                self.refused["certificate"] += 1
                reason = error.__cause__.reason or str(error.__cause__)
                _log.warning("peer refused: host=%s TLS: %s", host, reason.lower().replace("_", " "))
            return False
        return True

    def _may_enter(self, hello: Hello, host: str) -> bool:
        if hello.version != VERSION:
            self.refused["version"] += 1
            _log.warning("peer refused: host=%s version=%d, expected %d", host, hello.version, VERSION)
            return False
        if not hmac.compare_digest(hello.token.encode(), self._settings.token.encode()):
            self.refused["token"] += 1
            _log.warning("peer refused: host=%s wrong token", host)
            return False
        return True

    async def _peer(self, hello: Hello, host: str, frames: FrameStream) -> None:
        older = self._scopes.get(hello.id)
        if older is not None:
            # Ids are told to neighbours: whoever knows one could cut its owner off.
            if not hello.key or not hmac.compare_digest(hello.key.encode(), self._keys[hello.id].encode()):
                self.refused["id"] += 1
                _log.warning("peer refused: host=%s says the id of another that is connected: id=%s", host, hello.id)
                return
            older.cancel()
        if hello.address and not usable_address(hello.address, host):
            self.refused["address"] += 1
            _log.warning(
                "peer says an address that is not passed on: id=%s said=%.100r, taken instead: %s; see --peer-address",
                hello.id, hello.address, host,
            )  # fmt: skip
        send, receive = trio.open_memory_channel[FromScheduler](_QUEUE)
        async with trio.open_nursery() as nursery:
            self._scopes[hello.id] = nursery.cancel_scope
            self._keys[hello.id] = hello.key
            self._outboxes[hello.id] = send
            try:
                self._deliver(self._timed("connect", lambda: self.engine.connect(hello, host, self._now())))
                _log.info("peer connected: id=%s host=%s port=%d kind=%s", hello.id, host, hello.port, hello.kind.name)
                await frames.send(encode(Welcome(VERSION, HEARTBEAT_S)))
                nursery.start_soon(_write, frames, receive)
                due = trio.current_time()
                while (body := await frames.receive()) is not None:
                    weight = 1 + len(body) // _HEAVY
                    due = max(due, trio.current_time() - _BURST / MESSAGES_PER_S) + weight / MESSAGES_PER_S
                    if due > trio.current_time():
                        await trio.sleep_until(due)
                    message = decode_from_peer(body)
                    self._count(hello.id, message)
                    handle = partial(self.engine.handle, hello.id, message, self._now())
                    self._deliver(self._timed(kind_of(message), handle))
                nursery.cancel_scope.cancel()
            finally:
                if self._outboxes.get(hello.id) is send:
                    del self._outboxes[hello.id], self._scopes[hello.id], self._keys[hello.id]
                    self._deliver(self._timed("disconnect", lambda: self.engine.disconnect(hello.id, self._now())))
                    _log.info("peer gone: id=%s host=%s", hello.id, host)

    def _deliver(self, out: Out) -> None:
        for peer, message in out:
            outbox = self._outboxes.get(peer)
            if outbox is None:
                continue
            try:
                outbox.send_nowait(message)
                self.messages_out[kind_of(message)] += 1
                self._note(peer, message)
            except trio.WouldBlock:
                self.counters["overflows"] += 1
                _log.warning("peer does not read and is cut off: id=%s", peer)
                self._scopes[peer].cancel()

    def _count(self, peer: str, message: FromPeer) -> None:
        self.messages_in[kind_of(message)] += 1
        if isinstance(message, Report):
            what = message.what.name.lower()
            self.complaints[what] += 1
            _log.debug("complaint: peer=%s task=%s about=%s what=%s", peer, _short(message.task), message.peer, what)
        elif isinstance(message, Ask):
            _log.debug(
                "asked: peer=%s task=%s groups=%s urgent=%s", peer, _short(message.task), message.groups, message.urgent
            )
        elif isinstance(message, Failed):
            _log.debug("lease given back: peer=%s task=%s groups=%s", peer, _short(message.task), message.groups)
        elif isinstance(message, Join | Leave):
            _log.debug("%s: peer=%s task=%s", kind_of(message), peer, _short(message.task))

    def _note(self, peer: str, message: FromScheduler) -> None:
        """Count and log what was decided."""
        if isinstance(message, Answer):
            for ruling in message.rulings:
                verdict = ruling.verdict.name.lower()
                self.rulings[verdict] += 1
                other = ruling.peer.id if ruling.peer else "-"
                _log.debug("ruling: peer=%s group=%d verdict=%s parent=%s", peer, ruling.group, verdict, other)
        elif isinstance(message, Order):
            self.rulings["order"] += 1
            _log.debug("lease granted: peer=%s task=%s group=%d", peer, _short(message.task), message.group)
        elif isinstance(message, Revoke):
            _log.debug("lease ended: peer=%s task=%s groups=%s", peer, _short(message.task), message.groups)
        elif isinstance(message, Neighbours):
            others = [contact.id for contact in message.peers]
            _log.debug("introduced: peer=%s task=%s to=%s", peer, _short(message.task), others)
        elif isinstance(message, Fill):
            _log.debug("fill ordered: peer=%s image=%s", peer, message.image)

    def _timed(self, event: str, act: Callable[[], Out]) -> Out:
        started = time.perf_counter()
        out = act()
        self.engine_s[event] += time.perf_counter() - started  # type: ignore[assignment]
        return out

    async def _tick(self) -> None:
        while True:
            await trio.sleep(_TICK_S)
            started = time.perf_counter()
            out, silent = self.engine.tick(self._now())
            self.engine_s["tick"] += time.perf_counter() - started  # type: ignore[assignment]
            for peer, message in out:
                if isinstance(message, Revoke):
                    self.counters["expired"] += len(message.groups)
                    _log.debug("lease expired: peer=%s task=%s groups=%s", peer, _short(message.task), message.groups)
            self._deliver(out)
            for peer in silent:
                _log.info("peer is silent: id=%s", peer)
                if peer in self._scopes:
                    self._scopes[peer].cancel()
            self._deliver([(peer, Ping()) for peer in self._outboxes])

    # ---- HTTP ----------------------------------------------------------------------------------------------------

    async def _admin(self, request: Request) -> Page:
        if request.path == "/healthz":
            return Page(200, b"ok\n", {"Content-Type": "text/plain"})
        if request.path == "/metrics":
            text = await trio.to_thread.run_sync(render, SCHEDULER, self._figures())
            return Page(200, text, {"Content-Type": CONTENT_TYPE})
        if request.path == "/swarm":
            return Page(
                200, json.dumps(self.describe(), indent=1).encode() + b"\n", {"Content-Type": "application/json"}
            )
        return Page(404, b"/healthz, /metrics, /swarm\n", {"Content-Type": "text/plain"})

    def _figures(self) -> Values:
        engine, now = self.engine, self._now()
        return {
            "rafs_scheduler_peers": Counter(peer.contact.kind.name.lower() for peer in engine.peers.values()),
            "rafs_scheduler_peers_banned": len(engine.banned(now)),
            "rafs_scheduler_tasks": len(engine.tasks),
            "rafs_scheduler_leases": sum(len(task.leases) for task in engine.tasks.values()),
            "rafs_scheduler_leases_expired": self.counters["expired"],
            "rafs_scheduler_messages_in": self.messages_in.copy(),
            "rafs_scheduler_messages_out": self.messages_out.copy(),
            "rafs_scheduler_rulings": self.rulings.copy(),
            "rafs_scheduler_complaints": self.complaints.copy(),
            "rafs_scheduler_engine_seconds": {event: round(spent, 6) for event, spent in self.engine_s.items()},
            "rafs_scheduler_queue_overflows": self.counters["overflows"],
            "rafs_scheduler_refused": self.refused.copy(),
            "rafs_scheduler_preheats": len(engine.preheats),
            "rafs_scheduler_memory_bytes": _rss_bytes(),
        }

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
            "files": {
                key.hex(): {
                    "length": file.plan.length,
                    "sections": file.plan.sections,
                    "pinned": len(file.pinned),
                    "leases": {str(section): lease.peer for section, lease in file.leases.items()},
                }
                for key, file in self.engine.pins.files.items()
            },
        }


def kind_of(message: FromPeer | FromScheduler) -> str:
    """Return the name of a message's kind, one of a few."""
    return type(message).__name__.lower()


def _short(task: bytes) -> str:
    return task.hex()[:16]


def _rss_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _contact(contact: Contact) -> dict[str, Any]:
    return {"host": contact.host, "port": contact.port, "kind": contact.kind.name.lower()}


async def _write(frames: FrameStream, outbox: trio.MemoryReceiveChannel[FromScheduler]) -> None:
    async for message in outbox:
        try:
            frame = encode(message)
        except FormatError as error:
            _log.error("message cannot be sent: %s", error)
            continue
        with trio.move_on_after(_UNREAD_S) as scope:
            await frames.send(frame)
        if scope.cancelled_caught:
            raise UnavailableError(f"it has taken nothing for {_UNREAD_S:g} s")
