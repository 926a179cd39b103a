"""What a scheduler knows: peers, tasks, who has which group, who has which lease. Plain data and the small steps on it; decisions are in
engine.py.

Memory: per task and group 9 bytes, per peer and task one bit per group, 100 bytes per live lease.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from p2p.protocol.groups import unpack_bits
from p2p.protocol.messages import Contact, Kind

from .weights import Place


@dataclass(slots=True)
class Lease:
    """Somebody fetches a group from the registry."""

    peer: str
    expires: float


@dataclass(slots=True)
class Member:
    """A peer in a task."""

    have: bytearray
    """One byte per group: 1 is complete."""
    count: int = 0
    neighbours: set[str] = field(default_factory=set)
    blocked: set[str] = field(default_factory=set)
    """Peers that it has complained of."""
    rests_until: float = 0.0
    """No lease before this time: it has just given one back."""
    leases: set[int] = field(default_factory=set)


class TaskState:
    """A task."""

    def __init__(self, task: bytes, groups: int, image: str) -> None:
        self.task = task
        self.groups = groups
        self.image = image
        self.members: dict[str, Member] = {}
        self.copies = array("I", bytes(4 * groups))
        self.holder: dict[int, str] = {}
        """Of each group, who announced it last."""
        self.leases: dict[int, Lease] = {}
        self.ordered = False
        """Whether seeds have been told of it."""

    def add(self, peer: str, have: bytes) -> Member:
        """Take a peer in, or again, with what it has."""
        self.remove(peer)
        member = self.members[peer] = Member(bytearray(self.groups))
        for group in unpack_bits(have, self.groups):
            self.mark(peer, group)
        return member

    def mark(self, peer: str, group: int) -> bool:
        """Note that a peer has a group; return whether that is new."""
        member = self.members[peer]
        if member.have[group]:
            return False
        member.have[group] = 1
        member.count += 1
        self.copies[group] += 1
        self.holder[group] = peer
        return True

    def remove(self, peer: str) -> None:
        """Take a peer out, with its leases and what it has."""
        member = self.members.pop(peer, None)
        if member is None:
            return
        for group in list(member.leases):
            self.end_lease(group)
        position = -1
        while (position := member.have.find(1, position + 1)) >= 0:
            self.copies[position] -= 1
            if self.holder.get(position) == peer:
                del self.holder[position]
        for other in member.neighbours:
            if other in self.members:
                self.members[other].neighbours.discard(peer)

    def start_lease(self, peer: str, group: int, expires: float) -> None:
        """Give a group, which must have no live lease, to a member."""
        assert group not in self.leases
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

    def find_holder(self, group: int, but: set[str]) -> str | None:
        """Return a member that has a group and is not in `but`."""
        if not self.copies[group]:
            return None
        last = self.holder.get(group)
        if last is not None and last not in but:
            return last
        for peer, member in self.members.items():
            if member.have[group] and peer not in but:
                self.holder[group] = peer
                return peer
        return None


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
    """Who has reported wrong bytes from it, and when."""

    @property
    def is_seed(self) -> bool:
        """Whether it is asked first to fetch from the registry."""
        return self.contact.kind is Kind.SEED


@dataclass(slots=True)
class PreheatState:
    """A tool waits for an image to be everywhere."""

    tool: str
    number: int
    nodes: dict[str, tuple[int, int, str]] = field(default_factory=dict)
