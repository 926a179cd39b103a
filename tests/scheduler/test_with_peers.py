"""The engine together with the cores of real peers, messages delayed and, between connections, in any order."""

from __future__ import annotations

import random
from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2p.core.effects import Effects, FillGroup, Follow, Requeue, Send, ShowRelayed
from p2p.core.errand import Inquire, Outcome, Reply, Steps, Take
from p2p.core.peer import PeerCore
from p2p.protocol.messages import VERSION, Answer, Ask, FromPeer, FromScheduler, Hello, Kind
from p2p.selection import Run
from scheduler.engine import LEASE_S, Engine, Out
from tests.simulation.content import SimContent, right_value

TASK = b"t" * 32
GROUPS = 6
NAMES = ["a", "b", "c", "d"]


class Peer:
    """A core, what it wants, and its connection, on which order is kept."""

    def __init__(self, name: str, seed: int, *, is_seed: bool) -> None:
        self.is_seed = is_seed
        self.content = SimContent(GROUPS, GROUPS * 4e6)
        self.core = PeerCore(name, random.Random(seed))
        self.task = self.core.enter(TASK, self.content, "image")
        self.up: deque[FromPeer] = deque()
        self.down: deque[FromScheduler] = deque()
        self.asked: dict[int, Steps] = {}
        self.to_fetch: set[int] = set()
        self.follows: deque[Run] = deque()
        self.begun: set[Run] = set()
        self.shown: dict[int, int] = {}
        self.seen: set[int] = set()
        self.told: tuple[object, int] = (None, 0)


