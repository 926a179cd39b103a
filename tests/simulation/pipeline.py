"""The fetch pipeline of a simulated node: single flight per unit, eight workers of which two never prefetch, a bounded number of prefetches
at once, as rafsfs/fetch does it. What is decided about a unit is decided by p2p/core.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from p2p.core.errand import Inquire, Outcome, Reply, Steps, Take
from p2p.core.prefetch import Prefetch
from p2p.link import ASK_S
from p2p.protocol.messages import Ask, Ruling

from .content import right_value
from .serving import Request

if TYPE_CHECKING:
    from .node import SimNode

WORKERS, RESERVE, PREFETCHES = 8, 2, 16
READ_AHEAD = 4
QUEUED, FLOWN, ASIDE = range(3)


class Flight:
    """A unit on its way, and the errand for it while a worker has it."""

    __slots__ = ("as_urgent", "chunk", "leased", "open", "state", "steps", "urgent")

    def __init__(self, chunk: int, urgent: bool) -> None:
        self.chunk = chunk
        self.urgent = urgent
        self.leased = False
        self.state = QUEUED
        self.steps: Steps | None = None
        self.open = 0
        """Requests to neighbours that the errand waits for."""
        self.as_urgent = urgent
        """How its worker has taken it."""


class Pipeline:
    """What a node wants, and how it is got."""

    __slots__ = (
        "_inquiries", "_next_ask", "_node", "_queues", "_world", "busy", "busy_prefetch", "flights", "from_registry", "plan", "prefetching",
        "reading", "room",
    )  # fmt: skip

    def __init__(self, node: SimNode) -> None:
        self._node = node
        self._world = node.world
        self._queues: tuple[deque[Flight], ...] = (deque(), deque(), deque())
        """Of what a reader waits for, what is leased, and the rest."""
        self._inquiries: dict[int, Flight] = {}
        self._next_ask = 0
        self.flights: dict[int, Flight] = {}
        self.busy = 0
        self.busy_prefetch = 0
        self.room = node.world.prefetches
        """How many prefetches may be added."""
        self.prefetching: set[int] = set()
        self.plan: Prefetch | None = None
        self.reading = -1
        self.from_registry: set[int] = set()
        """Units on their way from the registry: a unit stands for many chunks, so its lease makes progress all the time."""

    # ---- what is wanted ------------------------------------------------------------------------------------------

    def prefetch(self) -> None:
        """Choose what to prefetch while there is room."""
        plan = self.plan
        while plan is not None and self.room > 0 and plan.left:
            batch = plan.choose(self._world.now)
            if batch is None:
                return
            chunk = batch[0]
            if not self._node.content.has(chunk):
                self.prefetching.add(chunk)
                self.room -= 1
                self.want(chunk, urgent=False)

    def read_on(self) -> None:
        """Go on with the reader: the next unit that is not here is wanted, and some behind it."""
        content = self._node.content
        values = content.values
        while self.reading + 1 < content.count and values[self.reading + 1] is not None:
            self.reading += 1
        following = self.reading + 1
        if following < content.count:
            self.want(following, urgent=True)
            for chunk in range(following + 1, min(following + 1 + READ_AHEAD, content.count)):
                if values[chunk] is None:
                    self.want(chunk, urgent=False)

    def want(self, chunk: int, *, urgent: bool) -> None:
        """Have a unit fetched, unless it is on its way."""
        flight = self.flights.get(chunk)
        if flight is None:
            flight = self.flights[chunk] = Flight(chunk, urgent)
            self._enqueue(flight)
        elif urgent and not flight.urgent:
            flight.urgent = True
            if flight.state == QUEUED:
                self._enqueue(flight)
            elif flight.state == ASIDE:
                node = self._node
                node.perform(node.core.hurry(node.task.task, [chunk], self._world.now))
        self.fly()

    def fill(self, chunk: int) -> None:
        """A unit is ours to fetch, whether it is wanted here or not: before all that is only prefetched."""
        flight = self.flights.get(chunk)
        if flight is None:
            flight = self.flights[chunk] = Flight(chunk, urgent=False)
        flight.leased = True
        if flight.state == QUEUED:
            self._enqueue(flight)
            self.fly()
        else:
            self.requeue(chunk)

    def _enqueue(self, flight: Flight) -> None:
        self._queues[0 if flight.urgent else 1 if flight.leased else 2].append(flight)

    def requeue(self, chunk: int) -> None:
        """A unit that was put aside is tried again."""
        flight = self.flights.get(chunk)
        if flight is not None and flight.state == ASIDE:
            flight.state = QUEUED
            self._enqueue(flight)
            self.fly()

    def landed(self, chunk: int) -> None:
        """A unit is here."""
        self.flights.pop(chunk, None)
        if chunk in self.prefetching:
            self.prefetching.discard(chunk)
            self.room += 1

    # ---- workers -------------------------------------------------------------------------------------------------

    def fly(self) -> None:
        """Give what is queued to idle workers."""
        demand, leased, prefetch = self._queues
        downloads = self._world.setting.downloads
        while self.busy < WORKERS:
            flight = self._take(demand) if demand else None
            if flight is None and self.busy_prefetch < downloads:
                flight = self._take(leased) or self._take(prefetch)
            if flight is None:
                return
            flight.state = FLOWN
            flight.as_urgent = flight.urgent
            self.busy += 1
            self.busy_prefetch += not flight.urgent
            node = self._node
            flight.steps = node.core.errand(node.task, [flight.chunk], urgent=flight.urgent).steps(self._world.now)
            self._advance(flight, None)

    def _take(self, queue: deque[Flight]) -> Flight | None:
        while queue:
            flight = queue.popleft()
            if flight.state == QUEUED and self.flights.get(flight.chunk) is flight:
                return flight
        return None

    def _advance(self, flight: Flight, reply: Reply | None) -> None:
        """Take the next steps of an errand until one takes time."""
        node = self._node
        steps = flight.steps
        assert steps is not None
        if not node.alive:
            return
        try:
            while True:
                step = next(steps) if reply is None else steps.send(reply)
                if isinstance(step, Take):
                    flight.open = len(step.runs)
                    for run in step.runs:
                        Request(node, flight, run).send()
                    return
                if isinstance(step, Inquire):
                    self._inquire(flight, step)
                    return
                node.perform(step.effects)
                reply = Reply(self._world.now)
        except StopIteration as end:
            self._settle(flight, end.value)

    def request_over(self, flight: Flight) -> None:
        """One of the requests of an errand has ended, however."""
        flight.open -= 1
        if not flight.open:
            self._advance(flight, Reply(self._world.now))

    def _settle(self, flight: Flight, outcome: Outcome) -> None:
        if outcome.ours:
            self.from_registry.add(flight.chunk)
            self._world.from_origin(self._node, flight.chunk, lambda good: self._from_origin(flight, good))
            return
        self._release(flight)
        if outcome.waiting:
            flight.state = ASIDE
            self._node.tick_at(self._node.task.waiting[flight.chunk])
        self.fly()

    def _from_origin(self, flight: Flight, good: bool) -> None:
        node, chunk = self._node, flight.chunk
        if not node.alive:
            return
        self.from_registry.discard(chunk)
        self._release(flight)
        if not good:
            node.perform(node.core.gave_up(node.task.task, [chunk], "the registry is away"))
            flight.state = ASIDE
            self._world.after(0.5, self._again, chunk)
        elif node.content.has(chunk):
            self.fly()
        else:
            node.origin_bytes += node.content.length(chunk)
            node.land(chunk, right_value(chunk))

    def _again(self, chunk: int) -> None:
        if self._node.alive:
            self.requeue(chunk)

    def _release(self, flight: Flight) -> None:
        self.busy -= 1
        self.busy_prefetch -= not flight.as_urgent
        flight.steps = None

    # ---- the scheduler -------------------------------------------------------------------------------------------

    def _inquire(self, flight: Flight, step: Inquire) -> None:
        self._next_ask += 1
        number = self._next_ask
        self._inquiries[number] = flight
        node = self._node
        self._world.to_scheduler(node, Ask(number, node.task.task, step.groups, flight.as_urgent, step.again))
        self._world.after(ASK_S, self.answered, number, None)

    def answered(self, number: int, rulings: list[Ruling] | None) -> None:
        """The scheduler has answered, or not in time."""
        flight = self._inquiries.pop(number, None)
        if flight is not None:
            self._advance(flight, Reply(self._world.now, rulings))
