"""A simulated node: the core of its peer, and what stands in for the shells around it: pipeline.py, serving.py, mesh.py. Their constants
are imported where they are importable. What is decided is decided by p2p/core.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from p2p.core import effects as what
from p2p.core.errand import FOLLOW_S
from p2p.core.peer import PeerCore
from p2p.core.task import PeerTask
from p2p.protocol.messages import VERSION, Answer, FromScheduler, Hello, Kind
from p2p.upload import FEWEST_FOLLOWERS, FOLLOWERS

from .content import SimContent
from .links import NOBODY
from .mesh import Mesh
from .pipeline import Pipeline
from .serving import Follow, Request

if TYPE_CHECKING:
    from .world import World


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
    mesh: Mesh = field(init=False)
    pipeline: Pipeline = field(init=False)
    is_liar: bool = False
    alive: bool = True
    finished_at: float | None = None
    began_at: float = 0.0
    uploads: int = 0
    origin_bytes: float = 0.0
    peer_bytes: float = 0.0
    followers: dict[int, list[Follow]] = field(default_factory=dict)
    """Of units on their way here, to whom they are passed on."""
    relayed: dict[int, int] = field(default_factory=dict)
    """Of units that are followed here and that others may follow, how far from the registry this node is."""
    incoming: dict[int, int] = field(default_factory=dict)
    """Of units that may be passed on, the transfer by which they come."""
    exchanges: set[Request | Follow] = field(default_factory=set)
    """What has been asked of others."""
    serving: set[Request] = field(default_factory=set)
    """What is being sent to others who asked for it."""
    _ticks_due: set[float] = field(default_factory=set)

    # ---- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Come to life."""
        world = self.world
        self.began_at = world.now
        self.is_liar = self.behaviour.corrupt or self.behaviour.empty
        self.core = PeerCore(self.name, world.rng)
        self.task = self.core.enter(world.task, self.content, "image")
        self.mesh = Mesh(self)
        self.pipeline = Pipeline(self)
        kind = Kind.SEED if self.behaviour.seed else Kind.PEER
        world.to_scheduler(self, Hello(VERSION, self.name, 1, kind, f"z{self.zone}"))
        self.perform(self.core.join(self.task, "scheduler"))
        world.after(world.rng.random() * 0.5, self._periodic)
        world.after(world.rng.random() * 5, self._beat)
        if self.is_liar:
            world.claim_all(self)
        elif self.behaviour.reads:
            self.pipeline.read_on()
        elif not self.behaviour.seed:
            self.pipeline.plan = self.core.prefetch(self.task, [[chunk] for chunk in range(self.content.count)])
            self.pipeline.prefetch()

    def claims(self, chunk: int) -> bool:
        """Tell whether it says that it has a unit."""
        return self.content.values[chunk] is not None or self.is_liar

    def die(self, *, politely: bool) -> None:
        """The machine is gone: nothing is told to anybody, but that its connections are closed if it goes `politely`."""
        self.alive = False
        for exchange in list(self.exchanges):
            exchange.taker_died()
        for request in list(self.serving):
            request.giver_died(politely=politely)

    def _periodic(self) -> None:
        if self.alive and not (self.content.complete and not self.task.news):
            self._tick()
            self.world.after(0.5, self._periodic)
        elif self.alive:
            self.world.after(3.0, self._periodic)

    def _tick(self) -> None:
        if self.alive:
            leases = self.task.leases
            for chunk in self.pipeline.from_registry:
                if chunk in leases:
                    leases[chunk] = self.world.now
            if self.task.followed:  # a unit stands for many chunks here, too
                waiting, until = self.task.waiting, self.world.now + FOLLOW_S
                for exchange in [e for e in self.exchanges if type(e) is Follow]:
                    if exchange.look() and exchange.chunk in waiting:
                        waiting[exchange.chunk] = until
            effects = self.core.tick(self.world.now)
            if effects:
                self.perform(effects)
            if self.pipeline.room > 0:
                self.pipeline.prefetch()

    def tick_at(self, due: float) -> None:
        """The tick of a daemon comes ten times a second: this one at the first of these times behind `due`."""
        when = (int(due * 10) + 1) / 10
        if when not in self._ticks_due:
            self._ticks_due.add(when)
            self.world.at(when, self._due, when)

    def _due(self, when: float) -> None:
        self._ticks_due.discard(when)
        self._tick()

    def _beat(self) -> None:
        if self.alive:
            self.world.beat(self)
            self.world.after(5.0, self._beat)

    # ---- units ---------------------------------------------------------------------------------------------------

    def take(self, giver: SimNode, chunk: int, size: int, value: int) -> bool:
        """A unit has come from another node; return whether it is right."""
        if not self.land(chunk, value):
            self.world.wrong += 1
            return False
        self.peer_bytes += size
        moved, way = self.world.moved, (giver.zone, self.zone)
        moved[way] = moved.get(way, 0.0) + size
        return True

    def land(self, chunk: int, value: int) -> bool:
        """A unit has come; return whether it is right."""
        if not self.content.store(chunk, value):
            return False
        pipeline = self.pipeline
        pipeline.landed(chunk)
        self.incoming.pop(chunk, None)
        if self.followers:
            for follower in self.followers.pop(chunk, ()):
                follower.supplied(NOBODY)
        self.mesh.landed(chunk)
        self.perform(self.core.landed(self.task.task, chunk, self.world.now))
        if self.content.complete:
            self.finished_at = self.world.now
            self.world.completed(self)
        elif self.behaviour.reads:
            pipeline.read_on()
        pipeline.prefetch()
        pipeline.fly()
        return True

    def supply(self, chunk: int, transfer: int) -> None:
        """A unit begins to come in a way that others may follow."""
        self.incoming[chunk] = transfer
        for follower in self.followers.get(chunk, ()):
            follower.supplied(transfer)

    def is_coming(self, chunk: int) -> bool:
        """Tell whether a unit is being fetched or followed here."""
        return chunk in self.task.leases or chunk in self.relayed

    @property
    def most_followers(self) -> int:
        """To how many a unit is passed on."""
        return max(FEWEST_FOLLOWERS, FOLLOWERS // max(1, len(self.task.leases) + len(self.relayed)))

    def _tell_coming(self) -> None:
        self.mesh.show_coming(set(self.task.leases), self.relayed)
        for chunk in [chunk for chunk in self.followers if not self.is_coming(chunk)]:
            for follower in self.followers.pop(chunk):
                follower.given_up()

    # ---- decisions -----------------------------------------------------------------------------------------------

    def receive(self, message: FromScheduler) -> None:
        """Take a message of the scheduler."""
        if not self.alive:
            return
        if isinstance(message, Answer):
            self.perform(self.core.answered(self.task.task, message.rulings, self.world.now))
            self.pipeline.answered(message.number, message.rulings)
        else:
            self.perform(self.core.received(message, self.world.now))

    def perform(self, effects: what.Effects) -> None:
        """Do what the core has decided."""
        for effect in effects:
            if isinstance(effect, what.Requeue):
                self.pipeline.requeue(effect.chunk)
            elif isinstance(effect, what.Send):
                self.world.to_scheduler(self, effect.message)
            elif isinstance(effect, what.FillGroup):
                for chunk in effect.chunks:
                    self.pipeline.fill(chunk)
            elif isinstance(effect, what.ShowPending):
                self._tell_coming()
            elif isinstance(effect, what.ShowRelayed):
                self.relayed = effect.depths
                self._tell_coming()
            elif isinstance(effect, what.Follow):
                Follow(self, effect.run).send()
            elif isinstance(effect, what.Listen):
                self.mesh.listen(effect.neighbour)
