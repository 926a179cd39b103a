"""A task as a peer sees it: what is here, what neighbours have, what is leased, what waits. Plain data and the small questions to it;
decisions are in peer.py and errand.py.

Memory: one byte per chunk and neighbour, one or two per chunk, about 100 bytes per chunk that waits and per live lease.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from ..protocol.messages import Contact
from ..selection import FIRST_RATE, Offer
from .relays import Relays

if TYPE_CHECKING:
    from .prefetch import Prefetch

MOST_COPIES: Final = 254
"""Copies of a chunk among neighbours are counted up to here."""
PROBE_S: Final = 0.05
"""Who had no slot free is asked by one request at a time, which has so long to be refused again: what waits for it does not come all at
once."""
RARE: Final = 2
"""What fewer than one neighbour in RARE has is rare: were all to take it from these, each would send it to many, and no part of it would be
elsewhere before all of it is."""
_WEIGHT: Final = 0.3
"""Of the newest transfer in the rate that a peer is believed to give."""


class Content(Protocol):
    """A data space of this node, as decisions need it: chunks are numbered by where they start, a group holds adjacent ones."""

    @property
    def count(self) -> int:
        """Chunks."""

    @property
    def groups(self) -> int:
        """Groups."""

    @property
    def complete(self) -> bool:
        """Whether all chunks are here."""

    def length(self, chunk: int) -> int:
        """Return the bytes of a chunk."""

    def group(self, chunk: int) -> int:
        """Return the group that a chunk starts in."""

    def chunks_of(self, group: int) -> range:
        """Return the chunks that start in a group."""

    def missing(self, chunks: Iterable[int]) -> list[int]:
        """Return those of `chunks` that are not here, in their order."""


@dataclass(slots=True, eq=False)
class Standing:
    """Another node, over all tasks: how it has served."""

    contact: Contact
    rate: float = FIRST_RATE
    """Bytes per second."""
    under_way: int = 0
    """Bytes asked for and not here yet."""
    bytes_got: int = 0
    banned: bool = False
    rests_until: float = 0.0
    faults: int = 0
    """How often in a row it stalled, or lacked what it had announced."""
    refusals: int = 0
    """How often in a row it had no slot free."""
    slot_s: float = 0.0
    """How long one of the chunks that it gave has taken."""

    def ask(self, now: float) -> None:
        """Note that something is asked of it: while it may refuse, by one request at a time."""
        if self.refusals:
            self.rests_until = max(self.rests_until, now + PROBE_S)

    def note(self, size: int, seconds: float) -> None:
        """Note a transfer."""
        self.bytes_got += size
        self.faults = 0
        self.refusals = 0
        self.rate = max(1.0, self.rate + _WEIGHT * (size / max(seconds, 1e-3) - self.rate))
        self.slot_s += _WEIGHT * (seconds - self.slot_s)


@dataclass(slots=True, eq=False)
class NeighbourView:
    """Another node in one task."""

    standing: Standing
    have: bytearray
    """One byte per chunk: 1 is there."""
    pending: set[int] = field(default_factory=set)
    """Groups that it is fetching from the registry."""
    relayed: dict[int, int] = field(default_factory=dict)
    """Groups that it is getting from who gets them, and how many nodes lie between it and the registry."""
    unfollowed: set[int] = field(default_factory=set)
    """Of both, those that it did not pass on as they came: not asked for so again."""
    too_busy: set[int] = field(default_factory=set)
    """Groups that it has, but would not pass on to one more: not asked for so again."""
    listening: bool = False
    """Whether its have-map is followed; otherwise it may be gone."""

    @property
    def id(self) -> str:
        """The id of the peer."""
        return self.standing.contact.id

    def depth(self, group: int) -> int | None:
        """Return how many nodes lie between it and the registry for a group that it is getting; None if it has not said that it does."""
        return 0 if group in self.pending else self.relayed.get(group)

    def depth_of(self, group: int, chunks: list[int]) -> int | None:
        """Return the same for some chunks of a group: who has them all waits for nobody."""
        return 0 if all(map(self.have.__getitem__, chunks)) else self.depth(group)


@dataclass(slots=True, eq=False)
class PeerTask:
    """A data space in the swarm."""

    task: bytes
    content: Content
    image: str
    neighbours: dict[str, NeighbourView] = field(default_factory=dict)
    leases: dict[int, float] = field(default_factory=dict)
    """Of groups that are ours to fetch, when a chunk of them landed last."""
    waiting: dict[int, float] = field(default_factory=dict)
    """Of chunks that wait for a neighbour, until when."""
    followed: set[int] = field(default_factory=set)
    """Of these, those that a neighbour sends as it gets them itself."""
    relays: Relays = field(default_factory=Relays)
    """What is followed, and how far from the registry that is."""
    joined: str = ""
    """Address of the scheduler that knows of us."""
    finished: set[int] = field(default_factory=set)
    """Groups complete here and announced, or about to be."""
    news: list[int] = field(default_factory=list)
    """Of these, what the scheduler has not been told."""
    asked: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Of chunks that the scheduler was asked about, how often and when last."""
    copies: bytearray = field(init=False)
    """Of each chunk, how many neighbours have it."""
    ordered: float = -math.inf
    """When the scheduler last ordered something of it to be fetched here that this node had not asked for."""
    plans: list[Prefetch] = field(default_factory=list)
    """What is being prefetched."""

    def __post_init__(self) -> None:
        self.copies = bytearray(self.content.count)

    def count(self, chunks: Iterable[int], step: int) -> None:
        """Note that a neighbour has chunks (`step` 1), or has them no longer (-1). A count that has reached MOST_COPIES stays there: it
        is never less than the neighbours that have the chunk, up to that number.
        """
        copies = self.copies
        for chunk in chunks:
            before = copies[chunk]
            if before == MOST_COPIES or before + step < 0:
                continue
            copies[chunk] = before + step
            for plan in self.plans:
                plan.changed(chunk)

    def is_complete(self, group: int) -> bool:
        """Tell whether all chunks of a group are here."""
        return not self.content.missing(self.content.chunks_of(group))

    def willing(self, now: float) -> list[NeighbourView]:
        """Return the neighbours that may be asked for chunks."""
        return [
            n for n in self.neighbours.values() if n.listening and (s := n.standing).rests_until <= now and not s.banned
        ]

    def offers(self, chunks: list[int], now: float) -> dict[str, Offer]:
        """Return what selection needs to know of the neighbours that may be asked and have any of these chunks."""
        copies = self.copies
        near = [chunk for chunk in chunks if copies[chunk]]
        if not near:
            return {}
        offers: dict[str, Offer] = {}
        alone = near[0] if len(near) == 1 else None
        for n in self.neighbours.values():
            if not n.listening:
                continue
            have = n.have
            # What it has first: that alone turns most away.
            if not have[alone] if alone is not None else not any(map(have.__getitem__, near)):
                continue
            s = n.standing
            if s.rests_until <= now and not s.banned:
                offers[s.contact.id] = Offer(have, s.under_way, s.rate)
        return offers

    def soonest(self, chunk: int, size: int, now: float, rng: random.Random) -> str | None:
        """Return who would deliver a chunk soonest of the neighbours that may be asked for it, equals at random: what `selection.assign`
        says of all `offers`, for one chunk.
        """
        if not self.copies[chunk]:
            return None
        best: Standing | None = None
        least, equals = math.inf, 1
        for n in self.neighbours.values():
            if not n.have[chunk]:
                continue
            s = n.standing
            if s.rests_until > now or not n.listening or s.banned:
                continue
            takes = (s.under_way + size) / s.rate
            if takes < least:
                best, least, equals = s, takes, 1
            elif takes == least:
                equals += 1
                if rng.random() * equals < 1.0:
                    best = s
        return None if best is None else best.contact.id

    def parent_of(self, group: int, now: float) -> NeighbourView | None:
        """Return the neighbour that passes on a group as it gets it, None if nobody near does: whoever fetches it, until he has refused,
        then one of those nearest to him, the one with least on its way.
        """
        best, rank = None, (self.relays.limit(group), 0)
        for n in self.neighbours.values():
            if n.listening and group not in n.unfollowed:
                depth, s = n.depth(group), n.standing
                if depth is None or s.rests_until > now or s.banned:
                    continue
                if (depth, s.under_way + s.bytes_got) < rank:
                    best, rank = n, (depth, s.under_way + s.bytes_got)
        return best

    def are_rare(self, chunks: list[int]) -> bool:
        """Tell whether few neighbours have some of these, and each of them at least one has."""
        copies = [self.copies[chunk] for chunk in chunks]
        return min(copies) > 0 and min(copies) * RARE < len(self.neighbours)

    def source_of(self, group: int, chunks: list[int], now: float) -> NeighbourView | None:
        """Return the neighbour that sends all these chunks of a group to whoever follows it: one that has them and has not refused, the one
        with least on its way, else whoever passes them on as he gets them.
        """
        if self.relays.limit(group) > 0:
            best, least = None, math.inf
            for n in self.neighbours.values():
                if n.listening and group not in n.too_busy and all(map(n.have.__getitem__, chunks)):
                    s = n.standing
                    if s.rests_until <= now and not s.banned and s.under_way + s.bytes_got < least:
                        best, least = n, s.under_way + s.bytes_got
            if best is not None:
                return best
        return self.parent_of(group, now)

    def rest_of_holders(self, chunk: int) -> float | None:
        """Return when a neighbour that has a chunk may be asked again, None if no neighbour has it."""
        holder = self.soonest_holder(chunk)
        return None if holder is None else holder.rests_until

    def soonest_holder(self, chunk: int) -> Standing | None:
        """Return the neighbour that has a chunk and may be asked again first, None if no neighbour has it."""
        if not self.copies[chunk]:
            return None
        soonest: Standing | None = None
        for n in self.neighbours.values():
            if n.have[chunk] and n.listening:
                s = n.standing
                if not s.banned and (soonest is None or s.rests_until < soonest.rests_until):
                    soonest = s
        return soonest

    def is_pending(self, group: int, now: float) -> bool:
        """Tell whether a neighbour that may be asked is fetching a group from the registry."""
        for n in self.neighbours.values():
            if group in n.pending and n.listening:
                s = n.standing
                if s.rests_until <= now and not s.banned:
                    return True
        return False
