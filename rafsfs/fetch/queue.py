"""The chunks on their way and the order in which they are taken: one flight per chunk, by who waits for it.

Rule: who joins a flight that others began has all of his own time. A flight is not given up before the last moment that any of those who
joined it named, whenever it began.

Concurrency: all state belongs to the trio thread and changes only between checkpoints; no method has one. A flight is queued, flown in the
batch of one worker, or parked for its base, never two of these.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

import trio

from ..errors import DaemonError, RafsError
from ..store.data_space import DataSpace


class Priority(IntEnum):
    """Who waits. What is leased comes before all prefetch: nobody else may fetch it, so the readers of all other nodes may wait for it."""

    DEMAND = 0
    LEASED = 1
    PREFETCH = 2


@dataclass(slots=True, eq=False)
class Flight:
    """One chunk on its way."""

    space: DataSpace
    index: int
    priority: Priority
    done: trio.Event
    waiters: int = 0
    until: float = -math.inf
    """Time before which it is tried again after a failure: of whoever waits longest, seconds of trio.current_time()."""
    started: bool = False
    error: RafsError | None = None
    origin: str = ""
    """Where the bytes came from, once they have: "origin", "local" or "peer"."""
    giver: str = ""
    """Address of the peer that they came from."""
    cause: RafsError | None = None
    """Why the last attempt failed, for whoever gives up first."""
    sponsor: Counter[str] | None = None
    """Whose figures the bytes go into: who asked first."""
    corrupt: int = 0
    """How often what came did not match its digest."""
    batch: list[Flight] | None = None
    """The batch that a worker flies it in; None while it is queued or parked."""
    base: Flight | None = None
    """What it is parked for."""
    is_aside: bool = False
    """Whether it waits for another node."""
    is_relieved: bool = False
    """Whether space has been made for it once already."""
    parked: list[Flight] = field(default_factory=list)
    """Those that need this one as their base."""

    @property
    def key(self) -> tuple[bytes, int]:
        return self.space.space_id, self.index


class FlightQueue:
    """The single-flight table and its queues, one per priority."""

    def __init__(self) -> None:
        self._flights: dict[tuple[bytes, int], Flight] = {}
        self._queues: tuple[deque[Flight], ...] = tuple(deque() for _ in Priority)
        self._closed = False
        self.wake: trio.Event = trio.Event()
        """Set, and replaced, whenever something is queued."""

    def find(self, space: DataSpace, index: int) -> Flight | None:
        """Return the flight of a chunk, if there is one. One of a data space that has been evicted since ends by itself."""
        flight = self._flights.get((space.space_id, index))
        return flight if flight is not None and flight.space is space else None

    def join(
        self, space: DataSpace, index: int, priority: Priority, on_behalf: Counter[str] | None, *, until: float
    ) -> Flight:
        """Return the flight of a chunk with one more waiter, who waits `until` then; no checkpoint."""
        flight = self.find(space, index)
        if flight is None:
            if self._closed:
                raise DaemonError("the daemon is stopping")
            flight = Flight(space, index, priority, trio.Event())
            self._flights[flight.key] = flight
            self.enqueue(flight)
        elif priority < flight.priority:
            self._hasten(flight, priority)
        _extend(flight, until)
        flight.waiters += 1
        if flight.sponsor is None:
            flight.sponsor = on_behalf
        return flight

    def start(
        self, space: DataSpace, index: int, sponsor: Counter[str] | None, priority: Priority = Priority.PREFETCH
    ) -> None:
        """Start a flight that nobody here waits for, unless the chunk has one."""
        if self.find(space, index) is None and not self._closed:
            flight = Flight(space, index, priority, trio.Event())
            flight.waiters = 1  # wanted by the window itself, whoever reads there
            flight.sponsor = sponsor
            self._flights[flight.key] = flight
            self.enqueue(flight)

    def lease(self, space: DataSpace, index: int) -> None:
        """Have a chunk fetched for other nodes, before all prefetch: a flight that waits for them ends its wait. No checkpoint."""
        flight = self.find(space, index)
        if flight is None:
            self.start(space, index, None, Priority.LEASED)
            return
        if flight.priority > Priority.LEASED:
            self._hasten(flight, Priority.LEASED)
        if not flight.waiters:
            flight.waiters = 1  # whoever wanted it has gone; others count on it now
        if flight.is_aside:
            self.unpark(flight)

    def park(self, flight: Flight, base: Flight) -> None:
        """Take a flight out of its batch until `base`, which has one more waiter for it, has landed."""
        flight.batch = None
        flight.base = base
        base.parked.append(flight)

    def set_aside(self, flight: Flight) -> None:
        """Take a flight out of its batch until another node has the chunk, or has had time enough."""
        flight.batch = None
        flight.is_aside = True

    def aside_of(self, space: DataSpace, chunks: Iterable[int]) -> list[int]:
        """Return those of `chunks` that wait for another node, and that no reader waits for."""
        found = ((index, self.find(space, index)) for index in chunks)
        return [i for i, f in found if f is not None and f.is_aside and f.priority is not Priority.DEMAND]

    def unpark(self, flight: Flight) -> None:
        """Queue a flight whose base has landed, or that has waited for another node."""
        flight.base = None
        flight.is_aside = False
        flight.started = False
        self.enqueue(flight)

    def remove(self, flight: Flight) -> None:
        """Forget a flight that has ended."""
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    def drop_space(self, space_id: bytes) -> None:
        """End what waits for chunks of a data space that has been evicted: nobody reads there. What is flown ends by itself."""
        for flight in [flight for flight in self._flights.values() if flight.key[0] == space_id]:
            if flight.is_aside or flight.base is not None or not flight.started:
                self.remove(flight)
                flight.error = DaemonError("the data space has been evicted")
                flight.done.set()

    def depths(self) -> dict[str, int]:
        """Return how many chunks are queued, by priority, in flight, and parked."""
        found = {"demand": 0, "leased": 0, "prefetch": 0, "in_flight": 0, "parked": 0}
        for flight in self._flights.values():
            if flight.base is not None or flight.is_aside:
                found["parked"] += 1
            elif flight.started:
                found["in_flight"] += 1
            else:
                found[flight.priority.name.lower()] += 1
        return found

    def close(self) -> list[Flight]:
        """Take no more; return all that are left."""
        self._closed = True
        return list(self._flights.values())

    def _hasten(self, flight: Flight, priority: Priority) -> None:
        """Put a flight, or what it is parked for, in a better queue."""
        flight.priority = priority
        if flight.base is not None:
            if priority < flight.base.priority:
                self._hasten(flight.base, priority)
        elif flight.is_aside:
            pass  # queued as what it is when it comes back
        elif not flight.started:
            self._queues[priority].append(flight)  # the entry in the other queue is skipped when met
            self._notify()

    def enqueue(self, flight: Flight) -> None:
        """Queue a flight behind those of its priority."""
        self._queues[flight.priority].append(flight)
        self._notify()

    def _notify(self) -> None:
        self.wake.set()
        self.wake = trio.Event()

    def take(self, merge_bytes: int, *, demand_only: bool, grain: int = 0) -> list[Flight]:
        """Take the next flight and its queued neighbours, up to one merged read, which does not go beyond a multiple of `grain` bytes."""
        first: Flight | None = None
        for queue in self._queues[: 1 if demand_only else None]:
            while queue and first is None:
                candidate = queue.popleft()
                if candidate.started or candidate.done.is_set():
                    continue
                if not candidate.waiters:
                    self.remove(candidate)
                    candidate.error = DaemonError("nobody waits for the chunk any more")
                    candidate.done.set()
                    continue
                first = candidate
        if first is None:
            return []
        first.started = True
        offset, size = first.space.table.extent(first.index)
        batch = [first]
        end = (offset // grain + 1) * grain - offset if grain else merge_bytes
        merge_bytes = min(merge_bytes, end)
        index = first.index + 1
        while size < merge_bytes:
            following = self.find(first.space, index)
            if following is None or following.started or not following.waiters:
                break
            if demand_only and following.priority is not Priority.DEMAND:
                break
            following.started = True
            batch.append(following)
            size += following.space.table.extent(index)[1]
            index += 1
        for flight in batch:
            flight.batch = batch
        return batch


def _extend(flight: Flight, until: float) -> None:
    """Have a flight, and what it is parked for, tried until then at least."""
    needed: Flight | None = flight
    while needed is not None:
        needed.until = max(needed.until, until)
        needed = needed.base


def of_batch(batch: list[Flight]) -> list[Flight]:
    """Return the flights of a batch that are still flown in it: neither landed nor parked."""
    return [flight for flight in batch if flight.batch is batch and not flight.done.is_set()]
