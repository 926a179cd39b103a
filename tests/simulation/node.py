"""A simulated node: the core of its peer, and what stands in for the shells around it.

The pipeline (single flight per unit, eight workers of which two never prefetch, sixteen prefetches at once), the uploads (slots, refusals),
the have-maps (gathered 10 ms), stalls and silence follow rafsfs/fetch, p2p/upload.py and p2p/neighbour.py; their constants are imported
where they are importable. What is decided is decided by p2p/core.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from p2p.core.effects import Effects, FillGroup, Follow, Listen, Requeue, Send, ShowPending
from p2p.core.errand import Inquire, Outcome, Reply, Steps, Take
from p2p.core.peer import PeerCore
from p2p.core.prefetch import Prefetch
from p2p.core.task import NeighbourView, PeerTask
from p2p.link import ASK_S
from p2p.neighbour import STALL_S
from p2p.protocol.messages import VERSION, Answer, Ask, FromScheduler, Hello, Kind, Ruling
from p2p.selection import Run
from p2p.upload import FEWEST_FOLLOWERS, FOLLOWERS
from scheduler.engine import LEASE_S

from .content import SimContent, right_value

if TYPE_CHECKING:
    from .world import World

WORKERS, RESERVE, PREFETCHES = 8, 2, 16
GATHER_S = 0.01
SILENT_S, GONE_S = 6.0, 9.0
STALL_FACTOR = 4.0
READ_AHEAD = 4


@dataclass(slots=True, eq=False)
class Flight:
    """A unit on its way."""

    chunk: int
    urgent: bool
    state: str = "queued"  # flown, aside


@dataclass(slots=True, eq=False)
class Trip:
    """A worker with an errand."""

    flight: Flight
    steps: Steps
    open: int = 0
    asked: int = 0


@dataclass(slots=True)
class Behaviour:
    """How a node is not like others."""

    corrupt: bool = False
    """Serves wrong bytes, and claims to have everything."""
    empty: bool = False
    """Claims to have everything, and serves nothing."""
    upload: float = 1.0
    """Share of the usual capacity; 0: takes requests and sends nothing."""
    reads: bool = False
    """A reader goes through the model from the beginning; otherwise it is prefetched."""
    seed: bool = False


@dataclass(slots=True, eq=False)
class SimNode:
    """One node."""

    world: World
    name: str
    zone: int
    behaviour: Behaviour
    up: int
    down: int
    content: SimContent
    core: PeerCore = field(init=False)
    task: PeerTask = field(init=False)
    alive: bool = True
    finished_at: float | None = None
    began_at: float = 0.0
    uploads: int = 0
    origin_bytes: float = 0.0
    peer_bytes: float = 0.0
    followers: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    """Of units on their way here, who gets them next."""
    listeners: dict[str, SimNode] = field(default_factory=dict)
    views: dict[str, NeighbourView] = field(default_factory=dict)
    news: list[int] = field(default_factory=list)
    flights: dict[int, Flight] = field(default_factory=dict)
    queues: tuple[deque[Flight], deque[Flight]] = field(default_factory=lambda: (deque(), deque()))
    busy: int = 0
    busy_prefetch: int = 0
    prefetching: set[int] = field(default_factory=set)
    plan: Prefetch | None = None
    reading: int = -1
    from_registry: set[int] = field(default_factory=set)
    """Units on their way from the registry: a unit stands for many chunks, so its lease makes progress all the time."""
    trips: dict[int, Trip] = field(default_factory=dict)
    next_ask: int = 0
    ticks_due: set[float] = field(default_factory=set)

    # ---- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        world = self.world
        self.began_at = world.now
        self.core = PeerCore(self.name, world.rng)
        self.task = self.core.enter(world.task, self.content, "image")
        kind = Kind.SEED if self.behaviour.seed else Kind.PEER
        hello = Hello(VERSION, self.name, 1, kind, f"z{self.zone}")
        world.to_scheduler(self, hello)
        self.perform(self.core.join(self.task, "scheduler"))
        world.after(world.rng.random() * 0.5, self._periodic)
        world.after(world.rng.random() * 5, self._beat)
        if self.is_liar:
            world.claim_all(self)
        elif self.behaviour.reads:
            self.read_on()
        elif not self.behaviour.seed:
            self.plan = self.core.prefetch(self.task, [[chunk] for chunk in range(self.content.count)])
            self._prefetch()

    @property
    def is_liar(self) -> bool:
        return self.behaviour.corrupt or self.behaviour.empty

    def claims(self, chunk: int) -> bool:
        return self.is_liar or self.content.has(chunk)

    def die(self) -> None:
        """The machine is gone: nothing is told to anybody."""
        self.alive = False

    def _periodic(self) -> None:
        if self.alive and not (self.content.complete and not self.task.news):
            self._tick()
            self.world.after(0.5, self._periodic)
        elif self.alive:
            self.world.after(3.0, self._periodic)

    def _tick(self) -> None:
        if self.alive:
            leases = self.task.leases
            for chunk in self.from_registry:
                if chunk in leases:
                    leases[chunk] = self.world.now
            self.perform(self.core.tick(self.world.now))
            self._prefetch()

    def _tick_at(self, due: float) -> None:
        """The tick of a daemon comes ten times a second: this one at the first of these times behind `due`."""
        when = (int(due * 10) + 1) / 10
        if when not in self.ticks_due:
            self.ticks_due.add(when)
            self.world.at(when, self._due, when)

    def _due(self, when: float) -> None:
        self.ticks_due.discard(when)
        self._tick()

    def _beat(self) -> None:
        if self.alive:
            self.world.beat(self)
            self.world.after(5.0, self._beat)

    # ---- pipeline ------------------------------------------------------------------------------------------------

    def _prefetch(self) -> None:
        while self.plan is not None and self.plan.left and len(self.prefetching) < self.world.prefetches:
            batch = self.plan.choose(self.world.now)
            if batch is None:
                return
            if self.content.missing(batch):
                self.prefetching.add(batch[0])
                self.want(batch[0], urgent=False)

    def read_on(self) -> None:
        """Go on with the reader: the next unit that is not here is wanted, and some behind it."""
        missing = self.content.values
        while self.reading + 1 < self.content.count and missing[self.reading + 1] is not None:
            self.reading += 1
        following = self.reading + 1
        if following < self.content.count:
            self.want(following, urgent=True)
            for chunk in range(following + 1, min(following + 1 + READ_AHEAD, self.content.count)):
                if missing[chunk] is None:
                    self.want(chunk, urgent=False)

    def want(self, chunk: int, *, urgent: bool) -> None:
        flight = self.flights.get(chunk)
        if flight is None:
            flight = self.flights[chunk] = Flight(chunk, urgent)
            self.queues[0 if urgent else 1].append(flight)
        elif urgent and not flight.urgent:
            flight.urgent = True
            if flight.state == "queued":
                self.queues[0].append(flight)
        self._fly()

    def _fly(self) -> None:
        while self.busy < WORKERS:
            flight = self._take(self.queues[0])
            if flight is None and self.busy_prefetch < self.world.setting.downloads:
                flight = self._take(self.queues[1])
            if flight is None:
                return
            flight.state = "flown"
            self.busy += 1
            self.busy_prefetch += not flight.urgent
            steps = self.core.errand(self.task, [flight.chunk], urgent=flight.urgent).steps(self.world.now)
            self._advance(Trip(flight, steps), None, flight.urgent)

    def _take(self, queue: deque[Flight]) -> Flight | None:
        while queue:
            flight = queue.popleft()
            if flight.state == "queued" and self.flights.get(flight.chunk) is flight:
                return flight
        return None

    def _advance(self, trip: Trip, reply: Reply | None, urgent: bool) -> None:
        """Take the next steps of an errand until one takes time."""
        if not self.alive:
            return
        try:
            while True:
                step = next(trip.steps) if reply is None else trip.steps.send(reply)
                if isinstance(step, Take):
                    trip.open = len(step.runs)
                    for run in step.runs:
                        self._ask_neighbour(trip, run, urgent)
                    return
                if isinstance(step, Inquire):
                    self._inquire(trip, step, urgent)
                    return
                self.perform(step.effects)
                reply = Reply(self.world.now)
        except StopIteration as end:
            self._settle(trip, end.value, urgent)

    def _settle(self, trip: Trip, outcome: Outcome, urgent: bool) -> None:
        flight = trip.flight
        if outcome.ours:
            self.from_registry.add(flight.chunk)
            self.world.from_origin(self, flight.chunk, lambda good: self._from_origin(trip, good, urgent))
            return
        self._release(urgent)
        if outcome.waiting:
            flight.state = "aside"
            self._tick_at(self.task.waiting[flight.chunk])
        self._fly()

    def _from_origin(self, trip: Trip, good: bool, urgent: bool) -> None:
        if not self.alive:
            return
        chunk = trip.flight.chunk
        self.from_registry.discard(chunk)
        if good:
            self._release(urgent)
            if not self.content.has(chunk):
                self.origin_bytes += self.content.length(chunk)
                self.land(chunk, right_value(chunk))
            else:
                self._fly()
            return
        self.perform(self.core.gave_up(self.task.task, [chunk], "the registry is away"))
        self._release(urgent)
        trip.flight.state = "aside"
        self.world.after(0.5, self._again, chunk)

    def _again(self, chunk: int) -> None:
        if self.alive:
            self.requeue(chunk)

    def _release(self, urgent: bool) -> None:
        self.busy -= 1
        self.busy_prefetch -= not urgent

    def requeue(self, chunk: int) -> None:
        flight = self.flights.get(chunk)
        if flight is not None and flight.state == "aside":
            flight.state = "queued"
            self.queues[0 if flight.urgent else 1].append(flight)
            self._fly()

    def land(self, chunk: int, value: int) -> bool:
        """A unit has come; return whether it is right."""
        if not self.content.store(chunk, value):
            return False
        self.flights.pop(chunk, None)
        for follower in self.followers.pop(chunk, ()):
            follower()
        if not self.news:
            self.world.after(GATHER_S, self._tell_neighbours)
        self.news.append(chunk)
        self.perform(self.core.landed(self.task.task, chunk, self.world.now))
        self.prefetching.discard(chunk)
        if self.content.complete:
            self.finished_at = self.world.now
            self.world.completed(self)
        elif self.behaviour.reads:
            self.read_on()
        self._prefetch()
        self._fly()
        return True

    # ---- neighbours ----------------------------------------------------------------------------------------------

    def _ask_neighbour(self, trip: Trip, run: Run, urgent: bool) -> None:
        world, core = self.world, self.core
        view = self.task.neighbours.get(run.peer)
        other = world.nodes.get(run.peer)
        if view is None or other is None:
            world.after(0, self._run_over, trip, urgent)
            return
        standing = view.standing
        standing.under_way += run.size
        started = world.now
        limit = max(STALL_S, STALL_FACTOR * (standing.under_way + run.size) / max(standing.rate, 1.0))
        state = {"over": False, "transfer": 0}

        def over() -> bool:
            if state["over"]:
                return False
            state["over"] = True
            standing.under_way -= run.size
            if state["transfer"]:
                world.links.stop(state["transfer"])
                other.uploads -= 1
                state["transfer"] = 0
            return self.alive

        def stalled() -> None:
            if over():
                self.perform(core.was_stalled(self.task, view, world.now))
                self._run_over(trip, urgent)

        def refused(why: str) -> None:
            if over():
                if why == "busy":
                    core.was_busy(view, world.now)
                else:
                    self.perform(core.was_absent(self.task, view, run.first, world.now))
                self._run_over(trip, urgent)

        def arrived() -> None:
            """The request is at the other node."""
            if not other.alive or state["over"]:
                return
            if other.behaviour.empty or not other.claims(run.first):
                world.after(world.latency(other, self), refused, "absent")
            elif other.uploads >= world.setting.uploads:
                world.after(world.latency(other, self), refused, "busy")
            else:
                other.uploads += 1
                state["transfer"] = world.transfer(other, self, run.size, came)

        def came() -> None:
            state["transfer"] = 0
            other.uploads -= 1
            if not over():
                return
            standing.note(run.size, world.now - started)
            value = right_value(run.first) ^ (1 if other.behaviour.corrupt else 0)
            if self.content.has(run.first):
                pass
            elif self.land(run.first, value):
                self.peer_bytes += run.size
                world.moved[other.zone, self.zone] = world.moved.get((other.zone, self.zone), 0.0) + run.size
            else:
                world.wrong += 1
                self.perform(core.was_corrupt(self.task, view))
            self._run_over(trip, urgent)

        world.after(limit, stalled)
        world.after(world.latency(self, other), arrived)

    def _follow(self, run: Run) -> None:
        """Follow a unit that another node is fetching: it is sent on when it is there whole, since a unit here is as large as a group."""
        world = self.world
        other = world.nodes.get(run.peer)
        latency = world.latency(self, other) if other is not None else 0.0

        def ended(refused: bool) -> None:
            if self.alive:
                self.perform(self.core.follow_ended(self.task.task, run, world.now, refused=refused))

        def begin() -> None:
            assert other is not None
            if other.alive:
                world.transfer(other, self, run.size, came)
            else:
                world.after(SILENT_S, ended, False)

        def came() -> None:
            assert other is not None
            if not self.alive:
                return
            if not self.content.has(run.first):
                if self.land(run.first, right_value(run.first) ^ (1 if other.behaviour.corrupt else 0)):
                    self.peer_bytes += run.size
                    world.moved[other.zone, self.zone] = world.moved.get((other.zone, self.zone), 0.0) + run.size
                else:
                    world.wrong += 1
            ended(False)

        def arrived() -> None:
            if other is None or not other.alive:
                world.after(SILENT_S, ended, False)
                return
            waiting = other.followers.get(run.first, [])
            enough = max(FEWEST_FOLLOWERS, FOLLOWERS // max(1, len(other.task.leases)))
            if other.content.has(run.first):
                begin()
            elif run.first not in other.task.leases or other.is_liar or len(waiting) >= enough:
                world.after(latency, ended, True)
            else:
                other.followers.setdefault(run.first, []).append(begin)
                world.after(LEASE_S, over_late)

        def over_late() -> None:
            """It has been given up there."""
            if run.first in self.task.followed:
                ended(False)

        world.after(latency, arrived)

    def _run_over(self, trip: Trip, urgent: bool) -> None:
        trip.open -= 1
        if not trip.open:
            self._advance(trip, Reply(self.world.now), urgent)

    def _listen(self, view: NeighbourView) -> None:
        self.views[view.id] = view
        other = self.world.nodes.get(view.id)
        if other is None or not other.alive:
            self.world.after(GONE_S, self._part, view, True)
            return
        delay = self.world.latency(self, other)
        self.world.after(2 * delay, self._subscribe, view, other)

    def _subscribe(self, view: NeighbourView, other: SimNode) -> None:
        if not self.alive or self.content.complete:
            return
        if not other.alive:
            self.world.after(GONE_S, self._part, view, True)
            return
        other.listeners[self.name] = self
        have = list(range(self.content.count)) if other.is_liar else other.content.held()
        self.world.after(self.world.latency(other, self), self._first_map, view, have, set(other.task.leases))

    def _first_map(self, view: NeighbourView, have: list[int], pending: set[int]) -> None:
        if self.alive and not self.content.complete and self.task.neighbours.get(view.id) is view:
            view.listening = True
            self.hear(view, have)
            self.perform(self.core.is_getting(self.task, view, pending, {}))

    def hear(self, view: NeighbourView, chunks: list[int]) -> None:
        have = view.have
        fresh = [chunk for chunk in chunks if not have[chunk]]
        for chunk in fresh:
            have[chunk] = 1
        effects = self.core.heard(self.task, fresh)
        if effects:
            self.perform(effects)
        if len(self.prefetching) < self.world.prefetches:
            self._prefetch()

    def _tell_neighbours(self) -> None:
        news, self.news = self.news, []
        if self.alive and news:
            self._to_listeners(news, None)

    def _to_listeners(self, news: list[int] | None, pending: set[int] | None) -> None:
        near = [node for node in self.listeners.values() if node.zone == self.zone]
        far = [node for node in self.listeners.values() if node.zone != self.zone]
        for nodes in (near, far):
            if nodes:
                self.world.after(self.world.latency(self, nodes[0]), self._heard_by, nodes, news, pending)

    def _heard_by(self, nodes: list[SimNode], news: list[int] | None, pending: set[int] | None) -> None:
        for node in nodes:
            view = node.views.get(self.name)
            if not node.alive or view is None or not view.listening:
                continue
            if node.content.complete:
                self.listeners.pop(node.name, None)
            elif news is not None:
                node.hear(view, news)
            elif pending is not None:
                node.perform(node.core.is_getting(node.task, view, pending, {}))

    def neighbour_is_silent(self, name: str) -> None:
        """Nothing has come from a neighbour for SILENT_S, or its connection is broken."""
        view = self.views.get(name)
        if self.alive and view is not None and view.listening:
            view.listening = False
            view.pending = set()
            self.core.silent(self.task)
            self._tick_at(self.world.now)
            self.world.after(GONE_S, self._part, view, not self.content.complete)

    def _part(self, view: NeighbourView, unreachable: bool) -> None:
        if self.alive and self.views.get(view.id) is view:
            del self.views[view.id]
            self.perform(self.core.part(self.task, view, unreachable=unreachable and not self.content.complete))

    # ---- scheduler -----------------------------------------------------------------------------------------------

    def _inquire(self, trip: Trip, step: Inquire, urgent: bool) -> None:
        self.next_ask += 1
        number = trip.asked = self.next_ask
        self.trips[number] = trip
        self.world.to_scheduler(self, Ask(number, self.task.task, step.groups, urgent, step.again))
        self.world.after(ASK_S, self._answered, number, None)

    def _answered(self, number: int, rulings: list[Ruling] | None) -> None:
        trip = self.trips.pop(number, None)
        if trip is not None:
            self._advance(trip, Reply(self.world.now, rulings), trip.flight.urgent)

    def receive(self, message: FromScheduler) -> None:
        """Take a message of the scheduler."""
        if not self.alive:
            return
        if isinstance(message, Answer):
            self.perform(self.core.answered(self.task.task, message.rulings, self.world.now))
            self._answered(message.number, message.rulings)
        else:
            self.perform(self.core.received(message, self.world.now))

    def perform(self, effects: Effects) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.world.to_scheduler(self, effect.message)
            elif isinstance(effect, Requeue):
                self.requeue(effect.chunk)
            elif isinstance(effect, FillGroup):
                for chunk in effect.chunks:
                    self._fill(chunk)
            elif isinstance(effect, ShowPending):
                self._to_listeners(None, set(effect.groups))
            elif isinstance(effect, Follow):
                self._follow(effect.run)
            elif isinstance(effect, Listen):
                self._listen(effect.neighbour)

    def _fill(self, chunk: int) -> None:
        if chunk in self.flights:
            self.requeue(chunk)
        else:
            self.want(chunk, urgent=False)
