"""What a scheduler knows: peers, tasks, who has which group, who has which lease. Plain data and the small steps on it; decisions are in
engine.py.

Memory: per task and group 4 bytes and up to KNOWN names of holders (100 to 200 bytes), per peer and task one bit per group and about 1.5 KB
for its place among the others, 200 bytes per live lease. Cost: nothing here looks at all peers of a task, but for a group whose last KNOWN
holders are gone while others have it; what concerns all groups of a peer (it comes, it goes) is done on whole bitmaps.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from p2p.protocol.messages import Contact, Kind

from .wanted import Wanted
from .weights import Place

KNOWN: Final = 8
"""Holders of a group that are remembered by name: some of them may be gone, or be complained of, when they are needed."""
CHOICE: Final = 4
"""Holders of a group among which the least busy one is chosen."""
_PROBES: Final = 32
"""Members asked at random for a group whose known holders are gone, before all are looked at."""


class Crowd:
    """A set of names of which some can be drawn at random, at a cost that does not grow with it."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._position: dict[str, int] = {}

    def add(self, name: str) -> None:
        """Take a name in."""
        if name not in self._position:
            self._position[name] = len(self._names)
            self._names.append(name)

    def discard(self, name: str) -> None:
        """Take a name out; the last one takes its place."""
        position = self._position.pop(name, None)
        if position is not None:
            last = self._names.pop()
            if last != name:
                self._names[position] = last
                self._position[last] = position

    def draw(self, rng: random.Random, count: int) -> list[str]:
        """Return up to `count` different names, all of them if there are no more."""
        names, draw = self._names, rng.random
        size = len(names)
        if size <= count:
            return list(names)
        return list({names[int(draw() * size)]: None for _ in range(count)})

    def newest(self, count: int) -> list[str]:
        """Return names that were taken in late, unless others have gone since."""
        return self._names[-count:]

    def __contains__(self, name: str) -> bool:
        return name in self._position

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(slots=True)
class Lease:
    """Somebody fetches a group from the registry."""

    peer: str
    expires: float


@dataclass(slots=True)
class Member:
    """A peer in a task."""

    have: bytearray
    """A bit per group, the lowest of each byte first: 1 is complete."""
    count: int = 0
    neighbours: set[str] = field(default_factory=set)
    blocked: dict[str, float] = field(default_factory=dict)
    """Peers that it has complained of, and until when it is not pointed at them."""
    rests_until: float = 0.0
    """No lease before this time: it has just given one back."""
    leases: set[int] = field(default_factory=set)

    def avoids(self, peer: str, now: float) -> bool:
        """Tell whether it has complained of a peer lately."""
        return peer in self.blocked and self.blocked[peer] > now

    def has(self, group: int) -> bool:
        """Tell whether a group is complete there."""
        return bool(self.have[group >> 3] >> (group & 7) & 1)


