"""The connection to a neighbour in one task: its have-map, kept by listening to it, and chunks taken from it. What is known of it is in
`core.task.NeighbourView`; this module keeps that up to date.

Concurrency: `listen` is one task; it alone changes the have-map, between checkpoints. `fetch` may run several times at once, also to
follow what the neighbour is getting itself; that ends when `listen` does. Cancelled, `fetch` leaves chunks that are stored stored.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from rafsfs.errors import RafsError, RemoteError, UnavailableError
from rafsfs.net.http1 import HttpPool, Response
from rafsfs.net.origin import Origin, Target
from rafsfs.store.data_space import DataSpace

from .core.task import NeighbourView
from .entitlement import proof, whole_proof
from .have import HaveReader
from .keeping import Keeper, Order
from .selection import Run

_log = logging.getLogger(__name__)

_SILENT_S: Final = 6.0
"""A neighbour that says nothing for this long on its have-map is gone."""
STALL_S: Final = 3.0
"""A chunk that takes this long, and more than FACTOR times what the rate of the neighbour lets expect, is taken from somebody else."""
_FACTOR: Final = 4.0
MOST_STALL_S: Final = 20.0
"""No chunk of up to a MiB is waited for longer, however slow the neighbour is known to be: one that drips bytes would make itself ever more
patient hearers. A third of a reader's usual deadline."""
_FRAME_S: Final = 20.0
"""A frame of a have-map is whole within this time: single bytes are no sign of life."""
_HAVE_BYTES_PER_S: Final = 256 << 10
"""More of a have-map is not read; what is, is bounded by `HaveReader`."""


_FOLLOW_S: Final = 20.0
"""What is followed may pause for so long: the registry may be slow, and a lease without progress ends by itself before."""


Landed = Callable[[int], None]
"""Called with each chunk that is stored. No checkpoint."""


class BusyError(UnavailableError):
    """The neighbour has no slot free."""


class AbsentError(UnavailableError):
    """The neighbour does not have the chunk, whatever its map says."""


