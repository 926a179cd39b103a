"""The peer of a node: takes chunks from neighbours, gives them what it has, and asks the scheduler who fetches what nobody has.

Implements `rafsfs.interfaces.Swarm`, which the fetch pipeline asks. Decided here: the order local → neighbours → lease, how long to wait
for somebody else's fetch, and what happens without a scheduler. docs/protocol/swarm.md.

Concurrency: one trio run, all state changes between checkpoints, no locks. Tasks in the nursery of `run`: the upload server, one per
scheduler, one per neighbour and task that listens to its have-map, the tick. `obtain` runs in tasks of the fetcher. A chunk that waits
for a neighbour is remembered in `_Task.waiting` and given back through `requeue`, when it is at a neighbour or WAIT_S have passed; the
tick sees to the latter, so nothing waits for ever. Cancelled, `obtain` leaves leases as they are: the tick lets those without progress
run out.
"""

from __future__ import annotations

import logging
import random
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from rafsfs.errors import CacheError, FormatError, IntegrityError, RemoteError, UnavailableError, UsageError
from rafsfs.fetch.buffers import BufferPool
from rafsfs.interfaces import Obtained
from rafsfs.net.http1 import HttpPool
from rafsfs.net.http_server import HttpServer
from rafsfs.net.origin import Origin
from rafsfs.store.cache import Cache
from rafsfs.store.data_space import DataSpace

from .link import Link, Links, parse_addresses
from .neighbour import AbsentError, BusyError, Neighbour, Peer
from .pace import UploadPace
from .protocol.groups import group_count, group_of, pack_bits
from .protocol.messages import (
    VERSION,
    Complaint,
    Contact,
    Done,
    Failed,
    Fill,
    Filled,
    FromScheduler,
    Hello,
    Join,
    Kind,
    Leave,
    Neighbours,
    Order,
    Progress,
    Report,
    Revoke,
    Verdict,
)
from .selection import Run, assign, rarest_first
from .upload import Uploads

_log = logging.getLogger(__name__)

WAIT_S: Final = 2.0
"""How long to wait for what somebody else fetches before asking again."""
LATER_S: Final = 0.25
"""How long to wait when enough leases are out."""
_TICK_S: Final = 0.1
_RENEW_S: Final = 3.0
_REST_S: Final = 1.0
"""A neighbour that was busy or stalled is not asked for this long, if others have the chunk."""
_BRIEF_S: Final = 0.2
"""A holder that rests for less than this is waited for without asking the scheduler."""
_ALONE: Final = 2
"""Reads of the registry at once while no scheduler can be reached."""
_ROUNDS: Final = 3
_BUFFERS: Final = 32 << 20
_RETRY_S: Final = (0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True, slots=True)
class SwarmSettings:
    """How a node takes part."""

    scheduler: str = ""
    """`HOST:PORT[,HOST:PORT...]`; empty: none yet, one may be named later."""
    host: str = "0.0.0.0"  # noqa: S104 - a service for other machines
    port: int = 0
    address: str = ""
    """How others reach this node; empty: as the scheduler sees it."""
    seed: bool = False
    zone: str = ""
    rack: str = ""
    token: str = field(default="", repr=False)
    upload_bytes_per_s: float = 0
    """Of all uploads; 0: no limit."""


@dataclass(slots=True, eq=False)
class _Task:
    """A data space in the swarm."""

    space: DataSpace
    image: str
    groups: int
    neighbours: dict[str, Neighbour] = field(default_factory=dict)
    leases: dict[int, float] = field(default_factory=dict)
    """Of groups that are ours to fetch, when a chunk of them landed last."""
    waiting: dict[int, float] = field(default_factory=dict)
    """Of chunks that wait for a neighbour, until when."""
    joined: str = ""
    """Address of the scheduler that knows of us."""
    finished: set[int] = field(default_factory=set)
    """Groups complete here and announced."""
    news: list[int] = field(default_factory=list)

    def chunks_of(self, group: int) -> range:
        """Return the chunks that start in a group."""
        table = self.space.table
        start = group << 22
        return range(_first_at(self.space, start), _first_at(self.space, start + (1 << 22)))[: table.count]