class TaskState:
    """A task."""

    def __init__(self, task: bytes, groups: int, image: str) -> None:
        self.task = task
        self.groups = groups
        self.image = image
        self.members: dict[str, Member] = {}
        self.names = Crowd()
        self.seeds = Crowd()
        self.complete = Crowd()
        """Members that have all groups; they are not among the holders that are known by group."""
        self.copies = array("I", bytes(4 * groups))
        self._counts = np.frombuffer(self.copies, dtype=np.uint32)
        self._known: dict[int, list[str]] = {}
        """Of groups, members that have had them, the last that announced them at the end."""
        self.leases: dict[int, Lease] = {}
        self.wanted = Wanted()
        self.pace = 0.0
        self.paced_at = 0.0
        self.ordered = False
        """Whether seeds have been told of it."""

    def add(self, peer: str, have: bytes, *, is_seed: bool = False) -> Member:
        """Take a peer in, or again, with what it has."""
        self.remove(peer)
        width = (self.groups + 7) // 8
        bitmap = bytearray(have[:width].ljust(width, b"\0"))
        if self.groups & 7:
            bitmap[-1] &= (1 << (self.groups & 7)) - 1
        member = self.members[peer] = Member(bitmap)
        bits = self._bits(member)
        self._counts += bits
        member.count = int(bits.sum())
        self.names.add(peer)
        if is_seed:
            self.seeds.add(peer)
        if member.count == self.groups:
            self.complete.add(peer)
        else:
            for group in np.nonzero(bits & (self._counts <= KNOWN))[0].tolist():
                self._note_holder(group, peer)
        return member

    def mark(self, peer: str, member: Member, group: int) -> None:
        """Note that a member has a group. What a member has only grows: a node evicts whole data spaces, which it leaves first."""
        byte, bit = group >> 3, 1 << (group & 7)
        have = member.have
        if have[byte] & bit:
            return
        have[byte] |= bit
        member.count += 1
        self.copies[group] += 1
        self.wanted.drop(group)
        if member.count == self.groups:
            self.complete.add(peer)
        self._note_holder(group, peer)

    def remove(self, peer: str) -> None:
        """Take a peer out, with its leases and what it has."""
        member = self.members.pop(peer, None)
        if member is None:
            return
        for group in list(member.leases):
            self.end_lease(group)
        if member.count:
            self._counts -= self._bits(member)
        for crowd in (self.names, self.seeds, self.complete):
            crowd.discard(peer)
        for other in member.neighbours:
            if other in self.members:
                self.members[other].neighbours.discard(peer)

    def pace_at(self, now: float) -> float:
        """Return how many leases have been finished lately: those of the last second count most."""
        return self.pace * math.exp(self.paced_at - now)

    def start_lease(self, peer: str, group: int, expires: float) -> None:
        """Give a group, which must have no live lease, to a member."""
        assert group not in self.leases
        self.wanted.drop(group)
        self.leases[group] = Lease(peer, expires)
        self.members[peer].leases.add(group)

    def end_lease(self, group: int) -> str | None:
        """End the lease of a group; return whose it was."""
        lease = self.leases.pop(group, None)
        if lease is None:
            return None
        member = self.members.get(lease.peer)
        if member:
            member.leases.discard(group)
        return lease.peer

    def find_holders(self, group: int, asker: str, may: Callable[[str], bool] | None, rng: random.Random) -> list[str]:
        """Return some members, not the asker, that have a group and that `may` allows (None: all); none only if there is none."""
        if not self.copies[group]:
            return []
        found: list[str] = []
        members, byte, bit = self.members, group >> 3, 1 << (group & 7)
        for peer in reversed(self._known.get(group, ())):
            member = members.get(peer)
            if member is None or not member.have[byte] & bit or peer == asker or (may is not None and not may(peer)):
                continue
            found.append(peer)
            if len(found) >= CHOICE:
                break
        if len(self.complete):
            for peer in self.complete.draw(rng, 2):
                if peer != asker and peer not in found and (may is None or may(peer)):
                    found.append(peer)
        if found:
            return found
        for names in (self.names.draw(rng, _PROBES), self.names):
            found = [p for p in names if p != asker and self._has(p, group) and (may is None or may(p))]
            if found:
                self._known[group] = found[-KNOWN:]
                return found[-KNOWN:]
        return []

    def _has(self, peer: str, group: int) -> bool:
        member = self.members.get(peer)
        return member is not None and member.has(group)

    def _note_holder(self, group: int, peer: str) -> None:
        known = self._known.get(group)
        if known is None:
            self._known[group] = [peer]
            return
        known.append(peer)
        if len(known) > KNOWN:
            del known[0]

    def _bits(self, member: Member) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        bits = np.unpackbits(np.frombuffer(member.have, dtype=np.uint8), bitorder="little")
        return bits[: self.groups]


@dataclass(slots=True)
class PeerState:
    """A connected program."""

    contact: Contact
    place: Place
    last_seen: float
    tasks: set[bytes] = field(default_factory=set)
    groups: int = 0
    """Of all its tasks."""
    degree: int = 0
    failures: float = 0.0
    failed_at: float = 0.0
    accused_by: dict[str, float] = field(default_factory=dict)
    """Hosts from which wrong bytes of it have been reported, and when: many ids on one machine are one accuser."""
    host: str = ""
    """Where its connection comes from, whatever it says of itself."""

    @property
    def is_seed(self) -> bool:
        """Whether it is asked first to fetch from the registry."""
        return self.contact.kind is Kind.SEED
