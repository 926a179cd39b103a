"""The simulated world: a virtual clock, links, a registry, one scheduler (the engine itself) and nodes.

Decided here: what a run is made of and when it is over. Rule: nothing here looks at a real clock but to measure what the engine costs, and
everything random comes from one seed, so a run can be had again.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from p2p.protocol.messages import Done, FromPeer, Hello, Ping
from p2p.upload import SLOTS, SMALL_SLOTS
from scheduler.engine import Engine, Out

from .content import SimContent
from .links import NO_LINK, NOBODY, Links
from .node import Behaviour, SimNode
from .pipeline import PREFETCHES, RESERVE, WORKERS
from .serving import SILENT_S

LATE_TICK_S = 1.0
SAMPLE = 64
"""Of so many messages to the scheduler the cost of one is measured."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is simulated. Sizes in bytes, rates in bytes per second."""

    peers: int
    size: float = 130e9
    units: int = 256
    origin: float = 1.25e9
    up: float = 1.25e9
    down: float = 1.25e9
    zones: int = 1
    zone_link: float = 0.0
    """Of each zone to all others, each way; 0: no limit."""
    latency_s: float = 0.0005
    """One way, within a zone."""
    far_latency_s: float = 0.005
    """One way, between zones, to the scheduler and to the registry."""
    step_s: float = 0.05
    downloads: int = WORKERS - RESERVE
    """Prefetched units on their way to a peer at once: the daemon's number, or fewer, as its chunks are smaller than units."""
    uploads: int = SLOTS - SMALL_SLOTS
    """Units on their way from a peer at once, likewise."""
    seed: int = 1
    churn: float = 0.0
    """Share of the peers that come late, and as large a share that goes again early, half of them without a word."""
    slow: float = 0.0
    """Share of the peers with a tenth of the upload rate."""
    stuck: float = 0.0
    """Share that takes requests and sends nothing."""
    corrupt: float = 0.0
    empty: float = 0.0
    readers: float = 0.0
    """Share that reads from the beginning to the end; the others prefetch all."""
    seeds: int = 0
    origin_away: tuple[float, float] = (0.0, 0.0)
    limit_s: float = 1e5

    @property
    def bound_s(self) -> float:
        """Lower bound of the time until the last peer has all: max(F/S, F/d, N·F/(S+N·U))."""
        n = self.peers
        return max(
            self.size / self.origin, self.size / self.down, n * self.size / (self.origin + (n + self.seeds) * self.up)
        )


