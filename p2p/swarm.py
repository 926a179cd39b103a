"""The peer of a node: the shell around `core`, which decides what is taken from which neighbour and what the scheduler is asked.

Implements `rafsfs.interfaces.Swarm`, which the fetch pipeline asks. Decided here: what happens while no scheduler can be reached, and how
long a neighbour that does not answer is tried. docs/protocol/swarm.md.

Concurrency: one trio run, all state changes between checkpoints, no locks. Tasks in the nursery of `run`: the upload server, one per
scheduler, one that sees to renewed certificates, one per neighbour and task that listens to its have-map, one per group that is followed,
the keepers, the tick. `obtain` runs in tasks of the fetcher and does what the steps of an errand say. What the core decides is performed at
once, in `_perform`, which has no checkpoint. A chunk that waits for a neighbour is given back through `requeue`, when it is at a neighbour
or its time has come; the tick sees to the latter, so nothing waits for ever. Cancelled, `obtain` leaves leases as they are: the tick lets
those without progress run out.
"""

from __future__ import annotations

import logging
import random
import secrets
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from rafsfs.errors import CacheError, FormatError, IntegrityError, RafsError, RemoteError, UnavailableError, UsageError
from rafsfs.fetch.buffers import BufferPool
from rafsfs.interfaces import Obtained
from rafsfs.metrics import Values
from rafsfs.net.http1 import HttpPool
from rafsfs.net.http_server import HttpServer
from rafsfs.net.mutual_tls import MutualTls, follow_files
from rafsfs.net.origin import Origin
from rafsfs.store.cache import Cache
from rafsfs.store.data_space import DataSpace

from .content import SpaceContent
from .core.effects import Effects, FillGroup, Follow, Listen, Requeue, Send, ShowPending, ShowRelayed
from .core.errand import Inquire, Outcome, Reply, Take
from .core.peer import PeerCore
from .core.task import PeerTask
from .decision_log import log_effect, log_rulings, log_step
from .have import HaveReader
from .keeping import KEEPERS, Keeper
from .link import Link, Links, parse_addresses
from .neighbour import AbsentError, BusyError, Neighbour
from .pace import UploadPace
from .pins import PinDesk
from .protocol.messages import (
    VERSION,
    Fill,
    Filled,
    FromScheduler,
    Hello,
    Kind,
    PinAnswer,
    Ruling,
)
from .selection import Run
from .upload import SLOTS, Uploads

_log = logging.getLogger(__name__)

_TICK_S: Final = 0.1
_ALONE: Final = 2
"""Reads of the registry at once while no scheduler can be reached."""
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
    tls: MutualTls | None = field(default=None, repr=False)
    """Of this node's ports and connections; all nodes of a swarm have it, or none."""


