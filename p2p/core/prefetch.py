"""In which order a task is prefetched: chosen batch by batch, at the moment at which there is room for one. Pure.

Rules. First a neighbour is chosen, the one that would deliver soonest, then, of what it has, what the fewest neighbours have, equals at
random: what is rare now would be what everybody waits for at the end; but if all took the rarest of all, they would queue at its one holder
while others idle. Up to BLIND batches at a time are such as nobody near has, whatever else there is, so that the registry is never idle:
near the beginning, because who reads from the beginning to the end waits least so, but not always the very first, because all peers would
ask the scheduler for the same one. A seed that has just been ordered to fetch something chooses none of that kind: those who read know
better what is needed next, and a registry divides its rate. When there is nothing of either kind, nothing is chosen.
"""

from __future__ import annotations

import math
import random
from itertools import islice
from typing import Final

from .task import NeighbourView, PeerTask

BLIND: Final = 2
"""As many as a peer gets leases for, unless a reader waits (scheduler PEER_LEASES)."""
DIRECTED_S: Final = 2.0
"""After an order, for so long, a seed prefetches nothing that nobody near has."""
_TAKEN: Final = 255
_AHEAD: Final = 4
"""Batches per neighbour, this peer counted, among which one that nobody near has is chosen."""
_LOOKED_AT: Final = 64
"""Batches that are looked at one by one when nothing else is left to choose."""
_BARREN_S: Final = 1.0
"""Neighbours are looked through again after so long, if nothing has been heard of what is left."""
_NONE: Final = bytes([_TAKEN])
_NEAR: Final = bytes([0]) + bytes([1]) * 254 + bytes([0])
"""Turns ranks into a map of what is left and some neighbour has."""
_ABSENT: Final = bytes([_TAKEN]) + bytes(255)
"""Turns a have-map into what hides the ranks of chunks that are not there."""


class Prefetch:
    """The batches of a task that are still to be prefetched. One byte per chunk; a choice looks at the map of one neighbour, in C."""

    def __init__(self, task: PeerTask, batches: list[list[int]], rng: random.Random) -> None:
        self._task = task
        self._rng = rng
        self._batches = {batch[0]: batch for batch in batches}
        self._blind: set[int] = set()
        self._taken = bytearray([_TAKEN]) * task.content.count
        """Of each chunk, 0 if it is the first of a batch that is left."""
        for first in self._batches:
            self._taken[first] = 0
        self._rank = bytearray()
        """What is left, by how many neighbours have it; _TAKEN for all else. Made anew when the counts have changed."""
        self._is_stale = True
        self._barren_until = 0.0
        """Before this time, and before something of what is left changes, no neighbour that may be asked has anything that is left."""
        task.plans.append(self)

    @property
    def left(self) -> int:
        """Batches not chosen yet."""
        return len(self._batches)

    def close(self) -> None:
        """Choose no more."""
        if self in self._task.plans:
            self._task.plans.remove(self)

    def changed(self, chunk: int) -> None:
        """The number of copies of a chunk among neighbours has changed."""
        if self._taken[chunk]:
            self._blind.discard(chunk)
        else:
            self._is_stale = True
            self._barren_until = 0.0

    def landed(self, chunk: int) -> None:
        """A chunk is here."""
        self._blind.discard(chunk)

    def choose(self, now: float) -> list[int] | None:
        """Take the next batch, None if there is nothing that could be had now."""
        is_directed = now - self._task.ordered < DIRECTED_S
        if now < self._barren_until and (is_directed or len(self._blind) >= BLIND):
            return None
        if self._is_stale:
            self._look()
        first = -1
        if len(self._blind) < BLIND and not is_directed:
            first = self._early()
            if first >= 0:
                self._blind.add(first)
        if first < 0 and now >= self._barren_until:
            first = self._rarest_of_soonest(now)
        if first < 0 and not self._blind and not is_directed:
            first = self._miscounted()
        if first < 0:
            return None
        self._taken[first] = _TAKEN
        self._rank[first] = _TAKEN
        return self._batches.pop(first)

    def _look(self) -> None:
        """Make the ranks anew."""
        size = len(self._taken)
        copies, taken = int.from_bytes(self._task.copies, "little"), int.from_bytes(self._taken, "little")
        self._rank = bytearray((copies | taken).to_bytes(size, "little"))
        self._is_stale = False

    def _rarest_of_soonest(self, now: float) -> int:
        wanted = int.from_bytes(self._rank.translate(_NEAR), "little")
        best: NeighbourView | None = None
        if wanted:
            least, equals, draw = math.inf, 1, self._rng.random
            for n in self._task.neighbours.values():
                s = n.standing
                if s.rests_until > now or not n.listening or s.banned:
                    continue
                takes = (s.under_way + 1) / s.rate
                if takes > least or not int.from_bytes(n.have, "little") & wanted:
                    continue
                if takes < least:
                    best, least, equals = n, takes, 1
                else:
                    equals += 1
                    if draw() * equals < 1.0:
                        best = n
        if best is not None:
            return self._rarest(best)
        self._barren_until = min(
            (n.standing.rests_until for n in self._task.neighbours.values() if n.standing.rests_until > now),
            default=now + _BARREN_S,
        )
        if not wanted:
            self._barren_until = now + _BARREN_S
        return -1

    def _miscounted(self) -> int:
        """Return one that nobody near has after all: a neighbour that has gone silent, told its map twice or is banned is still counted."""
        near = [n.have for n in self._task.neighbours.values() if n.listening and not n.standing.banned]
        return next((first for first in islice(self._batches, _LOOKED_AT) if not any(have[first] for have in near)), -1)

    def _rarest(self, neighbour: NeighbourView) -> int:
        """Return what the fewest neighbours have of what this one has."""
        size = len(self._rank)
        hidden = int.from_bytes(neighbour.have.translate(_ABSENT), "little")
        ranks = (int.from_bytes(self._rank, "little") | hidden).to_bytes(size, "little")
        there = ranks.translate(None, _NONE)
        if not there:
            return -1
        copies = min(there)
        found = ranks.find(copies, int(self._rng.random() * size))
        return found if found >= 0 else ranks.find(copies)

    def _early(self) -> int:
        """Return one of the first that nobody near has."""
        found = self._rank.find(0)
        for _ in range(int(self._rng.random() * _AHEAD * (len(self._task.neighbours) + 1)) if found >= 0 else 0):
            following = self._rank.find(0, found + 1)
            if following < 0:
                break
            found = following
        return found