@dataclass(slots=True)
class World:
    """One run."""

    setting: Setting
    rng: random.Random = field(init=False)
    now: float = 0.0
    task: bytes = b"t" * 32
    links: Links = field(default_factory=Links)
    nodes: dict[str, SimNode] = field(default_factory=dict)
    engine: Engine = field(init=False)
    moved: dict[tuple[int, int], float] = field(default_factory=dict)
    """Bytes by (zone of the giver, zone of the taker)."""
    wrong: int = 0
    """Units that came and were not what they should be."""
    messages: dict[str, int] = field(default_factory=dict)
    per_second: dict[int, int] = field(default_factory=dict)
    engine_s: float = 0.0
    """CPU of the scheduler, estimated."""
    origin_bytes: float = 0.0
    unfinished: set[str] = field(default_factory=set)
    _events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = field(default_factory=list)
    _numbers: Any = field(default_factory=itertools.count)
    _handled: int = 0
    prefetches: int = 0
    """Prefetches of a peer at once, those that wait counted: in the proportion of the daemon."""
    _origin_link: int = 0
    _zone_out: list[int] = field(default_factory=list)
    _zone_in: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        s = self.setting
        self.rng = random.Random(s.seed)
        self.engine = Engine(random.Random(s.seed + 1))
        self.prefetches = max(1, PREFETCHES * s.downloads // (WORKERS - RESERVE))
        self._origin_link = self.links.add(s.origin)
        for _ in range(s.zones):
            self._zone_out.append(self.links.add(s.zone_link) if s.zone_link else NO_LINK)
            self._zone_in.append(self.links.add(s.zone_link) if s.zone_link else NO_LINK)
        self._populate()
        self.after(LATE_TICK_S, self._engine_tick)

    # ---- clock ---------------------------------------------------------------------------------------------------

    def at(self, when: float, act: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (max(when, self.now), next(self._numbers), act, args))

    def after(self, seconds: float, act: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), act, args))

    def run(self) -> None:
        """Run until every peer that stays has all, or the limit is reached."""
        # Nothing here is garbage in cycles, and to look for it among millions of objects takes longer than the run.
        was_on = gc.isenabled()
        gc.disable()
        try:
            self._run()
        finally:
            if was_on:
                gc.enable()

    def _run(self) -> None:
        events, pop = self._events, heapq.heappop
        step = self.setting.step_s
        start = 0.0
        while self.unfinished and start < self.setting.limit_s:
            end = start + step
            if self.links.is_idle and events and events[0][0] > end:
                start = end = events[0][0]
            while events and events[0][0] <= end:
                when, _, act, args = pop(events)
                self.now = when
                act(*args)
            self.now = end
            for ended in self.links.advance(end - start) if end > start else ():
                ended()
            start = end

    # ---- who is there --------------------------------------------------------------------------------------------

    def _populate(self) -> None:
        s, rng = self.setting, self.rng
        for number in range(s.seeds):
            self._add(f"seed{number}", Behaviour(seed=True), stays=False)
        for number in range(s.peers):
            draw = rng.random()
            behaviour = Behaviour(reads=rng.random() < s.readers)
            for share, change in ((s.corrupt, {"corrupt": True}), (s.empty, {"empty": True}), (s.stuck, {"upload": 0.0}),
                                  (s.slow, {"upload": 0.1})):  # fmt: skip
                if draw < share:
                    for name, value in change.items():
                        setattr(behaviour, name, value)
                    break
                draw -= share
            goes = rng.random() < s.churn
            late = rng.random() * 0.3 * s.bound_s if rng.random() < s.churn else rng.random() * 0.2
            self.after(
                late, self._add, f"p{number}", behaviour, not goes and not (behaviour.corrupt or behaviour.empty)
            )
            if goes:
                self.after(late + rng.random() * s.bound_s, self._go, f"p{number}", rng.random() < 0.5)
            elif not (behaviour.corrupt or behaviour.empty):
                self.unfinished.add(f"p{number}")

    def _add(self, name: str, behaviour: Behaviour, stays: bool) -> None:
        s = self.setting
        node = SimNode(
            self, name, len(self.nodes) % s.zones, behaviour,
            self.links.add(s.up * behaviour.upload), self.links.add(s.down), SimContent(s.units, s.size),
        )  # fmt: skip
        self.nodes[name] = node
        node.start()

    def _go(self, name: str, politely: bool) -> None:
        node = self.nodes[name]
        node.die(politely=politely)
        if politely:
            self._deliver(self.engine.disconnect(name, self.now))
        for other in node.mesh.drop_all():
            self.after(0.01 if politely else SILENT_S, other.mesh.is_silent, name)
        self.links.set_capacity(node.up, 0.0)
        self.links.set_capacity(node.down, 0.0)

    def completed(self, node: SimNode) -> None:
        self.unfinished.discard(node.name)

    # ---- bytes ---------------------------------------------------------------------------------------------------

    def latency(self, one: SimNode, other: SimNode) -> float:
        return self.setting.latency_s if one.zone == other.zone else self.setting.far_latency_s

    def transfer(
        self, giver: SimNode, taker: SimNode, size: float, ended: Callable[[], None], behind: int = NOBODY
    ) -> int:
        far = giver.zone != taker.zone
        out = self._zone_out[giver.zone] if far else NO_LINK
        into = self._zone_in[taker.zone] if far else NO_LINK
        return self.links.start((giver.up, taker.down, out, into), size, ended, behind)

    def from_origin(self, node: SimNode, chunk: int, ended: Callable[[bool], None]) -> None:
        begin, end = self.setting.origin_away
        if begin <= self.now < end:
            self.after(1.0, ended, False)
            return
        size = node.content.length(chunk)
        links = (self._origin_link, node.down, NO_LINK, NO_LINK)

        def came() -> None:
            self.origin_bytes += size
            ended(True)

        def begin() -> None:
            if node.alive:
                node.supply(chunk, self.links.start(links, size, came))

        self.after(2 * self.setting.far_latency_s, begin)

    # ---- scheduler -----------------------------------------------------------------------------------------------

    def to_scheduler(self, node: SimNode, message: FromPeer) -> None:
        self.after(self.setting.far_latency_s, self._at_scheduler, node, message)

    def beat(self, node: SimNode) -> None:
        self.to_scheduler(node, Ping())

    def claim_all(self, node: SimNode) -> None:
        """A liar tells the scheduler that it has everything."""
        self.to_scheduler(node, Done(self.task, list(range(node.content.groups))))

    def _at_scheduler(self, node: SimNode, message: FromPeer) -> None:
        name = type(message).__name__
        self.messages[name] = self.messages.get(name, 0) + 1
        second = int(self.now)
        self.per_second[second] = self.per_second.get(second, 0) + 1
        self._handled += 1
        is_sample = not self._handled % SAMPLE  # to look at the clock costs as much as a message
        began = time.thread_time() if is_sample else 0.0
        if isinstance(message, Hello):
            out = self.engine.connect(message, "host", self.now)
        else:
            out = self.engine.handle(node.name, message, self.now)
        if is_sample:
            self.engine_s += SAMPLE * (time.thread_time() - began)
        self._deliver(out)

    def _deliver(self, out: Out) -> None:
        for name, message in out:
            node = self.nodes.get(name)
            if node is not None:
                self.after(self.setting.far_latency_s, node.receive, message)

    def _engine_tick(self) -> None:
        began = time.thread_time()
        out, silent = self.engine.tick(self.now)
        self.engine_s += time.thread_time() - began
        self._deliver(out)
        for name in silent:
            self._deliver(self.engine.disconnect(name, self.now))
        self.after(LATE_TICK_S, self._engine_tick)