class SwarmPeer:
    """The peer. Made by `open_swarm`."""

    def __init__(self, cache: Cache, settings: SwarmSettings, rng: random.Random) -> None:
        self._cache = cache
        self._settings = settings
        self._rng = rng
        self.core = PeerCore(f"{rng.getrandbits(64):016x}", rng)
        self._neighbours: dict[tuple[bytes, str], Neighbour] = {}
        self._links: Links | None = None
        self._named: set[tuple[str, int]] = set()
        self._nursery: trio.Nursery | None = None
        self._started = trio.Event()
        self._headers = {"Authorization": f"Bearer {settings.token}"} if settings.token else {}
        tls = settings.tls
        # Without TLS of the swarm this context trusts nobody, and is not used.
        context = tls.peers if tls is not None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._scheme = "https" if tls is not None else "http"
        self._pool = HttpPool(
            ssl_context=context, timeout_s=10.0, connections=64, use_proxies=False, user_agent="rafs-peer"
        )
        self._keeper = Keeper(BufferPool(_BUFFERS))
        self._uploads = Uploads(cache.opened_space, self._pending, settings.token, seed=settings.seed)
        self._changed = trio.Event()
        """Set, and replaced, when something may have become worth prefetching."""
        self._alone = trio.CapacityLimiter(_ALONE)
        self.port = 0
        self.pins = PinDesk(lambda: self._links)
        self.requeue: Callable[[bytes, int], None] = lambda space_id, chunk: None
        """Called with a chunk that has waited long enough, or is at a neighbour now. No checkpoint."""
        self.fill_group: Callable[[bytes, list[int]], None] = lambda space_id, chunks: None
        """Called with chunks that are ours to fetch, whether somebody here reads them or not. No checkpoint."""
        self.arrived: Callable[[bytes, int, str, CacheError | None], None] = lambda space_id, chunk, giver, error: None
        """Called with a chunk that has waited and is here, from the peer at this address, or that could not be kept. No checkpoint."""
        self.fill_image: Callable[[str, Callable[[int, int, str], None]], None] = lambda image, report: None
        """Called with an image that is to be fetched whole. No checkpoint."""

    # ---- life ----------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part for ever. Listens only when a scheduler has been named."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._tick)
            for _ in range(KEEPERS):
                nursery.start_soon(self._keeper.run)
            if self._settings.scheduler:
                await self.use(self._settings.scheduler)
            task_status.started()
            await trio.sleep_forever()

    async def use(self, schedulers: str) -> None:
        """Take part in the swarm of these schedulers, besides others named before. Raises UsageError."""
        addresses = parse_addresses(schedulers)
        assert self._nursery is not None
        if self._links is None:
            self._links = Links(
                Hello(0, self.core.id, 0, Kind.PEER), self._received, self._answered, self._connected, self._lost
            )
            tls = self._settings.tls
            server = HttpServer(
                self._uploads.handle,
                pace=UploadPace(self._settings.upload_bytes_per_s),
                ssl_context=tls.server if tls is not None else None,
            )
            try:
                self.port = await self._nursery.start(server.serve, self._settings.host, self._settings.port)
            except OSError as error:
                self._links = None
                where = f"{self._settings.host}:{self._settings.port}"
                raise UsageError(f"other nodes cannot be listened to on {where}: {error}; see --peer-listen") from error
            kind = Kind.SEED if self._settings.seed else Kind.PEER
            settings = self._settings
            hello = Hello(
                VERSION,
                self.core.id,
                self.port,
                kind,
                settings.zone,
                settings.rack,
                settings.token,
                settings.address,
                secrets.token_hex(16),
            )
            context = tls.by_name if tls is not None else None
            self._links = Links(hello, self._received, self._answered, self._connected, self._lost, context)
            if tls is not None:
                self._nursery.start_soon(follow_files, tls)
            _log.info("peer started: id=%s port=%d kind=%s", self.core.id, self.port, kind.name)
            self._started.set()
        await self._started.wait()
        for address in addresses:
            if address not in self._named:
                self._named.add(address)
                self._nursery.start_soon(self._links.follow, *address)

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
        task = self.core.tasks.get(space.space_id) or self.core.enter(space.space_id, SpaceContent(space), image)
        home = self._home(space.space_id)
        if home and not task.joined:
            self._perform(self.core.join(task, home))

    def leave(self, space_id: bytes) -> None:
        """Take part no longer: neighbours see their have-maps end, and find nothing here. No checkpoint."""
        self._perform(self.core.leave(space_id))
        self._uploads.drop(space_id)
        for (task_id, _), neighbour in list(self._neighbours.items()):
            if task_id == space_id:
                neighbour.scope.cancel()

    def lost(self, space_id: bytes, chunks: Iterable[int]) -> None:
        """Chunks that were here are not what they should be: nobody is to ask for them. No checkpoint."""
        effects = self.core.lost_chunks(space_id, chunks)
        if effects:
            self._uploads.end_have_maps(space_id)
        self._perform(effects)

    async def obtain(
        self, space: DataSpace, chunks: list[int], *, urgent: bool, landed: Callable[[int, str], None]
    ) -> Obtained:
        """Get chunks from neighbours, `landed` with each; say which of the rest are ours to fetch and which will be asked for again."""
        task = self.core.tasks.get(space.space_id)
        if task is None or self._links is None:
            return Obtained(chunks, [])
        steps = self.core.errand(task, chunks, urgent=urgent).steps(trio.current_time())
        try:
            step = next(steps)
            while True:
                rulings = None
                log_step(task, step)
                if isinstance(step, Take):
                    await self._take_all(task, step.runs, landed)
                elif isinstance(step, Inquire):
                    rulings = await self._links.ask(task.task, step.groups, urgent=urgent, again=step.again)
                    log_rulings(task, rulings)
                else:
                    self._perform(step.effects)
                step = steps.send(Reply(trio.current_time(), rulings))
        except StopIteration as end:
            outcome: Outcome = end.value
            return Obtained(outcome.ours, outcome.waiting)

    def landed(self, space_id: bytes, chunk: int) -> None:
        """A chunk has come, from wherever: tell neighbours, and the scheduler when a group is complete. No checkpoint."""
        task = self.core.tasks.get(space_id)
        if task is not None:
            group = task.content.group(chunk)
            self._uploads.landed(space_id, chunk, group, prompt=group in task.leases)
            self._perform(self.core.landed(space_id, chunk, trio.current_time()))
            self._wake_plans()

    def hurry(self, space_id: bytes, chunks: Iterable[int]) -> None:
        """A reader waits from now on for chunks that wait here: those that nobody is sending are given back. No checkpoint."""
        self._perform(self.core.hurry(space_id, chunks, trio.current_time()))

    def gave_up(self, space_id: bytes, chunks: Iterable[int], cause: str) -> None:
        """The registry did not give these: their leases go back. No checkpoint."""
        self._perform(self.core.gave_up(space_id, chunks, cause))

    async def order(self, space: DataSpace, batches: list[list[int]]) -> AsyncGenerator[list[int], None]:
        """Yield batches of chunks in the order in which to prefetch them, each chosen when it is asked for and can be had."""
        task = self.core.tasks.get(space.space_id)
        if task is None or not self.is_active:
            for batch in batches:
                yield batch
            return
        plan = self.core.prefetch(task, batches)
        try:
            while plan.left:
                choice = plan.choose(trio.current_time())
                if choice is not None:
                    yield choice
                else:
                    await self._changed.wait()
        finally:
            plan.close()

    @asynccontextmanager
    async def guard(self) -> AsyncIterator[None]:
        """Held while the registry is read: without any scheduler, only few do so at once."""
        if self._links is None or any(link.is_up for link in self._links.links):
            yield
            return
        async with self._alone:
            yield

    def figures(self) -> Values:
        """Return the values of the series of rafsfs/daemon/metrics.py that concern the swarm."""
        core, uploads = self.core, self._uploads
        links = [link.is_up for link in self._links.links] if self._links else []
        return {
            "rafs_swarm_schedulers": {"up": sum(links), "down": len(links) - sum(links)},
            "rafs_swarm_peers": len(core.standings),
            "rafs_swarm_peers_banned": sum(peer.banned for peer in core.standings.values()),
            "rafs_swarm_tasks": len(core.tasks),
            "rafs_swarm_neighbours": sum(n.listening for task in core.tasks.values() for n in task.neighbours.values()),
            "rafs_swarm_leases": sum(len(task.leases) for task in core.tasks.values()),
            "rafs_swarm_events": {
                event: core.counters[event] for event in ("stalled", "corrupt", "busy", "absent", "unruled")
            },
            "rafs_upload_bytes": uploads.counters["bytes"],
            "rafs_upload_requests": uploads.counters["requests"],
            "rafs_upload_refused": uploads.counters["refused"],
            "rafs_upload_busy_slots": uploads.busy,
            "rafs_upload_slots": SLOTS,
        }

    def describe(self) -> dict[str, Any]:
        """Return what `rafs status` shows."""
        return {
            "id": self.core.id,
            "port": self.port,
            "schedulers": {link.address: link.is_up for link in self._links.links} if self._links else {},
            "seed": self._settings.seed,
            "peers": {
                peer.contact.id: {
                    "address": f"{peer.contact.host}:{peer.contact.port}",
                    "bytes": peer.bytes_got,
                    "banned": peer.banned,
                }
                for peer in self.core.standings.values()
            },
            "uploaded_bytes": self._uploads.counters["bytes"],
            "uploads": dict(self._uploads.counters),
            "counters": dict(self.core.counters),
            "tasks": {
                task.task.hex(): {"neighbours": len(task.neighbours), "leases": sorted(task.leases)}
                for task in self.core.tasks.values()
            },
        }

    # ---- chunks --------------------------------------------------------------------------------------------------

    async def _take_all(self, task: PeerTask, runs: list[Run], landed: Callable[[int, str], None]) -> None:
        """Get runs at once. Raises CacheError when what came cannot be kept."""
        try:
            async with trio.open_nursery() as nursery:
                for run in runs:
                    nursery.start_soon(self._take, task, run, landed)
        except BaseExceptionGroup as group:
            kept, rest = group.split(CacheError)
            if kept is None or rest is not None:
                raise
            cause: BaseException = kept
            while isinstance(cause, BaseExceptionGroup):
                cause = cause.exceptions[0]
            raise cause from None

    async def _take(self, task: PeerTask, run: Run, landed: Callable[[int, str], None]) -> None:
        """Get one run from its neighbour; what does not come is tried elsewhere by the caller."""
        neighbour = self._neighbours.get((task.task, run.peer))
        if neighbour is None:
            return
        core, now = self.core, trio.current_time
        try:
            await neighbour.fetch(
                run,
                self._pool,
                self._headers,
                self._keeper,
                lambda chunk: landed(chunk, neighbour.origin.netloc),
            )
        except* IntegrityError as group:
            self._note_corrupt(task, neighbour, group.exceptions[0])
        except* BusyError:
            _log.debug("peer is busy: peer=%s", neighbour.id)
            core.was_busy(neighbour.view, now())
        except* AbsentError:
            self._perform(core.was_absent(task, neighbour.view, run.first, now()))
        except* (UnavailableError, RemoteError) as group:
            _log.debug("peer did not deliver: peer=%s cause=%s", neighbour.id, group.exceptions[0])
            self._perform(core.was_stalled(task, neighbour.view, now()))

    async def _follow(self, task: PeerTask, run: Run) -> None:
        """Get chunks from a neighbour as it gets them. Whatever happens, they are not left followed."""
        neighbour = self._neighbours.get((task.task, run.peer))
        refused = True
        if neighbour is not None:
            address = neighbour.origin.netloc

            def landed(chunk: int) -> None:
                self.arrived(task.task, chunk, address, None)

            def began() -> None:
                self._perform(self.core.follow_began(task.task, run))

            try:
                await neighbour.follow(run, self._pool, self._headers, self._keeper, landed, began)
                refused = False
            except* IntegrityError as group:
                self._note_corrupt(task, neighbour, group.exceptions[0])
                refused = False
            except* (BusyError, AbsentError) as group:
                _log.debug("peer does not pass on: peer=%s cause=%s", neighbour.id, group.exceptions[0])
            except* (UnavailableError, RemoteError) as group:
                _log.debug("peer passes on no more: peer=%s cause=%s", neighbour.id, group.exceptions[0])
                refused = False
            except* CacheError as group:
                cause = group.exceptions[0]
                assert isinstance(cause, CacheError)
                for chunk in task.content.missing(range(run.first, run.first + run.count)):
                    self.arrived(task.task, chunk, address, cause)
            except* RafsError as group:
                _log.warning(
                    "what a peer passed on could not be kept: peer=%s cause=%s", neighbour.id, group.exceptions[0]
                )
        self._perform(self.core.follow_ended(task.task, run, trio.current_time(), refused=refused))

    def _note_corrupt(self, task: PeerTask, neighbour: Neighbour, cause: BaseException) -> None:
        _log.warning(
            "peer gave a wrong chunk and is not asked again: peer=%s address=%s space=%s cause=%s",
            neighbour.id, neighbour.origin.netloc, task.task.hex()[:16], cause,
        )  # fmt: skip
        self._perform(self.core.was_corrupt(task, neighbour.view))

    def _pending(self, space_id: bytes) -> list[int]:
        task = self.core.tasks.get(space_id)
        return list(task.leases) if task else []

    # ---- neighbours ----------------------------------------------------------------------------------------------

    async def _listen_until_left(self, task: PeerTask, neighbour: Neighbour) -> None:
        with neighbour.scope:
            await self._listen(task, neighbour)

    async def _listen(self, task: PeerTask, neighbour: Neighbour) -> None:
        """Listen to a neighbour until it is gone for good, or nothing is wanted of it."""
        view, content = neighbour.view, task.content
        attempt = 0

        def up() -> None:
            nonlocal attempt
            attempt = 0

        def came(_: Neighbour, fresh: list[int], told: HaveReader) -> None:
            if told.pending is not view.pending or told.relayed is not view.relayed:
                self._perform(self.core.is_getting(task, view, told.pending, told.relayed, trio.current_time()))
            self._perform(self.core.heard(task, fresh))
            self._wake_plans()

        unreachable = False
        try:
            while attempt < len(_RETRY_S) and not content.complete and not view.standing.banned:
                self.core.tells_anew(task, view)
                try:
                    await neighbour.listen(self._pool, self._headers, came, up)
                except AbsentError:  # it has left the task: no fault, and nothing to come back for
                    _log.debug("neighbour has left: peer=%s space=%s", neighbour.id, task.task.hex()[:16])
                    self.core.silent(task)
                    return
                except (UnavailableError, RemoteError, FormatError) as error:
                    # With TLS, what is neither silence nor nonsense is mostly a certificate, which somebody must mend.
                    refused = self._settings.tls is not None and not isinstance(error, UnavailableError | FormatError)
                    level = logging.WARNING if refused and attempt == 0 else logging.DEBUG
                    _log.log(level, "neighbour is silent: peer=%s cause=%s", neighbour.id, error)
                    self.core.silent(task)
                await trio.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)] * self._rng.uniform(0.5, 1.5))
                attempt += 1
            unreachable = not content.complete
        finally:
            if self._neighbours.get((task.task, view.id)) is neighbour:
                del self._neighbours[task.task, view.id]
            self._perform(self.core.part(task, view, unreachable=unreachable))

    # ---- scheduler -----------------------------------------------------------------------------------------------

    def _home(self, space_id: bytes) -> str:
        link = self._links.home(space_id) if self._links is not None else None
        return link.address if link is not None else ""

    def _connected(self, link: Link) -> None:
        self.pins.connected()
        self._perform(self.core.connected(link.address, self._home))

    def _lost(self, link: Link) -> None:
        self._perform(self.core.lost(link.address, self._home))

    def _answered(self, link: Link, task_id: bytes, rulings: list[Ruling]) -> None:
        self._perform(self.core.answered(task_id, rulings, trio.current_time()), link)

    def _received(self, link: Link, message: FromScheduler) -> None:
        if isinstance(message, PinAnswer):
            self.pins.received(message)
            return
        if not isinstance(message, Fill):
            self._perform(self.core.received(message, trio.current_time()), link)
            return
        number = message.number

        def report(done: int, total: int, error: str) -> None:
            if number and self._links is not None:
                self._links.send(link, Filled(number, done, total, error))

        self.fill_image(message.image, report)

    # ---- what the core decides -----------------------------------------------------------------------------------

    def _perform(self, effects: Effects, link: Link | None = None) -> None:
        """Do what was decided, in order; messages go to `link`, or to who looks after their task. No checkpoint."""
        for effect in effects:
            if isinstance(effect, Send | Listen | Follow):
                log_effect(effect)
            if isinstance(effect, Send):
                links = self._links
                if links is None or not links.send(link or links.home(effect.task), effect.message):
                    self.core.unsent(effect)
            elif isinstance(effect, Requeue):
                self.requeue(effect.task, effect.chunk)
            elif isinstance(effect, FillGroup):
                self.fill_group(effect.task, effect.chunks)
            elif isinstance(effect, ShowPending):
                self._uploads.set_pending(effect.task, effect.groups)
            elif isinstance(effect, ShowRelayed):
                self._uploads.set_relayed(effect.task, effect.depths)
            elif isinstance(effect, Follow):
                task = self.core.tasks.get(effect.task)
                if task is not None and self._nursery is not None:
                    self._nursery.start_soon(self._follow, task, effect.run)
            elif self._nursery is not None:
                self._start_listening(effect, self._nursery)

    def _wake_plans(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _start_listening(self, effect: Listen, nursery: trio.Nursery) -> None:
        task = self.core.tasks.get(effect.task)
        if task is None:  # left since the scheduler was asked
            return
        assert isinstance(task.content, SpaceContent)
        contact = effect.neighbour.standing.contact
        origin = Origin(self._scheme, contact.host.lower(), contact.port)
        neighbour = Neighbour(effect.neighbour, origin, task.content.space)
        self._neighbours[effect.task, contact.id] = neighbour
        nursery.start_soon(self._listen_until_left, task, neighbour)

    async def _tick(self) -> None:
        while True:
            await trio.sleep(_TICK_S)
            self._perform(self.core.tick(trio.current_time()))
            self._wake_plans()


@asynccontextmanager
async def open_swarm(cache: Cache, settings: SwarmSettings) -> AsyncIterator[SwarmPeer]:
    """Run a peer until the block ends."""
    peer = SwarmPeer(cache, settings, random.Random())
    async with trio.open_nursery() as nursery:
        await nursery.start(peer.run)
        try:
            yield peer
        finally:
            nursery.cancel_scope.cancel()
            peer.close()
