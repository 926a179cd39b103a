"""Getting one file of a web server into the cache: section by section, from other nodes where they have it, else from the server.

Decided here: the order of sections, who is asked, when this node stops believing the swarm. A section whose digests are known is a data
space like any other and comes through the fetch pipeline; one whose digests nobody knows is fetched whole by whoever the scheduler says,
who then says what it is. Rules: what others say a section is counts only while nothing contradicts it: a contradiction between the server
and the swarm ends the sharing of this file here, and what came from others is dropped. Sections of two versions never meet: they have
other keys.

Concurrency: one `run` per file at a time (the caller holds a lock). Its nursery owns a task per section under way, at most FIRST + FILL,
and one that renews leases. State changes between checkpoints. Cancelled, complete sections stay; leases that were ours are given back.
"""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

import trio

from ..errors import IntegrityError, RafsError, UnavailableError
from ..fetch.buffers import BufferPool
from ..fetch.fetcher import Fetcher
from ..fetch.queue import Priority
from ..format.chunk_map import ChunkMap
from ..format.chunk_map_builder import ChunkMapBuilder
from ..format.codec import CODEC_RAW
from ..format.space_table import SpaceTable
from ..interfaces import Room, SectionRuling, Swarm
from ..store.cache import Cache
from ..store.data_space import DataSpace
from ..types import Digest
from .origin_file import Origin
from .plan import FilePlan, digests_of
from .record import FileRecord, FileRecords
from .section import fetch_section

_log = logging.getLogger(__name__)

FIRST: Final = 2
"""Sections fetched at once that nobody knows, while others do the same; twice as many when this node is by itself."""
FILL: Final = 4
"""Sections filled at once whose digests are known: each is a swarm of its own."""
_ASKED: Final = 32
"""Sections asked for at once."""
_POLL_S: Final = 1.0
_ALIVE_S: Final = 4.0
_FAILURES: Final = 3
"""Sections that fail one after the other until the file is given up."""


class DisagreementError(IntegrityError):
    """The swarm says that a file is something else than its server gives."""


@dataclass(slots=True, eq=False)
class WebFile:
    """A file of a web server on this node: what is known of it."""

    record: FileRecord
    plan: FilePlan
    tables: dict[int, SpaceTable] = field(default_factory=dict)
    spaces: dict[int, DataSpace] = field(default_factory=dict)
    """Of sections that are open."""
    lock: trio.Lock = field(default_factory=trio.Lock)
    users: int = 0
    held: set[bytes] = field(default_factory=set)
    """Data spaces that are kept from being removed while there are users."""
    news: trio.Event = field(default_factory=trio.Event)
    sources: Counter[str] = field(default_factory=Counter)

    @property
    def key(self) -> bytes:
        """The key."""
        return self.record.key

    def is_complete(self, section: int) -> bool:
        """Tell whether all of a section is here."""
        space = self.spaces.get(section)
        return space is not None and space.complete

    def present_bytes(self) -> int:
        """Return how many bytes are here."""
        return sum(space.present_bytes for space in self.spaces.values())

    def learn(self, section: int, digests: bytes) -> None:
        """Take what a section is. Raises DisagreementError if that cannot be, or is not what it was."""
        known = self.tables.get(section)
        if not self.plan.fits(section, digests) or (known is not None and digests_of(known) != digests):
            raise DisagreementError(f"section {section} of {self.record.url} is told in two ways")
        if known is None:
            self.tables[section] = self.plan.table(section, digests)

    def take_news(self, ruling: SectionRuling) -> None:
        """Take what a scheduler says of its own accord. What cannot be is met again when it is asked for. No checkpoint."""
        digests = ruling.digests
        if digests is not None and ruling.section not in self.tables and self.plan.fits(ruling.section, digests):
            self.tables[ruling.section] = self.plan.table(ruling.section, digests)
        self.news.set()


