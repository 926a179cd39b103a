"""Connections to the schedulers: one each, for ever made anew, and which of them looks after a task.

Decided here: backoff, silence that counts as death, and rendezvous hashing: each task belongs to the scheduler whose hash with it is
highest among those connected, so all peers that see the same schedulers agree, and a task falls through to the next when its own is gone.
A name that lists several addresses is several schedulers (docs/protocol/swarm.md); it is asked again from time to time. The hash is of
the address, not of the name, so peers agree whatever they call it.

Concurrency: one task per name follows it and owns one per scheduler, which runs `_keep`; in it a reader, a writer and a heartbeat. `send`
has no checkpoint: it puts a message in a queue of bounded length, and a scheduler that does not take them is dropped. `ask` waits for an
answer, at most ASK_S.
"""

from __future__ import annotations

import ipaddress
import itertools
import logging
import random
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import trio
from blake3 import blake3

from rafsfs.errors import RafsError, UnavailableError, UsageError
from rafsfs.net.tls import explain_tls_failure

from .protocol.frames import FrameStream
from .protocol.messages import (
    VERSION,
    Answer,
    Ask,
    FromPeer,
    FromScheduler,
    Hello,
    Ping,
    Ruling,
    Welcome,
    decode_from_scheduler,
    encode,
)

_log = logging.getLogger(__name__)

ASK_S: Final = 3.0
_CONNECT_S: Final = 5.0
_SILENT_S: Final = 15.0
"""A scheduler pings every second; one that says nothing for this long is gone."""
_QUEUE: Final = 4096
_RESOLVE_S: Final = 20.0
_MISSED: Final = 3
"""A scheduler is given up when its name has not listed it so many times in a row: some name servers answer with a part each time."""
MOST_SCHEDULERS: Final = 16
"""Of one name."""
_BACKOFF_S: Final = (0.1, 0.3, 1.0, 2.0, 5.0)


@dataclass(slots=True, eq=False)
class Link:
    """One scheduler."""

    host: str
    port: int
    name: str = ""
    """What its certificate must be for; also what is dialled if `is_sole`."""
    is_sole: bool = True
    """Whether the name has no other address of the same family: then the name is dialled, by whichever family works."""
    outbox: trio.MemorySendChannel[FromPeer] | None = None
    asked: dict[int, trio.Event] = field(default_factory=dict)
    answers: dict[int, list[Ruling]] = field(default_factory=dict)
    open: dict[int, bytes] = field(default_factory=dict)
    """Of questions that have not been answered, whether anybody still waits or not, the task."""

    @property
    def address(self) -> str:
        """`HOST:PORT`."""
        return f"{self.host}:{self.port}"

    @property
    def is_up(self) -> bool:
        """Whether it is connected."""
        return self.outbox is not None


def parse_addresses(text: str) -> list[tuple[str, int]]:
    """Return the schedulers that `HOST:PORT[,HOST:PORT...]` names. Raises UsageError."""
    found = []
    for part in filter(None, (one.strip() for one in text.split(","))):
        host, colon, port = part.rpartition(":")
        if not colon or not port.isdigit() or not 0 < int(port) < 65536 or not host.strip("[]"):
            raise UsageError(f"scheduler {part!r} is not of the form HOST:PORT")
        found.append((host.strip("[]"), int(port)))
    if not found:
        raise UsageError("no scheduler is named, expected HOST:PORT[,HOST:PORT...]")
    return found


def pick_family(found: list[tuple[int, str]]) -> list[str]:
    """Return the addresses of one family, sorted: a machine with addresses of both is one scheduler, not two.

    Pure. IPv4 if there is any: peers must choose alike, whatever their own addresses are.
    """
    for family in (socket.AF_INET, socket.AF_INET6):
        addresses = sorted({address for its, address in found if its == family})
        if addresses:
            return addresses[:MOST_SCHEDULERS]
    return []


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def dial(host: str, port: int, tls: ssl.SSLContext | None, *, name: str = "") -> trio.abc.Stream:
    """Connect to a scheduler, whose certificate must be for `name`, by default the host. Raises OSError, RemoteError."""
    stream = await trio.open_tcp_stream(host, port)
    if tls is None:
        return stream
    wire = trio.SSLStream(stream, tls, server_hostname=name or host, https_compatible=True)
    try:
        await wire.do_handshake()
    except trio.BrokenResourceError as error:
        await trio.aclose_forcefully(stream)
        raise _in_words(error, f"{host}:{port}") from error
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return wire


