"""What files of web servers are: the first digests that somebody gives for a section are pinned, everybody else is told these.

Decided here: who fetches a section whose digests nobody knows, when that moves on, and what is forgotten. Rules that the tests hold: what
is pinned never changes while it is remembered; a section has at most one live lease, and none when it is pinned; who waits hears of it.
Pure but for its own state. Memory: bounded by MAX_BYTES of digests and MAX_FILES files; the one that was asked for longest ago goes
first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from p2p.protocol.messages import FromScheduler, Pin, PinAlive, PinAnswer, PinAsk, PinFailed, PinPut, PinVerdict
from rafsfs.files.plan import FilePlan, plan_file

Out = list[tuple[str, FromScheduler]]

LEASE_S: Final = 15.0
"""Without a sign of life for this long, a section is somebody else's to fetch."""
SLOWEST_BYTES_PER_S: Final = 256 << 10
"""Signs of life or not: who is slower than this over a whole section loses it."""
GRACE_S: Final = 60.0
REST_S: Final = 5.0
"""Who gave a section back, or lost it, gets none of that file for this long, if somebody else waits."""
PEER_LEASES: Final = 4
MAX_BYTES: Final = 256 << 20
"""Digests kept: of 8 TiB of files."""
MAX_FILES: Final = 10_000
_ANSWER_BYTES: Final = 512 << 10
"""Digests in one answer; the rest is asked for again."""


@dataclass(slots=True)
class SectionLease:
    """Somebody fetches a section whose digests nobody knows."""

    peer: str
    expires: float
    ends: float
    """Whatever is said until then."""

    def is_live(self, now: float) -> bool:
        """Tell whether it still counts."""
        return now < self.expires and now < self.ends


@dataclass(slots=True)
class FilePins:
    """What is known of one file."""

    plan: FilePlan
    pinned: dict[int, bytes] = field(default_factory=dict)
    leases: dict[int, SectionLease] = field(default_factory=dict)
    watchers: dict[int, set[str]] = field(default_factory=dict)
    """Of a section that is not pinned, who asked for it."""
    rests: dict[str, float] = field(default_factory=dict)

    @property
    def bytes_held(self) -> int:
        """Bytes of its digests."""
        return sum(map(len, self.pinned.values()))


class PinTable:
    """All files."""

    def __init__(self, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> None:
        self.files: OrderedDict[bytes, FilePins] = OrderedDict()
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._bytes = 0

    def ask(self, peer: str, event: PinAsk, now: float) -> Out:
        """Say what sections are, or who fetches them."""
        file = self._file(event.file, event.length)
        if file is None:
            return [(peer, PinAnswer(event.number, event.file, []))]
        held = sum(lease.peer == peer and lease.is_live(now) for lease in file.leases.values())
        room = min(event.room, PEER_LEASES - held)
        pins: list[Pin] = []
        size = 0
        for section in dict.fromkeys(event.wanted):
            if section >= file.plan.sections:
                continue
            digests = file.pinned.get(section)
            if digests is not None:
                size += len(digests)
                if size <= _ANSWER_BYTES or not pins:
                    pins.append(Pin(section, PinVerdict.PINNED, digests))
                continue
            lease = file.leases.get(section)
            if lease is not None and not lease.is_live(now):
                self._end(file, section, now)
                lease = None
            mine = lease is not None and lease.peer == peer
            if mine and lease is not None:
                lease.expires = now + LEASE_S
            elif lease is None and room > 0 and not self._rests(file, peer, section, now):
                room -= 1
                mine = True
                length = file.plan.extent(section)[1]
                file.leases[section] = SectionLease(peer, now + LEASE_S, now + GRACE_S + length / SLOWEST_BYTES_PER_S)
            if not mine:
                file.watchers.setdefault(section, set()).add(peer)
            pins.append(Pin(section, PinVerdict.LEASE if mine else PinVerdict.WAIT))
        return [(peer, PinAnswer(event.number, event.file, pins))]

    def put(self, peer: str, event: PinPut, now: float) -> Out:
        """Take what a section is, if nobody has said so before; tell those who wait, and the sender what holds."""
        file = self._file(event.file, event.length)
        if file is None or not file.plan.fits(event.section, event.digests):
            return [(peer, PinAnswer(event.number, event.file, []))] if event.number else []
        out: Out = []
        digests = file.pinned.get(event.section)
        if digests is None:
            digests = file.pinned[event.section] = event.digests
            self._bytes += len(digests)
            file.leases.pop(event.section, None)
            news = PinAnswer(0, event.file, [Pin(event.section, PinVerdict.PINNED, digests)])
            out += [(other, news) for other in sorted(file.watchers.pop(event.section, ())) if other != peer]
            self._forget_old()
        if event.number:
            pin = Pin(event.section, PinVerdict.PINNED, digests)
            out.append((peer, PinAnswer(event.number, event.file, [pin])))
        return out

    def alive(self, peer: str, event: PinAlive, now: float) -> Out:
        """Prolong leases."""
        file = self.files.get(event.file)
        for section in event.sections if file else ():
            assert file is not None
            lease = file.leases.get(section)
            if lease is not None and lease.peer == peer:
                lease.expires = now + LEASE_S
        return []

    def failed(self, peer: str, event: PinFailed, now: float) -> Out:
        """Take leases back."""
        file = self.files.get(event.file)
        out: Out = []
        for section in event.sections if file else ():
            assert file is not None
            lease = file.leases.get(section)
            if lease is not None and lease.peer == peer:
                out += self._free(event.file, file, section, now)
        return out

    def gone(self, peer: str, now: float) -> Out:
        """A peer has gone: what it was to fetch is free."""
        out: Out = []
        for key, file in self.files.items():
            for watching in file.watchers.values():
                watching.discard(peer)
            file.rests.pop(peer, None)
            for section in [section for section, lease in file.leases.items() if lease.peer == peer]:
                out += self._free(key, file, section, now)
        return out

    def tick(self, now: float) -> Out:
        """Let time pass."""
        out: Out = []
        for key, file in self.files.items():
            for section in [section for section, lease in file.leases.items() if not lease.is_live(now)]:
                out += self._free(key, file, section, now)
            for peer in [peer for peer, until in file.rests.items() if until <= now]:
                del file.rests[peer]
        return out

    def _free(self, key: bytes, file: FilePins, section: int, now: float) -> Out:
        """End a lease; who waits for the section is told to ask again."""
        self._end(file, section, now)
        news = PinAnswer(0, key, [Pin(section, PinVerdict.WAIT)])
        return [(peer, news) for peer in sorted(file.watchers.get(section, ()))]

    def _end(self, file: FilePins, section: int, now: float) -> None:
        lease = file.leases.pop(section)
        file.rests[lease.peer] = now + REST_S

    def _rests(self, file: FilePins, peer: str, section: int, now: float) -> bool:
        return file.rests.get(peer, 0.0) > now and bool(file.watchers.get(section, set()) - {peer})

    def _file(self, key: bytes, length: int) -> FilePins | None:
        """Return a file, made if need be; None if its length cannot be, or is not what others say."""
        file = self.files.get(key)
        if file is None:
            try:
                file = FilePins(plan_file(length))
            except ValueError:
                return None
            self.files[key] = file
            self._forget_old()
        self.files.move_to_end(key)
        return file if file.plan.length == length else None

    def _forget_old(self) -> None:
        while len(self.files) > 1 and (len(self.files) > self._max_files or self._bytes > self._max_bytes):
            _, file = self.files.popitem(last=False)
            self._bytes -= file.bytes_held