class Transfer:
    """One run."""

    def __init__(
        self,
        file: WebFile,
        origin: Origin,
        *,
        cache: Cache,
        fetcher: Fetcher,
        records: FileRecords,
        swarm: Swarm | None,
        room: Room,
        sources: Counter[str],
    ) -> None:
        self._room = room
        self._file = file
        self._origin = origin
        self._cache = cache
        self._fetcher = fetcher
        self._records = records
        self._swarm = swarm
        self._sources = sources
        self._buffers = BufferPool(8 << 20)
        self._first: dict[int, float] = {}
        """Of sections fetched that nobody knew, when a chunk came last."""
        self._fill: set[int] = set()
        self._alone = swarm is None
        self._failures = 0
        self.staged_bytes = 0
        """Bytes of sections that are not complete yet."""

    async def run(self) -> None:
        """Get all of the file. Raises DisagreementError, ChangedError and other errors of ours."""
        file = self._file
        todo = list(range(file.plan.sections))
        if self._swarm is not None:
            random.shuffle(todo)  # so that nodes fetch different parts and have something to give
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_leases)
            asked = -math.inf
            while True:
                todo = [section for section in todo if not file.is_complete(section)]
                idle = [section for section in todo if section not in self._first and section not in self._fill]
                if not todo and not self._first and not self._fill:
                    break
                file.news = trio.Event() if file.news.is_set() else file.news
                for section in idle:
                    if section in file.tables and len(self._fill) < FILL:
                        self._fill.add(section)
                        nursery.start_soon(self._run, self._fill_section, section)
                unknown = [section for section in idle if section not in file.tables][:_ASKED]
                room = FIRST * (2 if self._alone else 1) - len(self._first)
                if unknown and (room > 0 or trio.current_time() - asked >= _POLL_S):
                    asked = trio.current_time()
                    if await self._ask(unknown, room, nursery):
                        continue
                with trio.move_on_after(_POLL_S):
                    await file.news.wait()
            nursery.cancel_scope.cancel()

    async def _ask(self, unknown: list[int], room: int, nursery: trio.Nursery) -> bool:
        """Learn what sections are, or begin to fetch them; return whether anything came of it."""
        file = self._file
        rulings = None
        if self._swarm is not None:
            rulings = await self._swarm.pins.ask(file.key, file.plan.length, unknown, max(0, room))
        if rulings is None:  # by ourselves, or no scheduler can be reached
            self._alone = True
            rulings = [SectionRuling(section, None, ours=True) for section in unknown[: max(0, room)]]
        else:
            self._alone = False
        for ruling in rulings:
            if ruling.digests is not None:
                file.learn(ruling.section, ruling.digests)
            elif ruling.ours and ruling.section not in self._first and ruling.section not in file.tables:
                self._first[ruling.section] = trio.current_time()
                nursery.start_soon(self._run, self._fetch_first, ruling.section)
        return any(ruling.digests is not None or ruling.ours for ruling in rulings)

    async def _run(self, job: Callable[[int], object], section: int) -> None:
        """Do one section; a failure that may pass is met by another try, until there have been too many."""
        try:
            await job(section)  # type: ignore[misc]
            self._failures = 0
        except UnavailableError as error:
            self._failures += 1
            if self._failures >= _FAILURES:
                raise
            _log.debug("section failed: url=%s section=%d cause=%s", self._file.record.url, section, error)
            await trio.sleep(0.5 * self._failures)
        finally:
            self._first.pop(section, None)
            self._fill.discard(section)
            self._file.news.set()

    async def _fetch_first(self, section: int) -> None:
        """Fetch a section that nobody knows, and say what it is."""
        file = self._file
        path = self._records.staging(file.key, section)
        staged = 0

        def arrived(size: int) -> None:
            nonlocal staged
            staged += size
            self.staged_bytes += size
            self._count(size)
            self._first[section] = trio.current_time()

        try:
            await self._room.make_room(file.plan.extent(section)[1])
            async with AsyncExitStack() as stack:
                if self._swarm is not None and self._alone:
                    await stack.enter_async_context(self._swarm.guard())
                digests = await fetch_section(self._origin, file.plan, section, path, self._buffers, arrived)
            table = file.plan.table(section, digests)
            self._hold(table.space_id)
            space = await trio.to_thread.run_sync(self._cache.adopt_space, table, path)
            self._room.stored(staged)
            self.staged_bytes -= staged
            staged = 0
            known = file.tables.get(section)
            if known is not None and known.space_id != table.space_id:
                raise DisagreementError(f"section {section} of {file.record.url} is told in two ways")
            file.tables[section] = table
            await self._opened(section, space, own=True)
            if self._swarm is not None:
                holds = await self._swarm.pins.publish(file.key, file.plan.length, section, digests)
                if holds is not None and holds != digests:
                    raise DisagreementError(f"section {section} of {file.record.url} is told in two ways")
        except BaseException as error:
            if self._swarm is not None:
                self._swarm.pins.give_back(file.key, [section], str(error))
            raise
        finally:
            self.staged_bytes -= staged

    def _count(self, size: int) -> None:
        self._sources["origin"] += size
        self._file.sources["origin"] += size
        self._fetcher.counters["origin_bytes"] += size

    async def _fill_section(self, section: int) -> None:
        """Get a section whose digests are known through the fetch pipeline."""
        file = self._file
        table = file.tables[section]
        counted: Counter[str] = Counter()
        chunk_map = chunk_map_of(file, section)
        name = str(self._origin)
        self._hold(table.space_id)
        await self._room.make_room(file.plan.extent(section)[1])
        source = await trio.to_thread.run_sync(self._fetcher.add_source, chunk_map, self._origin, name)
        try:
            space = await trio.to_thread.run_sync(self._cache.open_space, table)
            await self._opened(section, space, own=section in file.record.own)
            await self._fetcher.ensure(
                table.space_id,
                range(table.count),
                priority=Priority.PREFETCH,
                deadline_s=math.inf,
                on_behalf=counted,
            )
        except IntegrityError as error:
            if file.record.shared and section not in file.record.own:
                raise DisagreementError(str(error)) from error
            raise
        finally:
            self._fetcher.remove_source(source)
            self._sources.update(counted)
            file.sources.update(counted)

    def _hold(self, space_id: bytes) -> None:
        """Keep a data space, there or not yet, from being removed while the file has users. No checkpoint."""
        if space_id not in self._file.held:
            self._file.held.add(space_id)
            self._cache.acquire([space_id])

    async def _opened(self, section: int, space: DataSpace, *, own: bool) -> None:
        """Remember a section, and offer it to others."""
        record = self._file.record
        self._file.spaces[section] = space
        if self._swarm is not None:
            self._swarm.enter(space, "")
        if record.spaces.get(section) != space.space_id or own != (section in record.own):
            record.spaces[section] = space.space_id
            if own:
                record.own.add(section)
            self._records.save(record)  # a few kilobytes; in a thread it would meet changes of the record

    async def _keep_leases(self) -> None:
        while True:
            await trio.sleep(_ALIVE_S)
            now = trio.current_time()
            moving = [section for section, last in self._first.items() if now - last < 2 * _ALIVE_S]
            if moving and self._swarm is not None:
                self._swarm.pins.alive(self._file.key, moving)


def chunk_map_of(file: WebFile, section: int) -> ChunkMap:
    """Return the chunk map of one section, whose blob is the file itself, as it lies on the server."""
    builder = ChunkMapBuilder()
    table = file.tables[section]
    start = file.plan.extent(section)[0]
    space = builder.add_space(table.size)
    blob = builder.add_blob(Digest.of(file.key), file.plan.length)
    for chunk in range(table.count):
        offset, length = table.extent(chunk)
        builder.add_chunk(space, offset, length, table.digest(chunk), blob, start + offset, length, CODEC_RAW, 0)
    return ChunkMap(builder.to_bytes())


def first_of(error: BaseException) -> BaseException:
    """Return one error out of groups: a disagreement first, else one of ours, else any."""
    while isinstance(error, BaseExceptionGroup):
        part = error.subgroup(DisagreementError) or error.subgroup(RafsError) or error
        error = part.exceptions[0]
    return error
