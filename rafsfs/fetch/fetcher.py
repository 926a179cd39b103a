"""The fetch pipeline of a node: whoever needs chunks says so, each chunk is got once.

A chunk that is wanted goes through these steps: single-flight table → queue (demand before prefetch) → copy from another data
space that has the same digest → ranged read of a blob, merged with its neighbours, by a thread that receives, decodes, hashes, writes
and marks chunk by chunk (a stream that only the event loop can read, one under TLS, costs a hop to a thread per chunk) → waiters woken.
A chunk stored as a difference whose base is not here is parked before the ranged read: its base flies like any chunk, and the landing
puts it back in its queue. Workers never wait for a base, and chains are bounded, so nothing can lock up.

Concurrency. All state below belongs to the trio thread and changes only between checkpoints, so it needs no locks; threads
touch only the buffers handed to them, the stream that they read and DataSpace (which is thread-safe); what they have kept they tell
by `run_sync_soon`, so what a cancelled thread has kept is landed all the same. A thread that waits for bytes sees within a quarter of a
second that its task was cancelled. Tasks: `connections` workers, owned by the nursery of
`open_fetcher`; `demand_reserve` of them take demand only. A waiter that is cancelled leaves the flight to the others; a flight
whose waiters have all gone is finished if it has begun, dropped if it waits. Closing the fetcher fails all flights.
Memory: at most `buffer_bytes` of stored bytes in buffers, half as much kept for use again, and the decoded chunk of each busy thread,
with its base if it has one.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager

import trio

from ..errors import (
    CacheError,
    CacheFullError,
    DaemonError,
    DeadlineError,
    FormatError,
    IntegrityError,
    RafsError,
    RemoteError,
    UnavailableError,
)
from ..format.chunk_map import ChunkMap, StoredChunk
from ..format.codec import CODEC_RAW, chunk_digest, decode
from ..interfaces import BlobStream, BlockingRead, RangedBlobs, Room, Swarm, ThreadedStream
from ..metrics import Histogram
from ..store.cache import Cache
from ..store.data_space import DataSpace
from .buffers import BufferPool, ByteBudget
from .line import LineEstimate
from .plan import RangeRead, Wanted, plan_reads
from .prefetcher import Prefetcher, Window
from .queue import Flight, FlightQueue, Priority, of_batch
from .source import FetchSettings, Source

_log = logging.getLogger(__name__)

SWARM_BATCH = 4 << 20
"""Bytes of a batch of prefetch with a swarm, and of a group of chunks (p2p/protocol/groups.py): a batch is of one group, since each group
comes from a node of its own; the order of rarity is decided per batch."""
PEERS_COUNTED = 128
"""Peers that a mount names in its figures; a node that restarts has a new address, and a swarm may have thousands."""
SWARM_BATCHES = 16
"""Batches of a space prefetched at once with a swarm: more than there are workers, since some of them wait for other nodes."""
PLAN_BATCHES = 8
"""Batches of a plan on their way at once, of a part of the window each: the order is kept within them."""
AHEAD_STEPS = 4
"""Parts of the configured window ahead of a stream that are asked for at once: chunks asked for together are fetched in one request."""
TOLD_BYTES = 2 << 20
"""Bytes of chunks that a thread keeps before it wakes the event loop for them, if nobody waits for one of them."""
_RETRY_S = (0.05, 0.2, 0.5, 1.0, 2.0)
"""Pauses between attempts for a chunk; the last one repeats until the deadline. The store has retried on its own before."""


class Fetcher:
    """The pipeline. Made by `open_fetcher`."""

    def __init__(
        self, cache: Cache, settings: FetchSettings, swarm: Swarm | None = None, room: Room | None = None
    ) -> None:
        self._cache = cache
        self.settings = settings
        self._room = room
        self._swarm = swarm
        if swarm is not None:
            swarm.requeue = self._requeue
            swarm.fill_group = self._fill_group
            swarm.arrived = self._arrived
        self._sources: list[Source] = []
        self._queue = FlightQueue()
        self._threads = trio.CapacityLimiter(settings.threads)
        self._ranges = trio.CapacityLimiter(settings.connections)
        self._token: trio.lowlevel.TrioToken | None = None
        self._buffers = ByteBudget(settings.buffer_bytes)
        self._pool = BufferPool(settings.buffer_bytes // 2)
        self.prefetcher = Prefetcher(self._queue.start, self._ahead_window)
        self.line = LineEstimate()
        """To the registry."""
        self.counters: Counter[str] = Counter()
        self.failed_chunks: Counter[str] = Counter()
        self.failed_reads: Counter[str] = Counter()
        """By class of error."""
        self.miss_seconds = Histogram()
        self._noted: dict[str, float] = {}

    def run_on(self, token: trio.lowlevel.TrioToken) -> None:
        """Say which event loop the pipeline belongs to."""
        self._token = token

    def add_source(self, chunk_map: ChunkMap, store: RangedBlobs, name: str) -> Source:
        """Say that the data spaces of `chunk_map` can be had from `store`; open them in the cache. May block on the disk."""
        self.open_spaces(chunk_map)
        spaces: dict[bytes, int] = {}
        for space in chunk_map.all_spaces:
            spaces.setdefault(chunk_map.table(space.index).space_id, space.index)
        source = Source(
            name, chunk_map, store, spaces, tuple(chunk_map.table(s.index).space_id for s in chunk_map.spaces)
        )
        self._sources.append(source)
        return source

    def open_spaces(self, chunk_map: ChunkMap) -> None:
        """Open the data spaces of `chunk_map` in the cache, made anew if they have been evicted. May block on the disk."""
        for space in chunk_map.all_spaces:
            self._cache.open_space(chunk_map.table(space.index))

    def drop_space(self, space_id: bytes) -> None:
        """Take part in nothing more of a data space that is being evicted. No checkpoint."""
        self._queue.drop_space(space_id)
        self.prefetcher.forget(space_id)
        if self._swarm is not None:
            self._swarm.leave(space_id)

    def figures(self) -> dict[str, int]:
        """Return what has been counted, and what the line to the registry is like: milliseconds, bytes per second."""
        line = {"latency_ms": round(self.line.latency_s * 1000), "bandwidth": round(self.line.bandwidth)}
        return dict(self.counters) | self.prefetcher.figures() | line

    def depths(self) -> dict[str, int]:
        """Return how many chunks are queued, in flight, and parked."""
        return self._queue.depths()

    def enter_swarm(self, source: Source, image: str) -> None:
        """Take part in the distribution of a source's data spaces, if there is a swarm. No checkpoint."""
        if self._swarm is not None:
            for space_id in source.spaces:
                space = self._cache.opened_space(space_id)
                if space is not None and space.table.count:
                    self._swarm.enter(space, image)

    def remove_source(self, source: Source) -> None:
        """Take a source out. Flights that use it finish or fail by themselves."""
        if source in self._sources:
            self._sources.remove(source)

    async def ensure(
        self,
        space_id: bytes,
        chunks: Sequence[int],
        *,
        priority: Priority = Priority.DEMAND,
        deadline_s: float | None = None,
        on_behalf: Counter[str] | None = None,
        own: range | None = None,
    ) -> None:
        """Return when all of `chunks` of a data space are present.

        `own`: all chunks of the file that is read, so that it is read ahead and no other. `on_behalf` counts the bytes obtained by
        where they came from, those read ahead included. Raises the cause for the first chunk that cannot be had, DeadlineError after
        `deadline_s` (the setting if None). Cancel-safe: other waiters keep their flights.
        """
        space = self._cache.opened_space(space_id)
        if space is None:
            raise CacheError(f"data space {space_id.hex()[:16]} is not in this cache")
        wanted = space.missing(chunks)
        if priority is Priority.DEMAND:
            span = range(min(chunks), max(chunks) + 1) if chunks else range(0)
            self.prefetcher.demanded(space, span, own, on_behalf)
        if not wanted:
            return
        if priority is not Priority.DEMAND:
            await self._get(space, wanted, priority, deadline_s, on_behalf)
            return
        started = trio.current_time()
        try:
            await self._get(space, wanted, priority, deadline_s, on_behalf)
        except RafsError as error:
            self.failed_reads[type(error).__name__] += 1
            raise
        finally:
            self.miss_seconds.observe(trio.current_time() - started)

    async def _get(
        self,
        space: DataSpace,
        wanted: list[int],
        priority: Priority,
        deadline_s: float | None,
        on_behalf: Counter[str] | None,
    ) -> None:
        """Wait for chunks that are not present."""
        limit = self.settings.deadline_s if deadline_s is None else deadline_s
        until = trio.current_time() + (limit if math.isfinite(limit) else self.settings.deadline_s)
        behind = self._queue.aside_of(space, wanted) if priority is Priority.DEMAND and self._swarm is not None else []
        flights = [self._queue.join(space, index, priority, on_behalf, until=until) for index in wanted]
        if behind and self._swarm is not None:
            self._swarm.hurry(space.space_id, behind)
        try:
            with trio.move_on_after(limit) as scope:
                for flight in flights:
                    await flight.done.wait()
            if scope.cancelled_caught:
                raise self._late(flights, limit)
        finally:
            for flight in flights:
                flight.waiters -= 1
        for flight in flights:
            if flight.error is not None:
                raise flight.error
        self.prefetcher.came(space, range(wanted[0], wanted[-1] + 1))

    async def prefetch_all(self, source: Source, *, on_behalf: Counter[str] | None = None) -> None:
        """Fill all data spaces of a source in order, behind all demand. Raises what the first failing chunk raises, CacheFullError when
        the quota is full with what is in use.
        """
        window = max(self.settings.readahead_bytes * 2, 1)
        for space_id in source.own:
            space = self._cache.opened_space(space_id)
            if space is None:
                continue
            if self._swarm is not None and self._swarm.is_active:
                await self._fill_from_swarm(self._swarm, space, on_behalf)
                continue
            batches = list(_batches(space, window // 2))
            async with trio.open_nursery() as nursery:
                limiter = trio.Semaphore(2 if batches and len(batches[0]) > 8 else 8)
                for batch in batches:
                    if self._room is not None:
                        await self._room.make_room(sum(space.table.extent(index)[1] for index in batch))
                    await limiter.acquire()
                    nursery.start_soon(self._fill, space_id, batch, limiter, on_behalf)

    async def _fill_from_swarm(self, swarm: Swarm, space: DataSpace, on_behalf: Counter[str] | None) -> None:
        """Fill a space in the order that the swarm chooses; it chooses when there is room, not before."""
        limiter = trio.Semaphore(SWARM_BATCHES)
        batches = list(_batches(space, SWARM_BATCH))
        async with trio.open_nursery() as nursery, aclosing(swarm.order(space, batches)) as order:
            await limiter.acquire()
            async for batch in order:
                if self._room is not None:
                    await self._room.make_room(sum(space.table.extent(index)[1] for index in batch))
                nursery.start_soon(self._fill, space.space_id, batch, limiter, on_behalf)
                await limiter.acquire()

    async def prefetch_spans(
        self, spans: Iterable[tuple[bytes, int, int]], *, on_behalf: Counter[str] | None = None
    ) -> None:
        """Fetch (space id, first byte, byte after the last) spans in this order, behind all demand. Raises as `prefetch_all` does.

        At most a window is on its way at once; `spans` is asked for the next only then.
        """
        size = max(self.settings.readahead_bytes // PLAN_BATCHES, 1)
        async with trio.open_nursery() as nursery:
            limiter = trio.Semaphore(PLAN_BATCHES)
            for space_id, first, stop in spans:
                space = self._cache.opened_space(space_id)
                if space is None:
                    raise CacheError(f"data space {space_id.hex()[:16]} is not in this cache")
                for batch in _batches(space, size, space.table.covering(first, stop - first)):
                    if self._room is not None:
                        await self._room.make_room(sum(space.table.extent(index)[1] for index in batch))
                    await limiter.acquire()
                    nursery.start_soon(self._fill, space_id, batch, limiter, on_behalf)

    async def _fill(
        self, space_id: bytes, batch: list[int], limiter: trio.Semaphore, on_behalf: Counter[str] | None
    ) -> None:
        try:
            await self.ensure(space_id, batch, priority=Priority.PREFETCH, deadline_s=math.inf, on_behalf=on_behalf)
        finally:
            limiter.release()

    def _ahead_window(self) -> Window:
        limit = self.settings.readahead_bytes
        if self._swarm is not None and self._swarm.is_active:
            return Window(limit, SWARM_BATCH, SWARM_BATCH)
        step = limit // AHEAD_STEPS
        return Window(self.line.window(limit, step), step)

    async def run_worker(self, *, demand_only: bool) -> None:
        """Take flights and fly them, for ever."""
        while True:
            wake = self._queue.wake
            grain = SWARM_BATCH if self._swarm is not None and self._swarm.is_active else 0
            batch = self._queue.take(self.settings.merge_bytes, demand_only=demand_only, grain=grain)
            if not batch:
                await wake.wait()
                continue
            try:
                await self._fly(batch)
            except RafsError as error:
                for flight in of_batch(batch):
                    self._land(flight, error)
            except Exception:  # noqa: BLE001 - boundary of a batch: our own fault fails it alone, not every mount
                _log.exception(
                    "fetch met a fault: space=%s chunk=%d", batch[0].space.space_id.hex()[:16], batch[0].index
                )
            finally:
                for flight in of_batch(batch):
                    self._land(flight, DaemonError("the fetch was given up"))

    async def _fly(self, batch: list[Flight]) -> None:
        waiting = await self._copy_local(batch)
        attempt = 0
        started = trio.current_time()
        while waiting:
            if self._swarm is not None and self._swarm.is_active:
                waiting = await self._ask_swarm(self._swarm, waiting)
                if not waiting:
                    return
                async with self._swarm.guard():
                    cause = await self._try_sources(waiting)
            else:
                cause = await self._try_sources(waiting)
            waiting = [flight for flight in of_batch(batch) if flight in waiting]
            if not waiting:
                return
            if self._swarm is not None:
                self._swarm.gave_up(waiting[0].space.space_id, [flight.index for flight in waiting], str(cause))
            for flight in list(waiting):
                if flight.corrupt >= 2 or not isinstance(cause, (UnavailableError, IntegrityError)):
                    self._land(flight, cause)
                    waiting.remove(flight)
            if not waiting or not any(flight.waiters for flight in waiting):
                for flight in waiting:
                    self._land(flight, cause)
                return
            now = trio.current_time()
            if now - started > self.settings.deadline_s:
                # Whoever joined later has his own time, counted from then.
                for flight in [flight for flight in waiting if flight.until <= now]:
                    self._land(flight, cause)
                    waiting.remove(flight)
                if not waiting:
                    return
            for flight in waiting:
                flight.cause = cause
            self._note(waiting, cause)
            self.counters["retries"] += 1
            await trio.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
            attempt += 1

    async def _ask_swarm(self, swarm: Swarm, flights: list[Flight]) -> list[Flight]:
        """Get what other nodes have; park what they are fetching; return what is ours to fetch."""
        by_index = {flight.index: flight for flight in flights}

        def landed(chunk: int, address: str) -> None:
            flight = by_index[chunk]
            flight.origin = "peer"
            flight.giver = address
            self._land(flight, None)

        urgent = any(flight.priority is Priority.DEMAND for flight in flights)
        obtained = await swarm.obtain(flights[0].space, sorted(by_index), urgent=urgent, landed=landed)
        for chunk in obtained.waiting:
            if not by_index[chunk].done.is_set():
                self._queue.set_aside(by_index[chunk])
        for flight in flights:
            # Somebody else may have stored it meanwhile.
            if flight.batch is not None and not flight.done.is_set() and flight.space.is_present(flight.index):
                self._land(flight, None)
        ours = set(obtained.ours)
        return [flight for flight in flights if flight.index in ours and not flight.done.is_set()]

    def _requeue(self, space_id: bytes, chunk: int) -> None:
        """Queue a chunk that was waiting for another node. No checkpoint."""
        space = self._cache.opened_space(space_id)
        flight = self._queue.find(space, chunk) if space is not None else None
        if flight is not None and flight.is_aside:
            self._queue.unpark(flight)

    def _arrived(self, space_id: bytes, chunk: int, giver: str, error: CacheError | None) -> None:
        """End a flight that waited for another node: the chunk is here, or could not be kept. No checkpoint."""
        space = self._cache.opened_space(space_id)
        flight = self._queue.find(space, chunk) if space is not None else None
        if flight is not None:
            flight.origin = "peer"
            flight.giver = giver
            self._land(flight, error)
        elif error is None and self._swarm is not None:  # nobody wants it any more; others may
            self._swarm.landed(space_id, chunk)

    def _fill_group(self, space_id: bytes, chunks: list[int]) -> None:
        """Fetch chunks that other nodes wait for, behind what is read here, before what is read ahead. No checkpoint."""
        space = self._cache.opened_space(space_id)
        if space is not None:
            for chunk in space.missing(chunks):
                self._queue.lease(space, chunk)

    async def _try_sources(self, flights: list[Flight]) -> RafsError:
        """Try every source for the flights that have not landed; return the last cause of failure."""
        cause: RafsError = UnavailableError("no source offers the data space")
        for source in list(self._sources):
            left = [f for f in flights if not f.done.is_set() and f.base is None and not f.is_aside]
            if not left:
                break
            number = source.spaces.get(left[0].space.space_id)
            if number is None:
                continue
            try:
                wanted = self._plan(source, number, left)
                by_index = {item.index: next(f for f in left if f.index == item.index) for item in wanted}
                for read in plan_reads(wanted, self.settings.merge_bytes):
                    failure = await self._read(source, read, by_index)
                    cause = failure or cause
            except (FormatError, RemoteError) as error:
                cause = error
        return cause

    def _plan(self, source: Source, number: int, flights: list[Flight]) -> list[Wanted]:
        """Return what can be read now; park what needs a base that is not here. No checkpoint."""
        wanted = []
        for flight in flights:
            if not source.chunk_map.is_stored(number, flight.index):
                continue
            stored = source.chunk_map.stored(number, flight.index)
            if stored.base is not None:
                space, index = self._base_of(source, stored)
                if not space.is_present(index):
                    self._park(flight, space, index)
                    continue
            wanted.append(Wanted(flight.index, stored))
        return wanted

    def _park(self, flight: Flight, space: DataSpace, index: int) -> None:
        """Take a flight out of its batch until chunk `index` of `space` has landed."""
        base = self._queue.join(space, index, flight.priority, flight.sponsor, until=flight.until)
        self._queue.park(flight, base)

    def _base_of(self, source: Source, stored: StoredChunk) -> tuple[DataSpace, int]:
        """Return where the base of a chunk is, or will be. Raises CacheError."""
        assert stored.base is not None
        space_id = source.chunk_map.table(stored.base[0]).space_id
        space = self._cache.opened_space(space_id)
        if space is None:
            raise CacheError(f"data space {space_id.hex()[:16]} of a base is not in this cache")
        return space, stored.base[1]

    async def _read(self, source: Source, read: RangeRead, by_index: dict[int, Flight]) -> RafsError | None:
        """Do one ranged read; each chunk lands as soon as its bytes are here. Return the failure, if any."""
        blob = source.chunk_map.blobs[read.blob].digest
        failure: RafsError | None = None
        async with self._buffers.reserve(read.length), trio.open_nursery() as nursery:
            began = trio.current_time()
            self.line.began(began)
            try:
                async with source.store.open_range(blob, read.offset, read.length) as stream:
                    self.line.answered(trio.current_time() - began)
                    blocking = stream.blocking() if isinstance(stream, ThreadedStream) else None
                    if blocking is not None:
                        twins = await trio.to_thread.run_sync(
                            self._read_in_thread, blocking, source, read, by_index, limiter=self._ranges
                        )
                    else:
                        twins = await self._read_here(stream, source, read, by_index, nursery)
                for twin in twins:
                    nursery.start_soon(self._copy_after, twin, read, by_index)
            except RafsError as error:
                failure = _named(error, f"{source.name}: blob {blob}, chunks {_numbers(read)}")
            finally:
                self.line.ended(
                    trio.current_time(), sum(w.stored.length for w in read.chunks) if failure is None else 0
                )
        corrupt = [flight for flight in by_index.values() if flight.error is not None and not flight.done.is_set()]
        if corrupt:
            failure = corrupt[0].error
            for flight in corrupt:
                flight.error = None
        return failure

    async def _read_here(
        self, stream: BlobStream, source: Source, read: RangeRead, by_index: dict[int, Flight], nursery: trio.Nursery
    ) -> list[Flight]:
        """Read a range by the event loop, a hop to a thread per chunk; return the flights whose stored bytes another chunk has too."""
        position, twins = read.offset, []
        for wanted in read.chunks:
            stored = wanted.stored
            if stored.offset < position:
                twins.append(by_index[wanted.index])
                continue
            if stored.offset > position:
                await stream.readinto(memoryview(bytearray(stored.offset - position)))
            buffer, view = self._pool.take(stored.stored_size)
            await stream.readinto(view)
            position = stored.offset + stored.stored_size
            nursery.start_soon(self._finish, source, by_index[wanted.index], wanted, buffer)
        return twins

    async def _finish(self, source: Source, flight: Flight, wanted: Wanted, buffer: bytearray) -> None:
        error = await trio.to_thread.run_sync(self._keep, source, flight, wanted, buffer, limiter=self._threads)
        self._kept(source, [(flight, wanted, error)])

    def _read_in_thread(
        self, read_into: BlockingRead, source: Source, read: RangeRead, by_index: dict[int, Flight]
    ) -> list[Flight]:
        """Read a range and keep its chunks, all in this thread; return the flights whose stored bytes another chunk has too.

        What is kept is told to the event loop at once when somebody waits for it, else by the batch.
        """
        position, twins = read.offset, []
        kept: list[tuple[Flight, Wanted, RafsError | None]] = []
        held = 0
        try:
            for wanted in read.chunks:
                flight, stored = by_index[wanted.index], wanted.stored
                if stored.offset < position:
                    twins.append(flight)
                    continue
                if stored.offset > position:
                    read_into(memoryview(bytearray(stored.offset - position)))
                buffer, view = self._pool.take(stored.stored_size)
                read_into(view)
                position = stored.offset + stored.stored_size
                kept.append((flight, wanted, self._keep(source, flight, wanted, buffer)))
                held += stored.length
                if flight.priority is Priority.DEMAND or held >= TOLD_BYTES:
                    self._tell(source, kept)
                    kept, held = [], 0
        finally:
            self._tell(source, kept)
        return twins

    def _tell(self, source: Source, kept: list[tuple[Flight, Wanted, RafsError | None]]) -> None:
        """Have the event loop note what a thread has kept, before it notes that the thread has ended. In a thread, does not wait."""
        if kept and self._token is not None:
            self._token.run_sync_soon(self._kept, source, kept)

    def _keep(self, source: Source, flight: Flight, wanted: Wanted, buffer: bytearray) -> RafsError | None:
        """Decode, verify, write and mark one chunk, and give its buffer back; return why not. In a thread."""
        stored = wanted.stored
        held = memoryview(buffer)[: stored.stored_size]
        try:
            if stored.codec == CODEC_RAW:
                flight.space.store(flight.index, held)
            else:
                out, data = self._pool.take(stored.length)
                try:
                    if stored.base is None:
                        decode(stored.codec, stored.param, held, data)
                        flight.space.store(flight.index, data)
                    else:
                        self._store_difference(source, flight, stored, held, data)
                finally:
                    self._pool.give(out)
        except (UnavailableError, FormatError, IntegrityError, CacheError) as error:
            return error
        finally:
            self._pool.give(buffer)
        return None

    def _kept(self, source: Source, outcomes: list[tuple[Flight, Wanted, RafsError | None]]) -> None:
        """End the flights of chunks that were kept; why one was not is left in flight.error for `_read`. No checkpoint."""
        for flight, wanted, error in outcomes:
            if error is None:
                flight.origin = "origin"
                source.bytes_by_origin["origin"] += wanted.stored.length
                self._land(flight, None)
            elif isinstance(error, CacheError):
                self._land(flight, error)
            elif isinstance(error, UnavailableError):
                flight.error = error
            else:
                flight.corrupt += 1
                self.counters["corrupt"] += 1
                blob = source.chunk_map.blobs[wanted.stored.blob].digest
                flight.error = IntegrityError(
                    f"{source.name}: blob {blob}, chunk {flight.index} of data space {flight.space.space_id.hex()[:16]}: {error}"
                )

    def _store_difference(
        self, source: Source, flight: Flight, stored: StoredChunk, held: memoryview, data: memoryview
    ) -> None:
        """Decode against the base, verify, write, mark. In a thread. If the outcome is wrong, it may be the base that has rotted."""
        space, index = self._base_of(source, stored)
        try:
            decode(stored.codec, stored.param, held, data, memoryview(space.read(index)))
            flight.space.store(flight.index, data)
        except (FormatError, IntegrityError):
            if not space.verify(index):
                raise UnavailableError(
                    f"chunk {index} of data space {space.space_id.hex()[:16]}, the base, was damaged on this node"
                ) from None
            raise

    async def _copy_after(self, flight: Flight, read: RangeRead, by_index: dict[int, Flight]) -> None:
        """Serve a chunk whose bytes equal those of another chunk of the same read, once that one has landed."""
        digest = flight.space.table.digest(flight.index)
        for wanted in read.chunks:
            twin = by_index[wanted.index]
            if twin is not flight and flight.space.table.digest(wanted.index) == digest:
                await twin.done.wait()
                if twin.error is None and await self._copy(flight, twin.space, twin.index):
                    self._land(flight, None)
                return

    async def _copy_local(self, batch: list[Flight]) -> list[Flight]:
        """Serve what another data space of this node has; return the rest."""
        rest = []
        for flight in batch:
            place = self._cache.index.find(flight.space.table.digest(flight.index))
            if place is not None and place != flight.key:
                space = self._cache.opened_space(place[0])
                if space is not None and place[1] < space.table.count and space.is_present(place[1]):
                    try:
                        if await self._copy(flight, space, place[1]):
                            self._land(flight, None)
                            continue
                    except CacheError as error:
                        self._land(flight, error)
                        continue
            rest.append(flight)
        return rest

    async def _copy(self, flight: Flight, space: DataSpace, index: int) -> bool:
        """Copy a chunk from another place, verified before it is visible. Return whether it was what was needed."""

        def work() -> bool:
            try:
                data = space.read(index)
            except CacheError:  # it has just been removed
                return False
            if chunk_digest(data) != flight.space.table.digest(flight.index):
                return False
            flight.space.store(flight.index, data, verified=True)
            return True

        if await trio.to_thread.run_sync(work, limiter=self._threads):
            flight.origin = "local"
            return True
        return False

    def _land(self, flight: Flight, error: RafsError | None) -> None:
        """End a flight; no checkpoint. One that found the disk full is put aside once, and tried again if something could be evicted."""
        if flight.done.is_set():
            return
        if isinstance(error, CacheFullError) and self._room is not None and not flight.is_relieved:
            flight.is_relieved = True
            self._queue.set_aside(flight)
            self._room.relieve(lambda has_space: self._relieved(flight, error, has_space=has_space))
            return
        flight.error = error
        self._queue.remove(flight)
        self.counters["failed" if error else "landed"] += 1
        if error is not None:
            self.failed_chunks[type(error).__name__] += 1
        if error is None:
            size = flight.space.table.extent(flight.index)[1]
            if self._room is not None:
                self._room.stored(size)
            self.counters[f"{flight.origin or 'local'}_bytes"] += size
            if flight.sponsor is not None:
                flight.sponsor[flight.origin] += size
                if flight.giver:
                    flight.sponsor[f"peer {_known(flight.sponsor, flight.giver)}"] += size
            if self._swarm is not None:
                self._swarm.landed(flight.space.space_id, flight.index)
        flight.done.set()
        if error is not None and not isinstance(error, DaemonError):
            self._note([flight], error)
        for waiting in flight.parked:
            if error is not None:
                self._land(waiting, error)
            else:
                self._queue.unpark(waiting)

    def _relieved(self, flight: Flight, error: CacheFullError, *, has_space: bool) -> None:
        """Queue a flight again that had found the disk full, or end it. No checkpoint."""
        if flight.done.is_set() or not flight.is_aside:
            return
        if has_space:
            self._queue.unpark(flight)
        else:
            flight.is_aside = False
            self._land(flight, error)

    def _late(self, flights: list[Flight], limit: float) -> DeadlineError:
        late = next((flight for flight in flights if not flight.done.is_set()), flights[0])
        met = late
        while met.cause is None and met.base is not None:
            met = met.base
        cause = f": {met.cause}" if met.cause else ""
        return DeadlineError(
            f"chunk {late.index} of data space {late.space.space_id.hex()[:16]} did not come within {limit:g} s{cause}"
        )

    def _note(self, flights: list[Flight], cause: RafsError) -> None:
        """Log a failed attempt for who debugs, at most once a second for the same cause. Who gives up a read logs that."""
        text = str(cause)
        now = trio.current_time()
        if now - self._noted.get(text, -math.inf) < 1:
            return
        if len(self._noted) > 1000:
            self._noted.clear()
        self._noted[text] = now
        first = flights[0]
        _log.debug(
            "fetch failed: space=%s chunk=%d waiting=%d cause=%s",
            first.space.space_id.hex()[:16],
            first.index,
            len(flights),
            text,
        )

    def close(self) -> None:
        """Fail everything that waits; called when the workers have been cancelled."""
        for flight in self._queue.close():
            self._land(flight, DaemonError("the daemon is stopping"))


@asynccontextmanager
async def open_fetcher(
    cache: Cache, settings: FetchSettings, swarm: Swarm | None = None, room: Room | None = None
) -> AsyncIterator[Fetcher]:
    """Run a fetch pipeline over `cache` until the block ends; then all that waits fails with DaemonError."""
    fetcher = Fetcher(cache, settings, swarm, room)
    fetcher.run_on(trio.lowlevel.current_trio_token())
    async with trio.open_nursery() as nursery:
        fetcher.prefetcher.nursery = nursery
        for number in range(settings.connections):
            nursery.start_soon(_worker, fetcher, number < settings.demand_reserve)
        try:
            yield fetcher
        finally:
            nursery.cancel_scope.cancel()
            fetcher.close()


async def _worker(fetcher: Fetcher, demand_only: bool) -> None:
    await fetcher.run_worker(demand_only=demand_only)


def _batches(space: DataSpace, size: int, chunks: range | None = None) -> Iterable[list[int]]:
    """Yield the missing chunks of a space, or of `chunks` of it, in order, in batches of about `size` bytes."""
    batch: list[int] = []
    held = 0
    for index in chunks if chunks is not None else range(space.table.count):
        if space.is_present(index):
            continue
        batch.append(index)
        held += space.table.extent(index)[1]
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _known(sponsor: Counter[str], giver: str) -> str:
    """Return the address under which bytes of a peer are counted: `others` when too many have been counted already."""
    return giver if f"peer {giver}" in sponsor or len(sponsor) < PEERS_COUNTED else "others"


def _numbers(read: RangeRead) -> str:
    first, last = read.chunks[0].index, read.chunks[-1].index
    return str(first) if first == last else f"{first} to {last}"


def _named(error: RafsError, where: str) -> RafsError:
    """Return the same kind of error, its message led by where it happened."""
    return type(error)(f"{where}: {error}")