class SwarmPeer:
    """The peer. Made by `open_swarm`."""

    def __init__(self, cache: Cache, settings: SwarmSettings, rng: random.Random, ssl_context: ssl.SSLContext) -> None:
        self._cache = cache
        self._settings = settings
        self._rng = rng
        self.id = f"{rng.getrandbits(64):016x}"
        self._tasks: dict[bytes, _Task] = {}
        self._peers: dict[str, Peer] = {}
        self._links: Links | None = None
        self._named: set[tuple[str, int]] = set()
        self._nursery: trio.Nursery | None = None
        self._started = trio.Event()
        self._headers = {"Authorization": f"Bearer {settings.token}"} if settings.token else {}
        self._pool = HttpPool(
            ssl_context=ssl_context, timeout_s=10.0, connections=64, use_proxies=False, user_agent="rafs-peer"
        )
        self._buffers = BufferPool(_BUFFERS)
        self._uploads = Uploads(cache.opened_space, self._pending, settings.token)
        self._alone = trio.CapacityLimiter(_ALONE)
        self.counters: Counter[str] = Counter()
        self.port = 0
        self.requeue: Callable[[bytes, int], None] = lambda space_id, chunk: None
        """Called with a chunk that has waited long enough, or is at a neighbour now. No checkpoint."""
        self.fill_group: Callable[[bytes, list[int]], None] = lambda space_id, chunks: None
        """Called with chunks that are ours to fetch, whether somebody here reads them or not. No checkpoint."""
        self.fill_image: Callable[[str, Callable[[int, int, str], None]], None] = lambda image, report: None
        """Called with an image that is to be fetched whole. No checkpoint."""

    # ---- life ----------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part for ever. Listens only when a scheduler has been named."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._tick)
            if self._settings.scheduler:
                await self.use(self._settings.scheduler)
            task_status.started()
            await trio.sleep_forever()

    async def use(self, schedulers: str) -> None:
        """Take part in the swarm of these schedulers, besides others named before. Raises UsageError."""
        addresses = parse_addresses(schedulers)
        assert self._nursery is not None
        if self._links is None:
            self._links = Links(Hello(0, self.id, 0, Kind.PEER), self._received, self._connected, self._lost)
            server = HttpServer(self._uploads.handle, pace=UploadPace(self._settings.upload_bytes_per_s))
            try:
                self.port = await self._nursery.start(server.serve, self._settings.host, self._settings.port)
            except OSError as error:
                self._links = None
                where = f"{self._settings.host}:{self._settings.port}"
                raise UsageError(f"other nodes cannot be listened to on {where}: {error}; see --peer-listen") from error
            kind = Kind.SEED if self._settings.seed else Kind.PEER
            settings = self._settings
            hello = Hello(
                VERSION, self.id, self.port, kind, settings.zone, settings.rack, settings.token, settings.address
            )
            self._links = Links(hello, self._received, self._connected, self._lost)
            _log.info("peer started: id=%s port=%d kind=%s", self.id, self.port, kind.name)
            self._started.set()
        await self._started.wait()
        for address in addresses:
            if address not in self._named:
                self._named.add(address)
                self._nursery.start_soon(self._links.keep, *address)

    def close(self) -> None:
        """Let go of idle connections."""
        self._pool.close()

    # ---- what the fetch pipeline asks ----------------------------------------------------------------------------

    @property
    def is_active(self) -> bool:
        """Whether a scheduler has been named."""
        return self._links is not None

    def enter(self, space: DataSpace, image: str) -> None:
        """Take part in the task of a data space, with what is here of it. No checkpoint."""
        task = self._tasks.get(space.space_id)
        if task is None:
            task = self._tasks[space.space_id] = _Task(space, image, group_count(space.size))
            task.finished = {group for group in range(task.groups) if self._is_complete(task, group)}
        if task.joined or self._links is None:
            return
        self._join(task)

    def leave(self, space_id: bytes) -> None:
        """Take part no longer. No checkpoint."""
        task = self._tasks.pop(space_id, None)
        if task is not None and task.joined and self._links is not None:
            self._links.send(self._links.home(space_id), Leave(space_id))

    async def obtain(
        self, space: DataSpace, chunks: list[int], *, urgent: bool, landed: Callable[[int, str], None]
    ) -> Obtained:
        """Get chunks from neighbours, `landed` with each; say which of the rest are ours to fetch and which will be asked for again."""
        task = self._tasks.get(space.space_id)
        if task is None or not self.is_active:
            return Obtained(chunks, [])
        ours: list[int] = []
        for attempt in range(_ROUNDS):
            missing = [chunk for chunk in space.missing(chunks) if chunk not in ours]
            offers = {n.id: n.offer() for n in self._willing(task)}
            runs, _ = assign(missing, offers, lambda chunk: space.table.extent(chunk)[1], self._rng)
            async with trio.open_nursery() as nursery:
                for run in runs:
                    nursery.start_soon(self._take, task, run, landed)
            missing = [chunk for chunk in space.missing(chunks) if chunk not in ours]
            if not missing:
                return Obtained(ours, [])
            if runs and attempt < _ROUNDS - 1:
                continue
            until = await self._rule(task, missing, ours, urgent=urgent)
            # While the scheduler was asked, a neighbour may have announced what nobody had before.
            if attempt == _ROUNDS - 1 or not any(n.have[chunk] for n in self._willing(task) for chunk in until):
                break
        waiting = space.missing(until)
        for chunk in waiting:
            task.waiting[chunk] = until[chunk]
        return Obtained(space.missing(ours), waiting)

    def landed(self, space_id: bytes, chunk: int) -> None:
        """A chunk has come, from wherever: tell neighbours, and the scheduler when a group is complete. No checkpoint."""
        task = self._tasks.get(space_id)
        if task is None:
            return
        self._uploads.landed(space_id, chunk)
        task.waiting.pop(chunk, None)
        group = group_of(task.space.table.extent(chunk)[0])
        if group in task.leases:
            task.leases[group] = trio.current_time()
        if group not in task.finished and self._is_complete(task, group):
            task.finished.add(group)
            was_ours = task.leases.pop(group, None) is not None
            task.news.append(group)
            if was_ours:
                self._tell_news(task)
                self._uploads.set_pending(space_id, list(task.leases))

    def gave_up(self, space_id: bytes, chunks: Iterable[int], cause: str) -> None:
        """The registry did not give these: their leases go back. No checkpoint."""
        task = self._tasks.get(space_id)
        if task is None or self._links is None:
            return
        groups = sorted({group_of(task.space.table.extent(chunk)[0]) for chunk in chunks} & task.leases.keys())
        if groups:
            for group in groups:
                task.leases.pop(group, None)
            self._links.send(self._links.home(space_id), Failed(space_id, groups, cause[:400]))
            self._uploads.set_pending(space_id, list(task.leases))

    def order(self, space: DataSpace, batches: list[list[int]]) -> list[list[int]]:
        """Return batches of chunks in the order in which to prefetch them: what is rare among neighbours first."""
        task = self._tasks.get(space.space_id)
        if task is None or not self.is_active or not batches:
            return batches
        maps = [n.have for n in self._willing(task)]
        ranked = rarest_first(range(len(batches)), lambda n: sum(have[batches[n][0]] for have in maps), self._rng)
        return [batches[n] for n in ranked]

    @asynccontextmanager
    async def guard(self) -> AsyncIterator[None]:
        """Held while the registry is read: without any scheduler, only few do so at once."""
        if self._links is None or any(link.is_up for link in self._links.links):
            yield
            return
        async with self._alone:
            yield

    def describe(self) -> dict[str, Any]:
        """Return what `rafs status` shows."""
        return {
            "id": self.id,
            "port": self.port,
            "schedulers": {link.address: link.is_up for link in self._links.links} if self._links else {},
            "seed": self._settings.seed,
            "peers": {
                peer.contact.id: {"address": peer.origin.netloc, "bytes": peer.bytes_got, "banned": peer.banned}
                for peer in self._peers.values()
            },
            "uploaded_bytes": self._uploads.counters["bytes"],
            "counters": dict(self.counters),
            "tasks": {
                task.space.space_id.hex(): {"neighbours": len(task.neighbours), "leases": sorted(task.leases)}
                for task in self._tasks.values()
            },
        }

    # ---- chunks --------------------------------------------------------------------------------------------------

    def _willing(self, task: _Task) -> list[Neighbour]:
        now = trio.current_time()
        return [n for n in task.neighbours.values() if n.listening and not n.peer.banned and n.peer.rests_until <= now]

    async def _take(self, task: _Task, run: Run, landed: Callable[[int, str], None]) -> None:
        """Get one run from its neighbour; what does not come is tried elsewhere by the caller."""
        neighbour = task.neighbours.get(run.peer)
        if neighbour is None:
            return
        try:
            await neighbour.fetch(
                run, self._pool, self._headers, self._buffers, task.space.store, lambda chunk: landed(chunk, "peer")
            )
        except* IntegrityError as group:
            neighbour.peer.banned = True
            self.counters["corrupt"] += 1
            _log.warning(
                "peer gave a wrong chunk and is not asked again: peer=%s address=%s space=%s cause=%s",
                neighbour.id, neighbour.peer.origin.netloc, task.space.space_id.hex()[:16], group.exceptions[0],
            )  # fmt: skip
            self._report(task, neighbour, Complaint.CORRUPT)
        except* BusyError:
            self.counters["busy"] += 1
            neighbour.peer.rests_until = trio.current_time() + 0.05 + 0.1 * self._rng.random()
        except* AbsentError:
            neighbour.have[run.first] = 0
        except* CacheError as group:
            raise group.exceptions[0] from None
        except* (UnavailableError, RemoteError) as group:
            self.counters["stalled"] += 1
            neighbour.peer.rests_until = trio.current_time() + _REST_S
            _log.debug("peer did not deliver: peer=%s cause=%s", neighbour.id, group.exceptions[0])

    async def _rule(self, task: _Task, missing: list[int], ours: list[int], *, urgent: bool) -> dict[int, float]:
        """Divide what no neighbour gave: add to `ours` what is to be fetched here, return until when to wait for the rest."""
        now = trio.current_time()
        space_id = task.space.space_id
        until: dict[int, float] = {}
        open_: dict[int, list[int]] = {}
        pending = {group for n in self._willing(task) for group in n.pending}
        for chunk in missing:
            group = group_of(task.space.table.extent(chunk)[0])
            again = self._rest_of_holders(task, chunk)
            if group in task.leases:
                ours.append(chunk)
            elif again is not None and again - now < _BRIEF_S:
                until[chunk] = again
            elif group in pending and chunk not in task.waiting:
                until[chunk] = now + WAIT_S
            else:
                open_.setdefault(group, []).append(chunk)
        if not open_:
            return until
        assert self._links is not None
        rulings = await self._links.ask(space_id, sorted(open_), urgent=urgent)
        if rulings is None:
            self.counters["unruled"] += 1
            ours += [chunk for chunks in open_.values() for chunk in chunks]
            return until
        granted = False
        now = trio.current_time()
        for ruling in rulings:
            chunks = open_.pop(ruling.group, [])
            if ruling.verdict is Verdict.LEASE:
                task.leases[ruling.group] = now
                granted = True
                ours += chunks
                rest = task.space.missing(task.chunks_of(ruling.group))
                self.fill_group(space_id, [chunk for chunk in rest if chunk not in chunks])
                continue
            if ruling.peer is not None:
                self._meet(task, ruling.peer)
            later = LATER_S * (0.5 + self._rng.random())
            for chunk in chunks:
                again = self._rest_of_holders(task, chunk)
                until[chunk] = now + (later if ruling.verdict is Verdict.LATER else WAIT_S)
                if again is not None:  # its holder only rests: nothing will be announced that is not known
                    until[chunk] = min(until[chunk], again)
        for chunks in open_.values():  # not ruled upon: the scheduler does not know us yet
            for chunk in chunks:
                until[chunk] = now + LATER_S
        if granted:
            self._uploads.set_pending(space_id, list(task.leases))
        return until

    def _rest_of_holders(self, task: _Task, chunk: int) -> float | None:
        """Return when a neighbour that has a chunk may be asked again, None if no neighbour has it."""
        return min(
            (
                n.peer.rests_until
                for n in task.neighbours.values()
                if n.listening and not n.peer.banned and n.have[chunk]
            ),
            default=None,
        )

    def _is_complete(self, task: _Task, group: int) -> bool:
        return not task.space.missing(task.chunks_of(group))

    def _pending(self, space_id: bytes) -> list[int]:
        task = self._tasks.get(space_id)
        return list(task.leases) if task else []

    # ---- neighbours ----------------------------------------------------------------------------------------------

    def _meet(self, task: _Task, contact: Contact) -> None:
        """Make somebody a neighbour. No checkpoint."""
        if contact.id == self.id or contact.id in task.neighbours or self._nursery is None or not contact.port:
            return
        peer = self._peers.get(contact.id)
        if peer is None or peer.contact != contact:
            peer = self._peers[contact.id] = Peer(contact, Origin("http", contact.host.lower(), contact.port))
        if peer.banned:
            return
        neighbour = Neighbour(peer, task.space, bytearray(task.space.table.count))
        task.neighbours[contact.id] = neighbour
        self._nursery.start_soon(self._listen, task, neighbour)

    async def _listen(self, task: _Task, neighbour: Neighbour) -> None:
        """Listen to a neighbour until it is gone for good, or nothing is wanted of it."""
        attempt = 0

        def up() -> None:
            nonlocal attempt
            attempt = 0

        try:
            while attempt < len(_RETRY_S) and not task.space.complete and not neighbour.peer.banned:
                try:
                    await neighbour.listen(self._pool, self._headers, lambda n, fresh: self._came(task, n, fresh), up)
                except (UnavailableError, RemoteError, FormatError) as error:
                    _log.debug("neighbour is silent: peer=%s cause=%s", neighbour.id, error)
                    self._wake(task)
                await trio.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)] * self._rng.uniform(0.5, 1.5))
                attempt += 1
            if not task.space.complete:
                self._report(task, neighbour, Complaint.UNREACHABLE)
        finally:
            if task.neighbours.get(neighbour.id) is neighbour:
                del task.neighbours[neighbour.id]

    def _came(self, task: _Task, neighbour: Neighbour, fresh: list[int]) -> None:
        """A neighbour has more: what waits for it goes on. No checkpoint."""
        for chunk in fresh:
            if chunk in task.waiting:
                del task.waiting[chunk]
                self.requeue(task.space.space_id, chunk)

    def _wake(self, task: _Task) -> None:
        """Somebody is gone: what waits asks again."""
        for chunk in list(task.waiting):
            task.waiting[chunk] = 0.0

    def _report(self, task: _Task, neighbour: Neighbour, what: Complaint) -> None:
        if self._links is not None:
            self._links.send(self._links.home(task.space.space_id), Report(task.space.space_id, neighbour.id, what))

    # ---- scheduler -----------------------------------------------------------------------------------------------

    def _join(self, task: _Task) -> None:
        assert self._links is not None
        link = self._links.home(task.space.space_id)
        if link is None:
            return
        have = pack_bits(task.finished, task.groups)
        if self._links.send(link, Join(task.space.space_id, task.groups, task.image, have)):
            task.joined = link.address
            task.news.clear()

    def _connected(self, link: Link) -> None:
        """A scheduler has come: tasks that belong to it move there."""
        assert self._links is not None
        for task in self._tasks.values():
            if self._links.home(task.space.space_id) is link:
                self._join(task)

    def _lost(self, link: Link) -> None:
        """A scheduler has gone: its tasks go to the next."""
        for task in self._tasks.values():
            if task.joined == link.address:
                task.joined = ""
                task.leases.clear()
                self._wake(task)
                if self._links is not None:
                    self._join(task)

    def _received(self, link: Link, message: FromScheduler) -> None:
        if isinstance(message, Neighbours):
            task = self._tasks.get(message.task)
            for contact in message.peers if task else ():
                assert task is not None
                if not task.space.complete:
                    self._meet(task, contact)
        elif isinstance(message, Order):
            self._take_order(link, message)
        elif isinstance(message, Revoke):
            task = self._tasks.get(message.task)
            if task:
                for group in message.groups:
                    task.leases.pop(group, None)
                self._uploads.set_pending(message.task, list(task.leases))
        elif isinstance(message, Fill):
            number = message.number

            def report(done: int, total: int, error: str) -> None:
                if number and self._links is not None:
                    self._links.send(link, Filled(number, done, total, error))

            self.fill_image(message.image, report)

    def _take_order(self, link: Link, message: Order) -> None:
        task = self._tasks.get(message.task)
        if task is None or message.group >= task.groups:
            assert self._links is not None
            self._links.send(link, Failed(message.task, [message.group], "this node does not know the task"))
            return
        missing = task.space.missing(task.chunks_of(message.group))
        if not missing:
            task.news.append(message.group)
            self._tell_news(task)
            return
        task.leases[message.group] = trio.current_time()
        self._uploads.set_pending(message.task, list(task.leases))
        self.fill_group(message.task, missing)

    def _tell_news(self, task: _Task) -> None:
        if not task.news or self._links is None:
            return
        if self._links.send(self._links.home(task.space.space_id), Done(task.space.space_id, task.news)):
            task.news = []

    async def _tick(self) -> None:
        """Give back what has waited long enough; announce; renew leases that move."""
        renewed = news = trio.current_time()
        while True:
            await trio.sleep(_TICK_S)
            now = trio.current_time()
            for task in list(self._tasks.values()):
                for chunk in [chunk for chunk, until in task.waiting.items() if until <= now]:
                    # Kept as an entry of the past: whoever waited once asks the scheduler the next time.
                    task.waiting[chunk] = now + 3600
                    self.requeue(task.space.space_id, chunk)
                if now - news > 0.5 and task.news:
                    self._tell_news(task)
                if now - renewed > _RENEW_S and task.leases and self._links is not None:
                    alive = [group for group, landed in task.leases.items() if now - landed < 2 * _RENEW_S]
                    if alive:
                        self._links.send(self._links.home(task.space.space_id), Progress(task.space.space_id, alive))
            if now - news > 0.5:
                news = now
            if now - renewed > _RENEW_S:
                renewed = now


def _first_at(space: DataSpace, offset: int) -> int:
    """Return the first chunk that starts at or behind `offset`."""
    table = space.table
    index = table.find(offset)
    return index + 1 if index < table.count and table.extent(index)[0] < offset else index


@asynccontextmanager
async def open_swarm(cache: Cache, settings: SwarmSettings) -> AsyncIterator[SwarmPeer]:
    """Run a peer until the block ends."""
    peer = SwarmPeer(cache, settings, random.Random(), ssl.create_default_context())
    async with trio.open_nursery() as nursery:
        await nursery.start(peer.run)
        try:
            yield peer
        finally:
            nursery.cancel_scope.cancel()
            peer.close()