@dataclass(slots=True, eq=False)
class Neighbour:
    """The connection to a neighbour in one task, and what is known of it."""

    view: NeighbourView
    origin: Origin
    space: DataSpace
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Of the task that listens: cancelled when this peer leaves the task."""

    follows: set[trio.CancelScope] = field(default_factory=set)
    """Requests that follow what the neighbour is getting: they end with the have-map, which would say that it is silent."""

    @property
    def id(self) -> str:
        """The id of the peer."""
        return self.view.id

    async def listen(
        self,
        pool: HttpPool,
        headers: dict[str, str],
        came: Callable[[Neighbour, list[int], HaveReader], None],
        when_up: Callable[[], None],
    ) -> None:
        """Keep the have-map until the connection ends; `came` with chunks that are new, and what else it has told.

        Raises AbsentError if the neighbour does not take part, UnavailableError, RemoteError, FormatError.
        """
        target = Target(self.origin, f"/v1/{self.space.space_id.hex()}/have/{whole_proof(self.space.table)}")
        with trio.move_on_after(_SILENT_S) as scope:
            response = await pool.open(target, headers)
        if scope.cancelled_caught:
            raise UnavailableError(f"{self.origin} did not answer within {_SILENT_S:g} s when asked for its have-map")
        try:
            if response.status == 404:
                raise AbsentError(f"{self.origin} does not take part")
            if response.status != 200:
                raise RemoteError(f"{self.origin} answered {response.status} when asked for its have-map")
            reader = HaveReader(self.view.have)
            buffer = memoryview(bytearray(64 << 10))
            self.view.listening = True
            when_up()
            try:
                whole_at = due = trio.current_time()
                while True:
                    with trio.move_on_at(min(trio.current_time() + _SILENT_S, whole_at + _FRAME_S)) as scope:
                        got = await response.read_some(buffer)
                    if scope.cancelled_caught:
                        raise UnavailableError(f"{self.origin} has told nothing whole for {_SILENT_S:g} s or more")
                    if not got:
                        raise UnavailableError(f"{self.origin} ended its have-map")
                    frames = reader.frames
                    fresh = reader.feed(buffer[:got])
                    whole_at = trio.current_time() if reader.frames > frames else whole_at
                    came(self, fresh, reader)
                    if self.space.complete:
                        return
                    due = max(due, trio.current_time() - 4.0) + got / _HAVE_BYTES_PER_S
                    await trio.sleep_until(due)
            finally:
                self.view.listening = False
                self.view.pending = set()
                self.view.relayed = {}
                for follow in self.follows:
                    follow.cancel()
        finally:
            response.close()

    async def follow(
        self,
        run: Run,
        pool: HttpPool,
        headers: dict[str, str],
        keeper: Keeper,
        landed: Landed,
        began: Callable[[], None],
    ) -> None:
        """Get a run of chunks that the neighbour is getting itself, each when it is there; `began` when it has agreed. Raises as `fetch`
        does.
        """
        with trio.CancelScope() as scope:
            self.follows.add(scope)
            try:
                await self.fetch(run, pool, {**headers, "Rafs-Follow": "1"}, keeper, landed, follow=True, began=began)
            finally:
                self.follows.discard(scope)
        if scope.cancelled_caught:
            raise UnavailableError(f"{self.origin} has become silent")

    async def fetch(
        self,
        run: Run,
        pool: HttpPool,
        headers: dict[str, str],
        keeper: Keeper,
        landed: Landed,
        *,
        follow: bool = False,
        began: Callable[[], None] = lambda: None,
    ) -> None:
        """Get a run of chunks, each stored and announced as soon as it is here and right. `follow`: they need not be there yet.

        Raises IntegrityError for a chunk that is not what it should be, CacheError, BusyError, AbsentError, UnavailableError, RemoteError.
        """
        table = self.space.table
        left = 0 if follow else run.size  # what comes as slowly as from the registry says nothing of this neighbour
        self.view.standing.under_way += left
        order = Order(self.space.store, landed)
        failure: RafsError | None = None
        try:
            async with self._request(run, pool, headers) as (response, count):
                began()
                position = table.extent(run.first)[0]
                for chunk in range(run.first, run.first + count):
                    offset, length = table.extent(chunk)
                    held, view = keeper.buffers.take(length)
                    started = trio.current_time()
                    await self._within(response, offset - position, view, _FOLLOW_S if follow else STALL_S)
                    position = offset + length
                    if follow:
                        self.view.standing.bytes_got += length
                    else:
                        self.view.standing.note(length, trio.current_time() - started)
                        self.view.standing.under_way -= length
                        left -= length
                    keeper.put(order, chunk, held, view)
                    if order.error is not None:
                        break
        except RafsError as error:
            failure = error
        finally:
            self.view.standing.under_way -= left
        await order.wait()  # what has come counts, also when the rest did not
        failure = order.error or failure
        if failure is not None:
            raise failure

    @asynccontextmanager
    async def _request(self, run: Run, pool: HttpPool, headers: dict[str, str]) -> AsyncIterator[tuple[Response, int]]:
        last = run.first + run.count - 1
        shown = proof(self.space.table, run.first, last)
        target = Target(self.origin, f"/v1/{self.space.space_id.hex()}/{run.first}-{last}/{shown}")
        with trio.move_on_after(STALL_S) as scope:
            response = await pool.open(target, headers)
        if scope.cancelled_caught:
            raise UnavailableError(f"{self.origin} did not answer within {STALL_S:g} s")
        try:
            if response.status == 503:
                raise BusyError(f"{self.origin} is busy")
            if response.status in {404, 409}:  # evicted, or never here
                raise AbsentError(f"{self.origin} does not have chunk {run.first}")
            if response.status != 200:
                raise RemoteError(f"{self.origin} answered {response.status}")
            text = response.headers.get("rafs-chunks") or ""
            if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= run.count:
                raise RemoteError(f"{self.origin} gives {text[:20]!r} chunks, expected 1 to {run.count}")
            yield response, int(text)
        finally:
            response.close()

    async def _within(self, response: Response, gap: int, view: memoryview, least_s: float) -> None:
        """Read over the zeros before a chunk, and the chunk, in bounded time."""
        standing, length = self.view.standing, gap + len(view)
        patience = _FACTOR * (standing.under_way + length) / max(standing.rate, 1.0)
        limit = max(least_s, min(patience, MOST_STALL_S * max(1.0, length / (1 << 20))))
        with trio.move_on_after(limit) as scope:
            while gap > 0:
                step = min(gap, 64 << 10)
                await response.readinto(memoryview(bytearray(step)))
                gap -= step
            await response.readinto(view)
        if scope.cancelled_caught:
            raise UnavailableError(f"{self.origin} sent no whole chunk within {limit:.1f} s")