class Swarm(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(random.Random(1))
        self.peers: dict[str, Peer] = {}
        self.now = 0.0
        self.numbers = 0

    # ---- what the shells do ----

    def perform(self, peer: Peer, effects: Effects) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                peer.up.append(effect.message)
            elif isinstance(effect, FillGroup):
                peer.to_fetch |= set(effect.chunks)
            elif isinstance(effect, Follow):
                peer.follows.append(effect.run)
            elif isinstance(effect, ShowRelayed):
                peer.shown = effect.depths
            elif isinstance(effect, Requeue):
                self.want(peer, effect.chunk)

    def deliver(self, out: Out) -> None:
        for name, message in out:
            if name in self.peers:
                self.peers[name].down.append(message)

    def want(self, peer: Peer, chunk: int) -> None:
        if peer.content.missing([chunk]):
            self.advance(peer, peer.core.errand(peer.task, [chunk], urgent=False).steps(self.now), None)

    def advance(self, peer: Peer, steps: Steps, reply: Reply | None) -> None:
        try:
            while True:
                step = next(steps) if reply is None else steps.send(reply)
                if isinstance(step, Take):
                    for run in step.runs:
                        self.take(peer, run.peer, run.first)
                elif isinstance(step, Inquire):
                    self.numbers += 1
                    peer.asked[self.numbers] = steps
                    peer.up.append(Ask(self.numbers, TASK, step.groups, False, step.again))
                    return
                else:
                    self.perform(peer, step.effects)
                reply = Reply(self.now)
        except StopIteration as end:
            outcome: Outcome = end.value
            peer.to_fetch |= set(outcome.ours)

    def take(self, peer: Peer, other: str, chunk: int) -> None:
        view = peer.task.neighbours[other]
        if other in self.peers and self.peers[other].content.has(chunk):
            self.land(peer, chunk)
        else:
            self.perform(peer, peer.core.was_absent(peer.task, view, chunk, self.now))

    def land(self, peer: Peer, chunk: int) -> None:
        peer.content.store(chunk, right_value(chunk))
        peer.to_fetch.discard(chunk)
        self.perform(peer, peer.core.landed(TASK, chunk, self.now))

    def listen(self, peer: Peer) -> None:
        for view in list(peer.task.neighbours.values()):
            other = self.peers.get(view.id)
            if other is None:
                self.perform(peer, peer.core.part(peer.task, view, unreachable=True))
                continue
            view.listening = True
            self.perform(peer, peer.core.is_getting(peer.task, view, set(other.task.leases), other.shown, self.now))
            fresh = [chunk for chunk in other.content.held() if not view.have[chunk]]
            for chunk in fresh:
                view.have[chunk] = 1
            self.perform(peer, peer.core.heard(peer.task, fresh))

    def one_up(self, name: str) -> None:
        peer = self.peers[name]
        if peer.up:
            message = peer.up.popleft()
            if isinstance(message, Hello):
                self.deliver(self.engine.connect(message, "h", self.now))
            else:
                self.deliver(self.engine.handle(name, message, self.now))

    def one_down(self, name: str) -> None:
        peer = self.peers[name]
        if not peer.down:
            return
        message = peer.down.popleft()
        if isinstance(message, Answer):
            self.perform(peer, peer.core.answered(TASK, message.rulings, self.now))
            steps = peer.asked.pop(message.number, None)
            if steps is not None:
                self.advance(peer, steps, Reply(self.now, message.rulings))
        else:
            self.perform(peer, peer.core.received(message, self.now))

    # ---- what happens ----

    @rule(name=st.sampled_from(NAMES), is_seed=st.booleans(), seed=st.integers(0, 99))
    def come(self, name: str, is_seed: bool, seed: int) -> None:
        if name not in self.peers:
            peer = self.peers[name] = Peer(name, seed, is_seed=is_seed)
            peer.up.append(Hello(VERSION, name, 1, Kind.SEED if is_seed else Kind.PEER))
            self.perform(peer, peer.core.join(peer.task, "s"))

    @precondition(lambda self: self.peers)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.peers)))
        del self.peers[name]
        self.deliver(self.engine.disconnect(name, self.now))

    @precondition(lambda self: self.peers)
    @rule(data=st.data(), chunk=st.integers(0, GROUPS - 1))
    def ask(self, data: st.DataObject, chunk: int) -> None:
        self.want(self.peers[data.draw(st.sampled_from(sorted(self.peers)))], chunk)

    @precondition(lambda self: self.peers)
    @rule(data=st.data(), up=st.booleans(), count=st.integers(1, 4))
    def carry(self, data: st.DataObject, up: bool, count: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.peers)))
        for _ in range(count):
            self.one_up(name) if up else self.one_down(name)

    @precondition(lambda self: self.peers)
    @rule(data=st.data(), works=st.booleans())
    def fetch(self, data: st.DataObject, works: bool) -> None:
        peer = self.peers[data.draw(st.sampled_from(sorted(self.peers)))]
        if peer.to_fetch:
            chunk = min(peer.to_fetch)
            if works:
                self.land(peer, chunk)
            else:
                peer.to_fetch.discard(chunk)
                self.perform(peer, peer.core.gave_up(TASK, [chunk], "x"))

    @precondition(lambda self: self.peers)
    @rule(data=st.data(), refused=st.booleans())
    def follow(self, data: st.DataObject, refused: bool) -> None:
        peer = self.peers[data.draw(st.sampled_from(sorted(self.peers)))]
        if peer.follows:
            self.end_follow(peer, peer.follows.popleft(), refused=refused)

    @precondition(lambda self: self.peers)
    @rule(data=st.data())
    def begin_to_follow(self, data: st.DataObject) -> None:
        """Whoever is followed agrees if he is getting the group, as what he shows says."""
        peer = self.peers[data.draw(st.sampled_from(sorted(self.peers)))]
        for run in peer.follows:
            other = self.peers.get(run.peer)
            if other is not None and (run.first in other.task.leases or run.first in other.shown):
                peer.begun.add(run)
                self.perform(peer, peer.core.follow_began(TASK, run))

    def end_follow(self, peer: Peer, run: Run, *, refused: bool) -> None:
        peer.begun.discard(run)
        other = self.peers.get(run.peer)
        if not refused and other is not None and other.content.has(run.first):
            self.land(peer, run.first)
        self.perform(peer, peer.core.follow_ended(TASK, run, self.now, refused=refused))

    @precondition(lambda self: self.peers)
    @rule(data=st.data())
    def hear(self, data: st.DataObject) -> None:
        self.listen(self.peers[data.draw(st.sampled_from(sorted(self.peers)))])

    @rule(seconds=st.floats(0.1, LEASE_S))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.deliver(self.engine.tick(self.now)[0])
        for peer in self.peers.values():
            self.perform(peer, peer.core.tick(self.now))

    # ---- what holds ----

    @invariant()
    def a_group_has_one_live_lease(self) -> None:
        """Whoever believes to have a lease has it, or is about to be told that it is gone, or has just given it back."""
        state = self.engine.tasks.get(TASK)
        for group in range(GROUPS):
            owners = [
                name
                for name, peer in self.peers.items()
                if group in peer.task.leases and not self.is_about_to_lose(peer, group)
            ]
            assert len(owners) <= 1, f"group {group} is leased to {owners}"
            if owners and state is not None and group in state.leases:
                assert state.leases[group].peer == owners[0]

    def is_about_to_lose(self, peer: Peer, group: int) -> bool:
        return any(group in getattr(message, "groups", ()) for message in (*peer.down, *peer.up))

    @invariant()
    def what_is_followed_waits_and_ends(self) -> None:
        for peer in self.peers.values():
            assert peer.task.followed <= set(peer.task.waiting)
            assert not peer.task.followed & set(peer.content.held())

    @invariant()
    def nobody_is_followed_in_a_circle(self) -> None:
        for group in range(GROUPS):
            waits = {
                name: {run.peer for run in peer.begun if run.first == group and run.first in peer.task.followed}
                for name, peer in self.peers.items()
            }
            while ends := [name for name, parents in waits.items() if not parents & waits.keys()]:
                for name in ends:
                    del waits[name]
            assert not waits, f"group {group} goes in a circle: {waits}"

    @invariant()
    def the_engine_counts_right(self) -> None:
        state = self.engine.tasks.get(TASK)
        if state is None:
            return
        for group in range(GROUPS):
            holders = [name for name, member in state.members.items() if member.has(group)]
            assert state.copies[group] == len(holders)
            found = state.find_holders(group, "nobody", None, random.Random(1))
            assert set(found) <= set(holders)
            assert bool(found) == bool(holders)
        for lease in state.leases.values():
            assert lease.peer in state.members
        for name, member in state.members.items():
            assert all(name in state.members[other].neighbours for other in member.neighbours)

    @invariant()
    def what_a_peer_has_only_grows(self) -> None:
        for name, peer in self.peers.items():
            held = set(peer.content.held())
            assert held >= peer.seen
            peer.seen = held
            member = state.members.get(name) if (state := self.engine.tasks.get(TASK)) else None
            if member is not None:  # a member that leaves, which is what eviction is, and comes again is another one
                told = int.from_bytes(member.have, "little")
                assert peer.told[0] is not member or peer.told[1] & ~told == 0
                peer.told = (member, told)
            for chunk in range(GROUPS):
                copies = sum(view.have[chunk] for view in peer.task.neighbours.values())
                assert peer.task.copies[chunk] == copies

    def teardown(self) -> None:
        """Left alone, everybody gets everything: no group waits for ever, and nobody waits for somebody who waits for him."""
        for _ in range(400):
            if all(peer.content.complete for peer in self.peers.values()):
                return
            for name, peer in list(self.peers.items()):
                while peer.up or peer.down:
                    self.one_up(name)
                    self.one_down(name)
                for chunk in peer.content.missing(range(GROUPS)):
                    if chunk not in peer.task.waiting and not peer.asked:
                        self.want(peer, chunk)
                for chunk in sorted(peer.to_fetch):
                    if peer.content.missing([chunk]):
                        self.land(peer, chunk)
                peer.to_fetch.clear()
                self.listen(peer)
            self.wait(0.5)
        raise AssertionError({name: peer.content.missing(range(GROUPS)) for name, peer in self.peers.items()})


TestSwarm = Swarm.TestCase
TestSwarm.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
