"""One request of the fetch pipeline to the swarm: which chunks are taken from whom, what is asked of the scheduler, what waits how long,
what is ours to fetch from the registry. Pure: a generator that says the next step and is told the time, and the rulings, when it is done.

Rules. What a neighbour has is taken from neighbours; a chunk that one of them is fetching, or that only resting neighbours have, is waited
for, once, without asking; the scheduler rules on the rest. Nothing waits without an end: each chunk that waits has a time in
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
from .effects import Effects, FillGroup, ShowPending
from .task import PeerTask

WAIT_S: Final = 2.0
"""How long to wait for what somebody else fetches before asking again."""
LATER_S: Final = 0.25
"""How long to wait when enough leases are out."""
BRIEF_S: Final = 0.2
"""A holder that rests for less than this is waited for without asking the scheduler."""
ROUNDS: Final = 3
"""Attempts to get chunks from neighbours in one errand; a chunk that none of them gave waits."""


@dataclass(frozen=True, slots=True)
class Take:
    """Take these runs from neighbours, all at once; go on when the last one has ended, however it ended."""

    runs: list[Run]


@dataclass(frozen=True, slots=True)
class Inquire:
    """Ask the scheduler of the task about these groups."""

    groups: list[int]


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
        self, task: PeerTask, chunks: list[int], rng: random.Random, counters: Counter[str], meet: Meet
    ) -> None:
        self._task = task
        self._chunks = chunks
        self._rng = rng
        self._counters = counters
        self._meet = meet
        self._ours: list[int] = []
        self._until: dict[int, float] = {}

    def steps(self, now: float) -> Steps:
        """Say step after step; return the outcome."""
        task, content = self._task, self._task.content
        for attempt in range(ROUNDS):
            runs, _ = assign(self._missing(), task.offers(now), content.length, self._rng)
            if runs:
                now = (yield Take(runs)).now
            missing = self._missing()
            if not missing:
                return Outcome(self._ours, [])
            if runs and attempt < ROUNDS - 1:
                continue
            now = yield from self._rule(missing, now)
            # While the scheduler was asked, a neighbour may have announced what nobody had before.
            if not any(n.have[chunk] for n in task.willing(now) for chunk in self._until):
                break
        waiting = content.missing(self._until)
        for chunk in waiting:
            task.waiting[chunk] = self._until[chunk]
        return Outcome(content.missing(self._ours), waiting)

    def _missing(self) -> list[int]:
        return [chunk for chunk in self._task.content.missing(self._chunks) if chunk not in self._ours]

    def _rule(self, missing: list[int], now: float) -> Generator[Inquire | Perform, Reply, float]:
        """Divide what no neighbour gave into what is ours and until when to wait for the rest; return the time."""
        unknown = self._without_asking(missing, now)
        if not unknown:
            return now
        reply = yield Inquire(sorted(unknown))
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
        unknown: dict[int, list[int]] = {}
        pending = {group for n in task.willing(now) for group in n.pending}
        for chunk in missing:
            group = task.content.group(chunk)
            again = task.rest_of_holders(chunk)
            if group in task.leases:
                self._ours.append(chunk)
            elif again is not None and again - now < BRIEF_S:
                self._until[chunk] = again
            elif group in pending and chunk not in task.waiting:
                self._until[chunk] = now + WAIT_S
            else:
                unknown.setdefault(group, []).append(chunk)
        return unknown

    def _apply(self, rulings: list[Ruling], unknown: dict[int, list[int]], now: float) -> Effects:
        task = self._task
        effects: Effects = []
        granted = False
        for ruling in rulings:
            chunks = unknown.pop(ruling.group, [])
            if ruling.verdict is Verdict.LEASE:
                if ruling.group >= task.content.groups:
                    continue
                task.leases[ruling.group] = now
                granted = True
                self._ours += chunks
                rest = task.content.missing(task.content.chunks_of(ruling.group))
                effects.append(FillGroup(task.task, [chunk for chunk in rest if chunk not in chunks]))
                continue
            if ruling.peer is not None:
                effects += self._meet(task, ruling.peer)
            later = LATER_S * (0.5 + self._rng.random())
            for chunk in chunks:
                again = task.rest_of_holders(chunk)
                self._until[chunk] = now + (later if ruling.verdict is Verdict.LATER else WAIT_S)
                if again is not None:  # its holder only rests: nothing will be announced that is not known
                    self._until[chunk] = min(self._until[chunk], again)
        for chunks in unknown.values():  # not ruled upon: the scheduler does not know us yet
            for chunk in chunks:
                self._until[chunk] = now + LATER_S
        if granted:
            effects.append(ShowPending(task.task, list(task.leases)))
        return effects