def _in_words(error: BaseException, address: str) -> RafsError:
    """Return what is wrong with TLS, or that the connection is: a refusal of our certificate comes with the first read."""
    told = explain_tls_failure(error, f"the scheduler {address}")
    return told or UnavailableError(
        f"the scheduler {address} ended the connection; does it accept the certificate of this node (--swarm-cert), and the token?"
    )


class Links:
    """All schedulers of a node."""

    def __init__(
        self,
        hello: Hello,
        received: Callable[[Link, FromScheduler], None],
        answered: Callable[[Link, bytes, list[Ruling]], None],
        connected: Callable[[Link], None],
        lost: Callable[[Link], None],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._hello = hello
        self._received = received
        self._answered = answered
        self._connected = connected
        self._lost = lost
        self._tls = tls
        self._unresolved: set[str] = set()
        self.links: list[Link] = []
        self._numbers = itertools.count(1)

    async def follow(self, name: str, port: int) -> None:
        """Stay connected for ever to all schedulers that a name lists, or to the one at an address."""
        scopes: dict[str, trio.CancelScope] = {}
        links: dict[str, Link] = {}
        missed: dict[str, int] = {}
        async with trio.open_nursery() as nursery:
            while True:
                found = await self._resolve(name, port)
                for address in found:
                    if address not in links:
                        links[address] = Link(address, port, name)
                        scopes[address] = trio.CancelScope()
                        nursery.start_soon(self._keep, links[address], scopes[address])
                missed = {address: missed.get(address, 0) + 1 for address in links if address not in found}
                gone = [address for address, times in missed.items() if found and times >= _MISSED]
                for address in gone:
                    _log.info("scheduler %s is not listed by %s any more", links.pop(address).address, name)
                    scopes.pop(address).cancel()
                    del missed[address]
                for link in links.values():
                    link.is_sole = len(links) == 1
                if _is_address(name):
                    await trio.sleep_forever()
                await trio.sleep((_RESOLVE_S if found else _BACKOFF_S[-1]) * random.uniform(0.75, 1.25))

    async def _resolve(self, name: str, port: int) -> list[str]:
        """Return the addresses of a name, none if it cannot be told."""
        if _is_address(name):
            return [name]
        found: list[Any] = []
        try:
            with trio.move_on_after(_CONNECT_S):
                found = await trio.socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        except OSError as error:
            level = logging.DEBUG if name in self._unresolved else logging.WARNING
            _log.log(level, "scheduler %s:%d: the name cannot be resolved: %s", name, port, error)
            self._unresolved.add(name)
        if found:
            self._unresolved.discard(name)
        return pick_family([(family, str(address[0])) for family, _, _, _, address in found])

    async def _keep(self, link: Link, scope: trio.CancelScope) -> None:
        """Stay connected to one scheduler until the scope is cancelled."""
        with scope:
            await self._stay(link)

    async def _stay(self, link: Link) -> None:
        self.links.append(link)
        attempt = 0
        try:
            while True:
                started = trio.current_time()
                try:
                    await self._run(link)
                except* (RafsError, OSError) as group:
                    level = logging.WARNING if attempt == 0 else logging.DEBUG
                    _log.log(level, "scheduler %s is not reachable: %s", link.address, group.exceptions[0])
                if trio.current_time() - started > _SILENT_S:
                    attempt = 0
                await trio.sleep(_BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)] * random.uniform(0.5, 1.5))
                attempt += 1
        finally:
            self.links.remove(link)

    def home(self, task: bytes) -> Link | None:
        """Return the scheduler that looks after a task, None if none is connected."""
        up = [link for link in self.links if link.is_up]
        return max(up, key=lambda link: blake3(link.address.encode() + task).digest(), default=None)

    def send(self, link: Link | None, message: FromPeer) -> bool:
        """Queue a message; return False if the scheduler is away. No checkpoint."""
        if link is None or link.outbox is None:
            return False
        try:
            link.outbox.send_nowait(message)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        return True

    async def ask(self, task: bytes, groups: list[int], *, urgent: bool, again: int) -> list[Ruling] | None:
        """Return what a task's scheduler rules, None if there is none or it does not answer."""
        link = self.home(task)
        number = next(self._numbers)
        if link is None:
            return None
        event = link.asked[number] = trio.Event()
        try:
            if not self.send(link, Ask(number, task, groups, urgent, again)):
                return None
            link.open[number] = task
            with trio.move_on_after(ASK_S):
                await event.wait()
            return link.answers.pop(number, None)
        finally:
            link.asked.pop(number, None)
            link.answers.pop(number, None)

    async def _run(self, link: Link) -> None:
        with trio.move_on_after(_CONNECT_S) as scope:
            stream = await dial(link.name if link.is_sole else link.host, link.port, self._tls, name=link.name)
        if scope.cancelled_caught:
            raise UnavailableError(f"no connection within {_CONNECT_S:g} s")
        frames = FrameStream(stream)
        send, receive = trio.open_memory_channel[FromPeer](_QUEUE)
        try:
            try:
                await frames.send(encode(self._hello))
                heartbeat = await self._welcome(frames)
            except UnavailableError as error:
                if self._tls is not None:
                    raise _in_words(error, link.address) from error
                raise
            async with trio.open_nursery() as nursery:
                link.outbox = send
                nursery.start_soon(_write, frames, receive)
                nursery.start_soon(self._beat, link, heartbeat)
                _log.info("scheduler connected: %s", link.address)
                self._connected(link)
                await self._read(link, frames)
                nursery.cancel_scope.cancel()
        finally:
            if link.outbox is not None:
                link.outbox = None
                self._lost(link)
            link.open.clear()
            for event in link.asked.values():
                event.set()
            with trio.CancelScope(shield=True):
                await frames.aclose()

    async def _welcome(self, frames: FrameStream) -> float:
        message = None
        with trio.move_on_after(_CONNECT_S):
            body = await frames.receive()
            message = decode_from_scheduler(body) if body is not None else None
        if not isinstance(message, Welcome) or message.version != VERSION:
            raise UnavailableError("it does not welcome this peer: is the token right, and the version?")
        return max(0.1, message.heartbeat_s)

    async def _read(self, link: Link, frames: FrameStream) -> None:
        while True:
            with trio.move_on_after(_SILENT_S) as scope:
                body = await frames.receive()
            if scope.cancelled_caught:
                raise UnavailableError(f"silent for {_SILENT_S:g} s")
            if body is None:
                raise UnavailableError("it closed the connection")
            message = decode_from_scheduler(body)
            if isinstance(message, Answer):
                task = link.open.pop(message.number, None)
                if task is not None:
                    self._answered(link, task, message.rulings)
                event = link.asked.get(message.number)
                if event is not None:
                    link.answers[message.number] = message.rulings
                    event.set()
            elif not isinstance(message, Ping):
                self._received(link, message)

    async def _beat(self, link: Link, heartbeat_s: float) -> None:
        while True:
            await trio.sleep(heartbeat_s)
            self.send(link, Ping())


async def _write(frames: FrameStream, outbox: trio.MemoryReceiveChannel[FromPeer]) -> None:
    async for message in outbox:
        with trio.move_on_after(_SILENT_S) as scope:
            await frames.send(encode(message))
        if scope.cancelled_caught:
            raise UnavailableError(f"it has taken nothing for {_SILENT_S:g} s")
