"""One request of the fetch pipeline to the swarm: which chunks are taken from whom, what is asked of the scheduler, what waits how long,
what is ours to fetch from the registry. Pure: a generator that says the next step and is told the time, and the rulings, when it is done.

Rules. What a neighbour has is taken from neighbours; a group that one of them is fetching is followed: one request, answered chunk by chunk
as they come, beside which the errand ends. If the neighbour does not do that, or only resting neighbours have a chunk, it is waited for,
once, without asking; the scheduler rules on the rest. Nothing waits without an end: each chunk that waits has a time in
`PeerTask.waiting`, at which `PeerCore.tick` gives it back.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Final

from ..protocol.messages import Contact, Ruling, Verdict
from ..selection import Run, assign
from .effects import Effects, Follow
from .task import NeighbourView, PeerTask

WAIT_S: Final = 2.0
"""How long to wait for what somebody else fetches before asking again."""
LATER_S: Final = 0.25
"""How long to wait when enough leases are out."""
MOST_AFTER_S: Final = 30.0
"""A scheduler cannot make a chunk wait longer than this."""
FOLLOW_S: Final = 20.0
"""A chunk that is followed is given back after so long, whatever became of the request: more than the life of a lease without progress."""
PATIENT: Final = 4
"""While so many groups of a task wait for nobody in particular, nobody asks about more of them for a prefetch that has not waited before:
in a crowd, what all lack is on its way to all."""
BRIEF_S: Final = 0.2
"""A holder that rests for less than this is waited for without asking the scheduler, and however long it rests if the scheduler has been
asked within WAIT_S."""
MOST_REFUSALS: Final = 6
"""A prefetch waits, without asking, for a holder that has had no slot free up to so many times in a row: who is asked by many is about to
have made other holders, which are heard of. One that never has a slot is not waited for."""
ROUNDS: Final = 3
"""Attempts to get chunks from neighbours in one errand; a chunk that none of them gave waits."""

_NEVER: Final = (0, -1e9)


@dataclass(frozen=True, slots=True)
class Take:
    """Take these runs from neighbours, all at once; go on when the last one has ended, however it ended."""

    runs: list[Run]


@dataclass(frozen=True, slots=True)
class Inquire:
    """Ask the scheduler of the task about these groups."""

    groups: list[int]
    again: int = 0
    """How often one of them has been asked about in vain."""


@dataclass(frozen=True, slots=True)
class Perform:
    """Perform effects."""

    effects: Effects


@dataclass(frozen=True, slots=True)
class Reply:
    """What the step before came to: the time, and what the scheduler ruled (None: there is none, or it did not answer)."""

    now: float
    rulings: list[Ruling] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is left: to be fetched from the registry here, and what will be given back by `Requeue`."""

    ours: list[int]
    waiting: list[int]


Steps = Generator[Take | Inquire | Perform, Reply, Outcome]
Meet = Callable[[PeerTask, Contact], Effects]


