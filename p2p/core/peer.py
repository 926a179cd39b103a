"""The peer's decisions over all its tasks: (state, event, now) → effects. Pure but for its own state; randomness from the caller.

Decided here: when news go to the scheduler, which leases are renewed, when a waiting chunk is given back, who is met, rested from, banned,
and what a lost scheduler means. One request for chunks is decided in errand.py. Rules that the tests hold: a chunk that waits is given back
when a neighbour has it, when somebody is lost, or at its time; a peer that sent a wrong chunk is never asked again; the scheduler is told
of every complete group, once per membership.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from ..protocol.groups import pack_bits
from ..protocol.messages import (
    Complaint,
    Contact,
    Done,
    Failed,
    FromScheduler,
    Join,
    Leave,
    Neighbours,
    Order,
    Progress,
    Report,
    Revoke,
    Ruling,
    Verdict,
)
from ..selection import Run
from .effects import Effects, FillGroup, Listen, Requeue, Send, ShowPending, ShowRelayed
from .errand import WAIT_S, Errand
from .prefetch import BLIND, Prefetch
from .task import Content, NeighbourView, PeerTask, Standing

NEWS_S: Final = 0.5
"""How long complete groups are gathered before the scheduler is told, unless they end a lease."""
RENEW_S: Final = 3.0
REST_S: Final = 1.0
"""A neighbour that stalled is not asked for this long, if others have the chunk."""
FAULTS: Final = 2
"""After so many faults in a row the scheduler is told."""
ABSENT_S: Final = 0.05
"""A neighbour that lacked what it had announced is not asked for this long."""
MOST_FAULTS: Final = 6
"""The rest doubles with every fault in a row so many times, so that two who never deliver cannot take turns."""
BUSY_S: Final = (0.05, 0.15)
"""A neighbour whose slots are all busy is asked again after so long, at random, and twice as long each time in a row: how long a slot is
taken depends on its link."""
BUSY_SLOTS: Final = (0.1, 0.3)
"""And not before this part of the time that it has taken for one request so far: of its dozen slots one becomes free about so often."""
MOST_SLOT_S: Final = 20.0
SHOWN_S: Final = (0.1, 0.3)
"""Who has been refused what its holder passes on to others waits so long, at random, for one of these to show it."""
MOST_DOUBLINGS: Final = 4
MOST_NEIGHBOURS: Final = 256
"""In one task, whoever introduces them: each takes a byte per chunk and a connection. A scheduler stops at about a tenth."""
MOST_STANDINGS: Final = 4096
"""Nodes of which it is remembered how they served: about 300 bytes each."""
_SOUGHT: Final = 64
"""Chunks that wait among which a node looks for its next lease, the first ones: a reader comes to them first."""
_ASKED_BEFORE_S: Final = 3600.0
"""A chunk that has waited once stays in `waiting` with a time this far away: the next time the scheduler is asked."""


class PeerCore:
    """The state of one peer."""

    def __init__(self, name: str, rng: random.Random) -> None:
        self.id = name
        self.rng = rng
        self.tasks: dict[bytes, PeerTask] = {}
        self.standings: dict[str, Standing] = {}
        self.counters: Counter[str] = Counter()
        self._news_told = 0.0
        self._renewed = 0.0

    # ---- tasks ---------------------------------------------------------------------------------------------------

    def enter(self, task_id: bytes, content: Content, image: str) -> PeerTask:
        """Take part in a task, with what is here of it; the scheduler is told by `join`."""
        task = self.tasks.get(task_id)
        if task is None:
            task = self.tasks[task_id] = PeerTask(task_id, content, image)
            task.finished = {group for group in range(content.groups) if task.is_complete(group)}
        return task

    def leave(self, task_id: bytes) -> Effects:
        """Take part no longer."""
        task = self.tasks.pop(task_id, None)
        return [Send(task_id, Leave(task_id))] if task is not None and task.joined else []

    def join(self, task: PeerTask, scheduler: str) -> Effects:
        """Tell the scheduler at this address of a task and of all that is here."""
        task.joined = scheduler
        task.news = []
        have = pack_bits(task.finished, task.content.groups)
        return [Send(task.task, Join(task.task, task.content.groups, task.image, have))]

    def errand(self, task: PeerTask, chunks: list[int], *, urgent: bool) -> Errand:
        """Return the decisions about a request for chunks, ascending. `urgent`: a reader waits."""
        return Errand(task, chunks, self.rng, self.counters, self.meet, urgent=urgent)

    def answered(self, task_id: bytes, rulings: list[Ruling], now: float) -> Effects:
        """Take the leases out of an answer, at the moment at which it comes: a revocation may be right behind it, and whoever asked may
        have given up waiting.
        """
        task = self.tasks.get(task_id)
        if task is None:
            return []
        effects: Effects = []
        for ruling in rulings:
            if ruling.verdict is Verdict.LEASE and ruling.group < task.content.groups:
                missing = task.content.missing(task.content.chunks_of(ruling.group))
                if missing:
                    task.leases[ruling.group] = now
                    effects += self._lead(task, ruling.group, missing)
                    effects.append(FillGroup(task_id, missing))
                else:
                    task.news.append(ruling.group)
                    effects += self._tell_news(task)
        if effects:
            effects.append(ShowPending(task_id, list(task.leases)))
        return effects

    def _lead(self, task: PeerTask, group: int, missing: list[int]) -> Effects:
        """What is to be fetched here is waited for nowhere else."""
        followed = task.relays.follows(group)
        task.relays.lead(group)
        if not followed:
            return []
        effects: Effects = [ShowRelayed(task.task, task.relays.shown())]
        for chunk in missing:
            task.followed.discard(chunk)
            if task.waiting.pop(chunk, None) is not None:
                effects.append(Requeue(task.task, chunk))
        return effects

    def landed(self, task_id: bytes, chunk: int, now: float) -> Effects:
        """A chunk is here, from wherever."""
        task = self.tasks.get(task_id)
        if task is None:
            return []
        task.waiting.pop(chunk, None)
        task.followed.discard(chunk)
        task.asked.pop(chunk, None)
        for plan in task.plans:
            plan.landed(chunk)
        group = task.content.group(chunk)
        if group in task.leases:
            task.leases[group] = now
        if group in task.finished or not task.is_complete(group):
            return []
        task.finished.add(group)
        task.relays.complete(group)
        task.news.append(group)
        if task.leases.pop(group, None) is None:
            return []
        return [*self._tell_news(task), ShowPending(task_id, list(task.leases)), *self._seek_leases(task, now)]

    def _seek_leases(self, task: PeerTask, now: float) -> Effects:
        """A lease has ended, so the registry has room: something that waits for nobody in particular is asked about at once, as long as
        this node may have leases. Else all could wait for each other while the registry is idle. Which of the first of them: at random,
        since others choose from the same.
        """
        room = BLIND - len(task.leases)
        if room <= 0:
            return []
        first: dict[int, int] = {}
        for chunk in heapq.nsmallest(_SOUGHT, task.waiting):
            group = task.content.group(chunk)
            if group in first or group in task.leases or chunk in task.followed or task.copies[chunk]:
                continue
            if task.parent_of(group, now) is None and not task.is_pending(group, now):
                first[group] = chunk
        effects: Effects = []
        for group in self.rng.sample(list(first), min(room, len(first))):
            task.waiting[first[group]] = now + _ASKED_BEFORE_S
            effects.append(Requeue(task.task, first[group]))
        return effects

    def hurry(self, task_id: bytes, chunks: Iterable[int], now: float) -> Effects:
        """A reader waits now for chunks that waited behind others: what nobody is sending of their groups is asked about at once, for a
        reader.
        """
        task = self.tasks.get(task_id)
        if task is None:
            return []
        groups = {task.content.group(chunk) for chunk in chunks}
        near = [chunk for group in sorted(groups) for chunk in task.content.chunks_of(group)]
        waiting = [chunk for chunk in near if chunk in task.waiting and chunk not in task.followed]
        task.waiting.update(dict.fromkeys(waiting, now + _ASKED_BEFORE_S))
        return [Requeue(task_id, chunk) for chunk in waiting]

    def lost_chunks(self, task_id: bytes, chunks: Iterable[int]) -> Effects:
        """Chunks that were here are here no longer: the scheduler, whose knowledge only grows, is told anew of all that is."""
        task = self.tasks.get(task_id)
        groups = {task.content.group(chunk) for chunk in chunks} & task.finished if task is not None else set()
        if task is None or not groups:
            return []
        task.finished -= groups
        scheduler, effects = task.joined, self._tell_news(task)
        return [*effects, Send(task_id, Leave(task_id)), *self.join(task, scheduler)] if scheduler else []

    def gave_up(self, task_id: bytes, chunks: Iterable[int], cause: str) -> Effects:
        """The registry did not give these: their leases go back."""
        task = self.tasks.get(task_id)
        if task is None:
            return []
        groups = sorted({task.content.group(chunk) for chunk in chunks} & task.leases.keys())
        for group in groups:
            del task.leases[group]
        if not groups:
            return []
        return [Send(task_id, Failed(task_id, groups, cause[:400])), ShowPending(task_id, list(task.leases))]

    def prefetch(self, task: PeerTask, batches: list[list[int]]) -> Prefetch:
        """Return the choice among batches of chunks that are to be prefetched; to be closed by whoever chooses."""
        return Prefetch(task, batches, self.rng)

    # ---- neighbours ----------------------------------------------------------------------------------------------

    def meet(self, task: PeerTask, contact: Contact) -> Effects:
        """Make somebody a neighbour, unless it is one, cannot be reached or is this peer itself. Of one that is banned, maybe for another
        task, the scheduler is told: it would point at it for ever.
        """
        if contact.id == self.id or not contact.port:
            return []
        standing = self.standings.get(contact.id)
        if standing is not None and standing.banned and standing.contact == contact:
            return [Send(task.task, Report(task.task, contact.id, Complaint.CORRUPT))]
        if contact.id in task.neighbours or len(task.neighbours) >= MOST_NEIGHBOURS:
            return []
        if standing is None or standing.contact != contact:
            self._forget_some()
            standing = self.standings[contact.id] = Standing(contact)
        view = task.neighbours[contact.id] = NeighbourView(standing, bytearray(task.content.count))
        return [Listen(task.task, view)]

    def _forget_some(self) -> None:
        """Keep what is known of nodes bounded: a node has a new id whenever it starts, and a daemon lives for months. Those go that are
        nobody's neighbour here, who have been met first; those that sent a wrong chunk last of all.
        """
        if len(self.standings) < MOST_STANDINGS:
            return
        near = {peer for task in self.tasks.values() for peer in task.neighbours}
        strangers = [peer for peer in self.standings if peer not in near]
        strangers.sort(key=lambda peer: self.standings[peer].banned)
        for peer in strangers[: max(1, MOST_STANDINGS // 8)]:
            del self.standings[peer]

    def tells_anew(self, task: PeerTask, view: NeighbourView) -> None:
        """A neighbour is about to tell its whole have-map: what it told before counts no longer."""
        task.count((chunk for chunk in range(len(view.have)) if view.have[chunk]), -1)
        view.have[:] = bytes(len(view.have))

    def part(self, task: PeerTask, view: NeighbourView, *, unreachable: bool) -> Effects:
        """A neighbour is not listened to any more; `unreachable`: it was wanted."""
        if task.neighbours.get(view.id) is view:
            del task.neighbours[view.id]
            task.count((chunk for chunk in range(len(view.have)) if view.have[chunk]), -1)
        return self._report(task, view, Complaint.UNREACHABLE) if unreachable else []

    def heard(self, task: PeerTask, fresh: list[int]) -> Effects:
        """A neighbour has more: what waits for it goes on."""
        task.count(fresh, 1)
        effects: Effects = []
        waiting = task.waiting
        for chunk in fresh:
            if chunk in waiting and chunk not in task.followed:
                del waiting[chunk]
                effects.append(Requeue(task.task, chunk))
        return effects

    def follow_began(self, task_id: bytes, run: Run) -> Effects:
        """A neighbour sends a group as it gets it: others may have it from here likewise."""
        task = self.tasks.get(task_id)
        view = task.neighbours.get(run.peer) if task is not None else None
        if task is None or view is None:
            return []
        task.relays.begin(task.content.group(run.first))
        return [ShowRelayed(task_id, task.relays.shown())]

    def follow_ended(self, task_id: bytes, run: Run, now: float, *, refused: bool) -> Effects:
        """A neighbour sends no more of a group. What it did not send is waited for if it `refused` to pass it on, else got otherwise."""
        task = self.tasks.get(task_id)
        if task is None:
            return []
        chunks = range(run.first, run.first + run.count)
        task.followed.difference_update(chunks)
        left = task.content.missing(chunks)
        view = task.neighbours.get(run.peer)
        group = task.content.group(run.first)
        had = view is not None and left and all(map(view.have.__getitem__, left))
        if left and view is not None:
            (view.too_busy if had else view.unfollowed).add(group)
        effects: Effects = []
        before = task.relays.shown()
        task.relays.end(group, (run.peer, run.first))
        if task.relays.shown() != before:
            effects.append(ShowRelayed(task_id, task.relays.shown()))
        for chunk in left:
            if chunk not in task.waiting:
                continue
            if refused and task.parent_of(group, now) is None and (had or task.rest_of_holders(chunk) is None):
                task.waiting[chunk] = now + (self.rng.uniform(*SHOWN_S) if had else WAIT_S * (0.5 + self.rng.random()))
            else:
                del task.waiting[chunk]
                effects.append(Requeue(task.task, chunk))
        return effects

    def is_getting(
        self, task: PeerTask, view: NeighbourView, fetching: set[int], following: dict[int, int], now: float
    ) -> Effects:
        """A neighbour has said which groups it is fetching from the registry, and which it is following, at what depth. If a lease of its
        has ended, about one of its neighbours seeks one: the neighbour itself may need nothing more.
        """
        ended = len(view.pending - fetching)
        fresh = (fetching | following.keys()) - view.pending - view.relayed.keys()
        view.pending, view.relayed = fetching, following
        seeks = ended and self.rng.random() * len(task.neighbours) < ended
        view.unfollowed &= fetching | following.keys()
        unshown = task.relays.unshown(view.id)
        for group in unshown:
            depth = view.depth(group)
            if depth is not None:
                task.relays.show(view.id, group, depth)
        effects: Effects = [ShowRelayed(task.task, task.relays.shown())] if unshown else []
        effects += self._follow_at_last(task, view, fresh)
        return effects + self._seek_leases(task, now) if seeks else effects

    def _follow_at_last(self, task: PeerTask, view: NeighbourView, groups: set[int]) -> Effects:
        """A neighbour has begun to get groups: what waits of them for nobody in particular may be had from there as it comes."""
        effects: Effects = []
        for chunk in [chunk for chunk in task.waiting if chunk not in task.followed] if groups else ():
            group = task.content.group(chunk)
            depth = view.depth(group)
            if group in groups and depth is not None and depth < task.relays.limit(group):
                del task.waiting[chunk]
                effects.append(Requeue(task.task, chunk))
        return effects

    def silent(self, task: PeerTask) -> None:
        """Somebody is gone: what waits asks again at the next tick."""
        for chunk in task.waiting:
            if chunk not in task.followed:  # who is followed says by itself when it ends
                task.waiting[chunk] = 0.0

    def was_corrupt(self, task: PeerTask, view: NeighbourView) -> Effects:
        """A neighbour sent a wrong chunk: it is asked for nothing any more."""
        view.standing.banned = True
        self.counters["corrupt"] += 1
        return self._report(task, view, Complaint.CORRUPT)

    def was_busy(self, view: NeighbourView, now: float) -> None:
        """A neighbour has no slot free."""
        self.counters["busy"] += 1
        standing = view.standing
        usual = max(self.rng.uniform(*BUSY_S), self.rng.uniform(*BUSY_SLOTS) * min(standing.slot_s, MOST_SLOT_S))
        standing.rests_until = now + usual * (1 << min(standing.refusals, MOST_DOUBLINGS))
        standing.refusals += 1

    def was_absent(self, task: PeerTask, view: NeighbourView, chunk: int, now: float) -> Effects:
        """A neighbour does not have a chunk, whatever its map says."""
        self.counters["absent"] += 1
        if view.have[chunk]:
            view.have[chunk] = 0
            task.count((chunk,), -1)
        return self._note_fault(task, view, now, ABSENT_S)

    def was_stalled(self, task: PeerTask, view: NeighbourView, now: float) -> Effects:
        """A neighbour did not deliver."""
        self.counters["stalled"] += 1
        return self._note_fault(task, view, now, REST_S)

    def _note_fault(self, task: PeerTask, view: NeighbourView, now: float, rest_s: float) -> Effects:
        """Count what a neighbour failed to give; the scheduler, which would point at it for ever, is told when that repeats."""
        standing = view.standing
        standing.rests_until = now + rest_s * (1 << min(standing.faults, MOST_FAULTS))
        standing.faults += 1
        return self._report(task, view, Complaint.STALLED) if standing.faults >= FAULTS else []

    def _report(self, task: PeerTask, view: NeighbourView, what: Complaint) -> Effects:
        return [Send(task.task, Report(task.task, view.id, what))]

    # ---- scheduler -----------------------------------------------------------------------------------------------

    def connected(self, scheduler: str, home: Callable[[bytes], str]) -> Effects:
        """A scheduler has come: tasks that belong to it (`home` of a task: its address) move there."""
        effects: Effects = []
        for task in self.tasks.values():
            if home(task.task) == scheduler:
                effects += self.join(task, scheduler)
        return effects

    def lost(self, scheduler: str, home: Callable[[bytes], str]) -> Effects:
        """A scheduler has gone: its tasks go to the next, if there is one (`home` is not empty)."""
        effects: Effects = []
        for task in self.tasks.values():
            if task.joined == scheduler:
                task.joined = ""
                task.leases.clear()
                effects.append(ShowPending(task.task, []))
                self.silent(task)
                following = home(task.task)
                if following:
                    effects += self.join(task, following)
        return effects

    def unsent(self, effect: Send) -> None:
        """A message could not be queued: news are told again."""
        task = self.tasks.get(effect.task)
        if task is None:
            return
        if isinstance(effect.message, Done):
            task.news = effect.message.groups + task.news
        elif isinstance(effect.message, Join):
            task.joined = ""

    def received(self, message: FromScheduler, now: float) -> Effects:
        """Take one message of a scheduler, but for answers, and what concerns whole images."""
        if isinstance(message, Neighbours):
            task = self.tasks.get(message.task)
            if task is None or task.content.complete:
                return []
            return [effect for contact in message.peers for effect in self.meet(task, contact)]
        if isinstance(message, Order):
            return self._take_order(message, now)
        if isinstance(message, Revoke):
            task = self.tasks.get(message.task)
            if task is not None:
                for group in message.groups:
                    task.leases.pop(group, None)
                return [ShowPending(task.task, list(task.leases))]
        return []

    def _take_order(self, message: Order, now: float) -> Effects:
        task = self.tasks.get(message.task)
        if task is None or message.group >= task.content.groups:
            return [Send(message.task, Failed(message.task, [message.group], "this node does not know the task"))]
        chunks = task.content.chunks_of(message.group)
        missing = task.content.missing(chunks)
        if not missing:
            task.news.append(message.group)
            return self._tell_news(task)
        if not any(chunk in task.asked for chunk in missing):
            task.ordered = now
        task.leases[message.group] = now
        return [
            *self._lead(task, message.group, missing),
            FillGroup(task.task, missing),
            ShowPending(task.task, list(task.leases)),
        ]

    def _tell_news(self, task: PeerTask) -> Effects:
        if not task.news or not task.joined:
            return []
        news, task.news = task.news, []
        return [Send(task.task, Done(task.task, news))]

    # ---- time ----------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> Effects:
        """Give back what has waited long enough; announce; renew leases that move. To be called ten times a second."""
        effects: Effects = []
        tell = now - self._news_told > NEWS_S
        renew = now - self._renewed > RENEW_S
        for task in self.tasks.values():
            for chunk in [chunk for chunk, until in task.waiting.items() if until <= now]:
                task.waiting[chunk] = now + _ASKED_BEFORE_S
                task.followed.discard(chunk)
                effects.append(Requeue(task.task, chunk))
            if tell:
                effects += self._tell_news(task)
            if renew and task.leases:
                alive = [group for group, landed in task.leases.items() if now - landed < 2 * RENEW_S]
                if alive:
                    effects.append(Send(task.task, Progress(task.task, alive)))
        if tell:
            self._news_told = now
        if renew:
            self._renewed = now
        return effects
