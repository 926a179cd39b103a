"""The scheduler's decisions: (state, event, now) → messages. Pure but for its own state: no clock, no socket, randomness from the caller.

Decided here: who is introduced to whom, who may fetch what from the registry, when a lease ends. Rules that the tests hold: a group has
at most one live lease; a group that somebody asked for and nobody has is leased, or as many leases are out as may be; a group that is
held is never leased unless the asker has complained of all its holders. Cost: an event looks at the groups it names and at most SAMPLE
peers, a tick at what is due; neither grows with the peers of a task.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Final

from p2p.protocol.messages import (
    Answer,
    Ask,
    Complaint,
    Contact,
    Done,
    Failed,
    Fill,
    Filled,
    FromPeer,
    FromScheduler,
    Hello,
    Join,
    Kind,
    Leave,
    Neighbours,
    Order,
    PinAlive,
    PinAsk,
    PinFailed,
    Ping,
    PinPut,
    Preheat,
    Progress,
    Report,
    Revoke,
    Ruling,
    Verdict,
)

from .address import usable_address
from .pins import PinTable
from .preheats import PreheatTable
from .state import Member, PeerState, TaskState
from .weights import Place, score

Out = list[tuple[str, FromScheduler]]

LEASE_S: Final = 15.0
"""Without progress for this long a lease moves on."""
REST_S: Final = 2.0
"""A peer that gave a lease back gets none of that task for this long, if others are there."""
SILENT_S: Final = 20.0
"""A peer that has said nothing for this long is gone."""
PEER_LEASES: Final = 2
"""Leases of a task that one peer holds at once, unless a reader waits. A seed is ordered to fetch as many, so that its link is not what all
wait for, and gets twice as many if it asks."""
FEWEST_LEASES: Final = 6
"""Leases of a task out at once: at least this many, at most MOST_LEASES, and between them PACE times as many as have been finished in the
last second or so. Few enough that what is fetched is soon whole and can be passed on (a registry divides its rate among all of them), many
enough that the registry is always busy."""
MOST_LEASES: Final = 64
PACE: Final = 1.0
"""The number grows as long as a group takes less than so many seconds: a registry that gives more with more requests is given more."""
TASKS_PER_PEER: Final = 4096
"""Data spaces that one peer takes part in at most: 16 TiB of images."""
GROUPS_PER_PEER: Final = 8 << 20
"""Groups of all its tasks: 32 TiB, and 90 MB that one peer can make a scheduler hold."""
SAMPLE: Final = 32
"""Peers looked at to find neighbours."""
NEW_NEIGHBOURS: Final = 8
"""Neighbours that a newcomer is introduced to: half of them the best of a sample, half at random."""
CROWDED: Final = 24
"""Neighbours in a task from which on a peer gets more only if it has asked PATIENCE times in vain, or a reader waits: the mesh brings a
group that is being fetched to everybody, and the first holder has better things to do than to serve them all."""
PATIENCE: Final = 3
LATER_S: Final = 1.0
"""How long who is told to come later, or to wait for nobody in particular, is told to wait at least. What he asked for is remembered: he
need not come again to get it."""
ASKS_PER_S: Final = 1000
"""Questions per second of one task that are let come again: who must wait in a crowd of thousands is told to wait longer. What neighbours
announce ends the wait earlier."""
MOST_LATER_S: Final = 10.0
AVOID_S: Final = 60.0
"""How long who complained of a peer that stalled, or could not be reached, is not pointed at it."""
BAN_S: Final = 600.0
"""How long a peer that two others, on different hosts, accuse of wrong bytes is handed to nobody."""
_FAILURE_HALF_LIFE_S: Final = 120.0


class Engine:
    """The state of one scheduler."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.peers: dict[str, PeerState] = {}
        self.tasks: dict[bytes, TaskState] = {}
        self.preheats = PreheatTable()
        self.pins = PinTable()
        self._seeds: set[str] = set()
        self._seen: dict[str, None] = {}
        """Peers, the one that has been silent longest first."""
        self._due: list[tuple[float, bytes, int]] = []
        """Heap of (time, task, group): leases to be looked at then."""
        self._accused: set[str] = set()
        self._handlers: dict[type, Callable[[str, FromPeer, float], Out]] = {
            Join: self._join,
            Leave: self._leave,
            Ask: self._ask,
            Done: self._done,
            Progress: self._progress,
            Failed: self._failed,
            Report: self._report,
            Ping: lambda peer, event, now: [],
            Preheat: self._preheat,
            Filled: self._filled,
            **self._pin_handlers(),
        }

    def _pin_handlers(self) -> dict[type, Callable[[str, FromPeer, float], Out]]:
        def ask(peer: str, event: FromPeer, now: float) -> Out:
            assert isinstance(event, PinAsk)
            return self.pins.ask(peer, event, now)

        def put(peer: str, event: FromPeer, now: float) -> Out:
            assert isinstance(event, PinPut)
            return self.pins.put(peer, event, now)

        def alive(peer: str, event: FromPeer, now: float) -> Out:
            assert isinstance(event, PinAlive)
            return self.pins.alive(peer, event, now)

        def failed(peer: str, event: FromPeer, now: float) -> Out:
            assert isinstance(event, PinFailed)
            return self.pins.failed(peer, event, now)

        return {PinAsk: ask, PinPut: put, PinAlive: alive, PinFailed: failed}

    def connect(self, hello: Hello, host: str, now: float) -> Out:
        """A program has connected. An older connection of the same id is taken to be dead."""
        self.disconnect(hello.id, now)
        address = hello.address if usable_address(hello.address, host) else host
        contact = Contact(hello.id, address, hello.port, hello.kind)
        self.peers[hello.id] = PeerState(contact, Place(hello.zone, hello.rack), now, host=host)
        self._seen[hello.id] = None
        if hello.kind is Kind.SEED:
            self._seeds.add(hello.id)
        return []

    def disconnect(self, peer: str, now: float) -> Out:
        """A connection has ended: its leases are free at once."""
        state = self.peers.pop(peer, None)
        if state is None:
            return []
        self._seen.pop(peer, None)
        self._seeds.discard(peer)
        self._accused.discard(peer)
        out: Out = []
        for task in list(state.tasks):
            out += self._remove(task, peer, now)
        return out + self.pins.gone(peer, now) + self.preheats.gone(peer)

    def handle(self, peer: str, event: FromPeer, now: float) -> Out:
        """Take one message of a connected peer."""
        state = self.peers.get(peer)
        handler = self._handlers.get(type(event))
        if state is None or handler is None:
            return []
        state.last_seen = now
        del self._seen[peer]
        self._seen[peer] = None
        return handler(peer, event, now)

    def tick(self, now: float) -> tuple[Out, list[str]]:
        """Let time pass: return messages, and the peers that have been silent too long, whose connections the caller ends."""
        late: dict[tuple[bytes, str], list[int]] = {}
        while self._due and self._due[0][0] <= now:
            _, task, group = heapq.heappop(self._due)
            state = self.tasks.get(task)
            lease = state.leases.get(group) if state is not None else None
            if state is None or lease is None:
                continue
            if lease.expires > now:
                heapq.heappush(self._due, (lease.expires, task, group))
                continue
            state.end_lease(group)
            late.setdefault((task, lease.peer), []).append(group)
        out: Out = self.pins.tick(now)
        for (task, peer), groups in late.items():
            self.tasks[task].members[peer].rests_until = now + REST_S
            self._note_failure(peer, now)
            out.append((peer, Revoke(task, groups)))
        for task in {task for task, _ in late}:
            out += self._grant(self.tasks[task], now)
        silent = []
        for peer in self._seen:
            if now - self.peers[peer].last_seen <= SILENT_S:
                break
            silent.append(peer)
        return out, silent

    # ---- taking part ---------------------------------------------------------------------------------------------

    def _join(self, peer: str, event: FromPeer, now: float) -> Out:
        assert isinstance(event, Join)
        mine = self.peers[peer]
        is_new = event.task not in mine.tasks
        if is_new and (len(mine.tasks) >= TASKS_PER_PEER or mine.groups + event.groups > GROUPS_PER_PEER):
            return []  # it goes to the registry by itself for what is more
        state = self.tasks.get(event.task)
        if state is None or (not state.members and state.groups != event.groups):
            state = self.tasks[event.task] = TaskState(event.task, event.groups, event.image)
        if state.groups != event.groups:
            return []  # a task's size follows from its id: who says otherwise is wrong, or lies
        state.image = state.image or event.image
        if peer in state.members:
            self._unlink(state, peer)
        state.add(peer, event.have, is_seed=mine.is_seed)
        mine.tasks.add(event.task)
        mine.groups += event.groups if is_new else 0
        return self._introduce(state, peer, now) + self._wake_seeds(state, peer)

    def _wake_seeds(self, state: TaskState, peer: str) -> Out:
        """Tell the seeds of a task that ordinary peers have begun: they fetch it, too."""
        if state.ordered or not state.image or self.peers[peer].is_seed:
            return []
        state.ordered = True
        return [(seed, Fill(0, state.image)) for seed in sorted(self._seeds) if seed not in state.members]

    def _leave(self, peer: str, event: FromPeer, now: float) -> Out:
        assert isinstance(event, Leave)
        mine = self.peers[peer]
        if event.task in mine.tasks:
            mine.groups -= self.tasks[event.task].groups
            mine.tasks.discard(event.task)
            return self._remove(event.task, peer, now)
        return []

    def _remove(self, task: bytes, peer: str, now: float) -> Out:
        state = self.tasks.get(task)
        if state is None or peer not in state.members:
            return []
        self._unlink(state, peer)
        state.remove(peer)
        if not state.members:
            del self.tasks[task]
            return []
        return self._grant(state, now)

    def _introduce(self, state: TaskState, peer: str, now: float) -> Out:
        """Give a peer neighbours, and give them to it."""
        me = self.peers[peer]
        member = state.members[peer]
        wanted = NEW_NEIGHBOURS - len(member.neighbours)
        if wanted <= 0:
            return []
        met = member.neighbours
        others = [other for other in self._sample(state) if other not in met and other != peer]
        if member.blocked or self._accused:
            others = [o for o in others if not member.avoids(o, now) and not self._is_banned(o, now)]
        if not others:
            return []
        if len(others) > wanted:
            ranked = sorted(others, key=lambda other: -self._score(me, other, now))
            half = (wanted + 1) // 2
            others = ranked[:half] + self._rng.sample(ranked[half:], wanted - half)
        out: Out = [(peer, Neighbours(state.task, [self.peers[other].contact for other in others]))]
        for other in others:
            self._connect_pair(state, peer, other)
            out.append((other, Neighbours(state.task, [me.contact])))
        return out

    def _sample(self, state: TaskState) -> list[str]:
        # Of the newest, too: they have few neighbours.
        return list(dict.fromkeys([*state.names.newest(SAMPLE // 4), *state.names.draw(self._rng, SAMPLE)]))

    def _connect_pair(self, state: TaskState, one: str, other: str) -> None:
        if other not in state.members[one].neighbours:
            state.members[one].neighbours.add(other)
            state.members[other].neighbours.add(one)
            self.peers[one].degree += 1
            self.peers[other].degree += 1

    def _unlink(self, state: TaskState, peer: str) -> None:
        for other in list(state.members[peer].neighbours):
            self._part_pair(state, peer, other)

    def _part_pair(self, state: TaskState, one: str, other: str) -> None:
        if other in state.members[one].neighbours:
            for mine, theirs in ((one, other), (other, one)):
                if mine in state.members:
                    state.members[mine].neighbours.discard(theirs)
                if mine in self.peers:
                    self.peers[mine].degree -= 1

    def _score(self, me: PeerState, other: str, now: float) -> float:
        peer = self.peers[other]
        return score(me.place, peer.place, degree=peer.degree, is_seed=peer.is_seed, failures=self._failures(peer, now))

    # ---- leases --------------------------------------------------------------------------------------------------

    def _ask(self, peer: str, event: FromPeer, now: float) -> Out:
        assert isinstance(event, Ask)
        state = self.tasks.get(event.task)
        if state is None or peer not in state.members:
            return [(peer, Answer(event.number, []))]
        out: Out = []
        member = state.members[peer]
        may: Callable[[str], bool] | None = None
        if member.blocked or self._accused:

            def may(other: str) -> bool:
                return not member.avoids(other, now) and not self._is_banned(other, now)

        rulings = [
            self._rule(state, peer, member, group, now, event, may, out)
            for group in event.groups
            if group < state.groups
        ]
        return [(peer, Answer(event.number, rulings)), *out]

    def _rule(
        self, state: TaskState, peer: str, member: Member, group: int, now: float, ask: Ask,
        may: Callable[[str], bool] | None, out: Out,
    ) -> Ruling:  # fmt: skip
        lease = state.leases.get(group)
        if lease is not None and lease.expires <= now:
            state.end_lease(group)
            self._note_failure(lease.peer, now)
            out.append((lease.peer, Revoke(state.task, [group])))
            lease = None
        if lease is not None and lease.peer == peer:
            lease.expires = now + LEASE_S
            return Ruling(group, Verdict.LEASE)
        holders = state.find_holders(group, peer, may, self._rng)
        if holders:
            return self._point(state, peer, group, holders, Verdict.HELD, ask, out)
        if lease is not None and not member.avoids(lease.peer, now):
            return self._point(state, peer, group, [lease.peer], Verdict.WAIT, ask, out)
        if lease is not None:
            return self._later(state, group)
        seed = self._seed_for(state, peer, member, now)
        if seed is not None:
            self._lease(state, seed, group, now)
            out.append((seed, Order(state.task, group, state.image)))
            return self._point(state, peer, group, [seed], Verdict.WAIT, ask, out)
        if not self._may_lease(state, peer, member, now, urgent=ask.urgent):
            state.wanted.add(group, peer)
            return self._later(state, group)
        self._lease(state, peer, group, now)
        return Ruling(group, Verdict.LEASE)

    def _grant(self, state: TaskState, now: float) -> Out:
        """There may be room for leases: give what has been asked for longest to a seed, or to one of those who asked. No more are looked at
        than SAMPLE: who asked for the others comes again.
        """
        out: Out = []
        for group, askers in state.wanted.oldest(SAMPLE):
            if not self._has_room(state, now):
                break
            if state.copies[group]:
                state.wanted.drop(group)
                continue
            taker = self._taker(state, askers, now)
            if taker is not None:
                self._lease(state, taker, group, now)
                out.append((taker, Order(state.task, group, state.image)))
        return out

    def _taker(self, state: TaskState, askers: list[str], now: float) -> str | None:
        for peer in askers:
            member = state.members.get(peer)
            if member is not None:
                seed = self._seed_for(state, peer, member, now)
                if seed is not None:
                    return seed
                if self._may_lease(state, peer, member, now, urgent=False):
                    return peer
        return None

    def _lease(self, state: TaskState, peer: str, group: int, now: float) -> None:
        state.start_lease(peer, group, now + LEASE_S)
        heapq.heappush(self._due, (now + LEASE_S, state.task, group))

    def _later(self, state: TaskState, group: int) -> Ruling:
        return Ruling(group, Verdict.LATER, None, self._patience(state))

    def _patience(self, state: TaskState) -> float:
        return min(MOST_LATER_S, max(LATER_S, len(state.members) / ASKS_PER_S))

    def _may_lease(self, state: TaskState, peer: str, member: Member, now: float, *, urgent: bool) -> bool:
        if member.rests_until > now and len(state.members) > 1:
            return False
        most = PEER_LEASES * (2 if self.peers[peer].is_seed else 1)
        if urgent:
            return len(member.leases) < 4 * most
        return len(member.leases) < most and self._has_room(state, now)

    def _has_room(self, state: TaskState, now: float) -> bool:
        return len(state.leases) < min(MOST_LEASES, max(FEWEST_LEASES, PACE * state.pace_at(now)))

    def _seed_for(self, state: TaskState, peer: str, member: Member, now: float) -> str | None:
        """Return the seed of the task with the fewest leases and room for one more, None if there is none or the asker is one."""
        if self.peers[peer].is_seed:
            return None
        best, least = None, PEER_LEASES
        for other in state.seeds:
            seed = state.members[other]
            if member.avoids(other, now) or seed.rests_until > now:
                continue
            if len(seed.leases) < least:
                best, least = other, len(seed.leases)
        return best

    def _point(
        self, state: TaskState, peer: str, group: int, others: list[str], verdict: Verdict, ask: Ask, out: Out
    ) -> Ruling:
        """Rule that others have or get a group; one of them and the asker become neighbours, unless the mesh will bring it."""
        members = state.members
        met = members[peer].neighbours
        other, least = others[0], len(members[others[0]].neighbours)
        for name in others[1:]:
            degree = len(members[name].neighbours)
            if degree < least or (degree == least and self._rng.random() < 0.5):
                other, least = name, degree
        if other not in met:
            crowded = max(len(met), least) >= CROWDED
            if crowded and not ask.urgent and ask.again < PATIENCE:
                return Ruling(group, Verdict.WAIT, None, self._patience(state))
            self._connect_pair(state, peer, other)
            out.append((other, Neighbours(state.task, [self.peers[peer].contact])))
        return Ruling(group, verdict, self.peers[other].contact)

    def _done(self, peer: str, event: FromPeer, now: float) -> Out:
        assert isinstance(event, Done)
        state = self.tasks.get(event.task)
        member = state.members.get(peer) if state is not None else None
        if state is None or member is None:
            return []
        out: Out = []
        leases = state.leases
        before = len(leases)
        for group in event.groups:
            if group < state.groups:
                state.mark(peer, member, group)
                lease = leases.get(group)
                if lease is not None:
                    # Whoever brought it: nobody needs to fetch it from the registry any more.
                    state.end_lease(group)
                    state.pace = state.pace_at(now) + 1
                    state.paced_at = now
                    if lease.peer != peer:
                        out.append((lease.peer, Revoke(state.task, [group])))
        return out + self._grant(state, now) if len(leases) < before else out

    def _progress(self, peer: str, event: FromPeer, now: float) -> Out:
        assert isinstance(event, Progress)
        state = self.tasks.get(event.task)
        lost = []
        for group in event.groups:
            lease = state.leases.get(group) if state else None
            if lease is not None and lease.peer == peer:
                lease.expires = now + LEASE_S
            else:
                lost.append(group)
        return [(peer, Revoke(event.task, lost))] if lost else []

    def _failed(self, peer: str, event: FromPeer, now: float) -> Out:
        assert isinstance(event, Failed)
        state = self.tasks.get(event.task)
        if state is None or peer not in state.members:
            return []
        for group in event.groups:
            lease = state.leases.get(group)
            if lease is not None and lease.peer == peer:
                state.end_lease(group)
                state.members[peer].rests_until = now + REST_S
        self._note_failure(peer, now)
        return self._grant(state, now)

    # ---- trust ---------------------------------------------------------------------------------------------------

    def _report(self, peer: str, event: FromPeer, now: float) -> Out:
        assert isinstance(event, Report)
        state = self.tasks.get(event.task)
        if state is None or peer not in state.members or event.peer == peer:
            return []
        state.members[peer].blocked[event.peer] = now + (BAN_S if event.what is Complaint.CORRUPT else AVOID_S)
        self._part_pair(state, peer, event.peer)
        accused = self.peers.get(event.peer)
        if accused is None:
            return []
        self._note_failure(event.peer, now)
        if event.what is Complaint.CORRUPT:
            accused.accused_by[self.peers[peer].host] = now
            self._accused.add(event.peer)
        return self._introduce(state, peer, now)

    def _is_banned(self, peer: str, now: float) -> bool:
        if peer not in self._accused:
            return False
        accused = self.peers[peer].accused_by
        return sum(now - when < BAN_S for when in accused.values()) >= 2

    def banned(self, now: float) -> set[str]:
        """Return the peers that are handed to nobody."""
        return {peer for peer in self._accused if self._is_banned(peer, now)}

    def _note_failure(self, peer: str, now: float) -> None:
        state = self.peers.get(peer)
        if state is not None:
            state.failures = self._failures(state, now) + 1
            state.failed_at = now

    def _failures(self, peer: PeerState, now: float) -> float:
        return peer.failures * 0.5 ** ((now - peer.failed_at) / _FAILURE_HALF_LIFE_S) if peer.failures else 0.0

    # ---- preheat -------------------------------------------------------------------------------------------------

    def _preheat(self, peer: str, event: FromPeer, now: float) -> Out:
        assert isinstance(event, Preheat)
        kinds = {Kind.SEED, Kind.PEER} if event.everybody else {Kind.SEED}
        return self.preheats.begin(peer, event, [name for name, of in self.peers.items() if of.contact.kind in kinds])

    def _filled(self, peer: str, event: FromPeer, now: float) -> Out:
        assert isinstance(event, Filled)
        return self.preheats.filled(peer, event)