class Errand:
    """The decisions about one request."""

    def __init__(
        self, task: PeerTask, chunks: list[int], rng: random.Random, counters: Counter[str], meet: Meet, *, urgent: bool
    ) -> None:
        self._urgent = urgent
        self._task = task
        self._chunks = chunks
        self._rng = rng
        self._counters = counters
        self._meet = meet
        self._ours: list[int] = []
        self._until: dict[int, float] = {}
        self._coming: set[int] = set()
        """What is followed from the beginning, beside the rest of the errand."""
        self._follow: dict[tuple[str, int], list[int]] = {}
        """Of parent and group, chunks to be followed."""

    def steps(self, now: float) -> Steps:
        """Say step after step; return the outcome."""
        task, content = self._task, self._task.content
        coming = self._begin_to_follow(now)
        if coming:
            now = (yield Perform(coming)).now
        for attempt in range(ROUNDS):
            missing = self._missing()
            runs = self._runs(missing, now)
            if runs:
                now = (yield Take(runs)).now
                missing = self._missing()
                if missing and attempt < ROUNDS - 1:
                    continue
            if not missing:
                return Outcome(self._ours, self._still_coming(now))
            now = yield from self._rule(missing, now)
            # While the scheduler was asked, a neighbour may have announced what nobody had before.
            if not task.offers(list(self._until), now):
                break
        waiting = content.missing(self._until)
        for chunk in waiting:
            task.waiting[chunk] = self._until[chunk]
        follows = self._follows(now)
        if follows:
            yield Perform(follows)
        return Outcome(content.missing(self._ours), self._still_coming(now) + waiting)

    def _runs(self, missing: list[int], now: float) -> list[Run]:
        """Return what to take from whom."""
        task, content = self._task, self._task.content
        if len(missing) == 1:
            (chunk,) = missing
            size = content.length(chunk)
            peer = task.soonest(chunk, size, now, self._rng)
            runs = [] if peer is None else [Run(peer, chunk, 1, size)]
        else:
            offers = task.offers(missing, now)
            runs = assign(missing, offers, content.length, self._rng)[0] if offers else []
        for run in runs:
            task.neighbours[run.peer].standing.ask(now)
        return runs

    def _missing(self) -> list[int]:
        missing = self._task.content.missing(self._chunks)
        settled = self._coming.union(self._ours) if self._ours else self._coming
        return [chunk for chunk in missing if chunk not in settled] if settled else missing

    def _begin_to_follow(self, now: float) -> Effects:
        """Follow groups of which a neighbour has a part and gets the rest, all of it in one request, not the part now, the rest then. And
        those that few have, unless a reader waits: who follows passes them on as they come.
        """
        task, content = self._task, self._task.content
        groups: dict[int, list[int]] = {}
        for chunk in content.missing(self._chunks):
            groups.setdefault(content.group(chunk), []).append(chunk)
        for group, chunks in groups.items():
            if group in task.leases:
                continue
            if all(task.copies[chunk] for chunk in chunks):
                parent = None if self._urgent or not task.are_rare(chunks) else task.source_of(group, chunks, now)
            else:
                parent = task.parent_of(group, now)
            if parent is not None and not any(chunk in task.waiting for chunk in chunks):
                for chunk in chunks:
                    self._plan_to_follow(chunk, parent, group, now)
        self._coming = set(self._until)
        task.waiting.update(self._until)
        effects, self._follow, self._until = self._follows(now), {}, {}
        return effects

    def _still_coming(self, now: float) -> list[int]:
        """Return what was followed from the beginning and is not here. What was given back meanwhile, to nobody, is given back anew."""
        coming = self._task.content.missing(sorted(self._coming))
        for chunk in coming:
            self._task.waiting.setdefault(chunk, now)
        return coming

    def _follows(self, now: float) -> Effects:
        task, content = self._task, self._task.content
        found: Effects = []
        for (peer, group), chunks in self._follow.items():
            left = content.missing(chunks)
            view = task.neighbours.get(peer)
            depth = view.depth_of(group, left) if view is not None else None
            if not task.relays.admits(group, depth):  # it was nearer to the registry when that was decided
                task.waiting.update(dict.fromkeys(left, now))
                continue
            task.followed.update(left)
            while left:
                count = 1
                while count < len(left) and left[count] == left[0] + count:
                    count += 1
                run = Run(peer, left[0], count, sum(map(content.length, left[:count])))
                task.relays.plan(group, (peer, left[0]), depth)
                found.append(Follow(task.task, run))
                del left[:count]
        return found

    def _plan_to_follow(self, chunk: int, parent: NeighbourView, group: int, now: float) -> None:
        self._follow.setdefault((parent.id, group), []).append(chunk)
        self._until[chunk] = now + FOLLOW_S

    def _rule(self, missing: list[int], now: float) -> Generator[Inquire | Perform, Reply, float]:
        """Divide what no neighbour gave into what is ours and until when to wait for the rest; return the time."""
        unknown = self._without_asking(missing, now)
        if not unknown:
            return now
        asked = self._task.asked
        again = 0
        for chunk in (chunk for chunks in unknown.values() for chunk in chunks):
            tries = asked.get(chunk, _NEVER)[0]
            again = max(again, tries)
            asked[chunk] = (tries + 1, now)
        self._counters["inquiries"] += 1
        reply = yield Inquire(sorted(unknown), again)
        if reply.rulings is None:
            self._counters["unruled"] += 1
            self._ours += [chunk for chunks in unknown.values() for chunk in chunks]
            return reply.now
        effects = self._apply(reply.rulings, unknown, reply.now)
        if effects:
            yield Perform(effects)
        return reply.now

    def _without_asking(self, missing: list[int], now: float) -> dict[int, list[int]]:
        """Decide what needs no scheduler; return the rest, by group."""
        task = self._task
        self._until = {}
        self._follow = {}
        unknown: dict[int, list[int]] = {}
        for chunk in missing:
            group = task.content.group(chunk)
            holder = task.soonest_holder(chunk)
            again = None if holder is None else holder.rests_until
            if group in task.leases:
                self._ours.append(chunk)
            elif holder is not None and not self._urgent and not holder.faults and 0 < holder.refusals <= MOST_REFUSALS:
                self._until[chunk] = min(holder.rests_until, now + MOST_AFTER_S)
            elif again is not None and (again - now < BRIEF_S or now - task.asked.get(chunk, _NEVER)[1] < WAIT_S):
                self._until[chunk] = min(again, now + WAIT_S)
            elif (parent := task.parent_of(group, now)) is not None:
                self._plan_to_follow(chunk, parent, group, now)
            elif chunk not in task.waiting and task.is_pending(group, now):
                self._until[chunk] = now + WAIT_S
            elif not self._urgent and chunk not in task.waiting and self._is_crowd():
                self._until[chunk] = now + WAIT_S * (0.5 + self._rng.random())
            else:
                unknown.setdefault(group, []).append(chunk)
        return unknown

    def _is_crowd(self) -> bool:
        """Tell whether so much waits already that nobody needs to be asked about more."""
        task = self._task
        if len(task.waiting) - len(task.followed) < PATIENT:
            return False
        return len({task.content.group(chunk) for chunk in task.waiting if chunk not in task.followed}) >= PATIENT

    def _apply(self, rulings: list[Ruling], unknown: dict[int, list[int]], now: float) -> Effects:
        task = self._task
        effects: Effects = []
        for ruling in rulings:
            chunks = unknown.pop(ruling.group, [])
            if ruling.verdict is Verdict.LEASE:
                if ruling.group in task.leases:
                    self._ours += chunks
                else:  # revoked since
                    self._until.update(dict.fromkeys(chunks, now))
                continue
            if ruling.peer is not None:
                effects += self._meet(task, ruling.peer)
            parent = task.neighbours.get(ruling.peer.id) if ruling.peer is not None else None
            if ruling.verdict is Verdict.WAIT and parent is not None and ruling.group not in parent.unfollowed:
                for chunk in chunks:
                    self._plan_to_follow(chunk, parent, ruling.group, now)
                continue
            usual = LATER_S if ruling.verdict is Verdict.LATER else WAIT_S
            after = min(MOST_AFTER_S, ruling.after_s) if ruling.after_s > 0 else usual
            if ruling.peer is None:
                after *= 0.5 + self._rng.random()
            for chunk in chunks:
                again = task.rest_of_holders(chunk)
                self._until[chunk] = now + after
                if again is not None:  # its holder only rests: nothing will be announced that is not known
                    self._until[chunk] = min(self._until[chunk], again)
        for chunks in unknown.values():  # not ruled upon: the scheduler does not know us yet
            for chunk in chunks:
                self._until[chunk] = now + LATER_S
        return effects
