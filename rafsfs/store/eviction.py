"""Which data spaces leave the cache, and when. Pure: sizes, times and facts in, an order out.

Rules. What a mount, a pull or a filling uses stays, and so does what is pinned; of the rest, the least recently used goes first, whole,
until the target is met and no longer. A data space that holds nothing frees nothing and is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ..errors import UsageError
from ..units import parse_size

HIGH_SHARE: Final = 0.95
"""Of the quota: eviction begins above it, so that what arrives while files are being removed still fits."""
LOW_SHARE: Final = 0.85
"""Of the quota: eviction goes down to it, so that it runs once per tenth of the cache and not once per chunk."""
SEED_SHARE: Final = 80
"""Percent of the file system that a seed keeps at most unless told otherwise: the rest is for the system and for other programs."""


@dataclass(frozen=True, slots=True)
class Held:
    """A data space on this node."""

    space_id: bytes
    held_bytes: int
    last_used: float
    """Seconds since 1970."""
    in_use: bool = False
    pinned: bool = False

    @property
    def may_go(self) -> bool:
        """Whether it can be evicted."""
        return not self.in_use and not self.pinned and self.held_bytes > 0


@dataclass(frozen=True, slots=True)
class Quota:
    """How many bytes of data the cache may hold."""

    limit: int

    @property
    def high(self) -> int:
        """Bytes above which eviction begins."""
        return int(self.limit * HIGH_SHARE)

    @property
    def low(self) -> int:
        """Bytes down to which it goes."""
        return int(self.limit * LOW_SHARE)


def plan_eviction(spaces: Iterable[Held], target_bytes: int) -> list[Held]:
    """Return what goes so that at most `target_bytes` are held, in order; all that may go if that is not enough."""
    known = list(spaces)
    held = sum(space.held_bytes for space in known)
    doomed = []
    for space in sorted(known, key=lambda space: (space.last_used, -space.held_bytes, space.space_id)):
        if held <= target_bytes:
            break
        if space.may_go:
            doomed.append(space)
            held -= space.held_bytes
    return doomed


def parse_quota(text: str, disk_bytes: int) -> Quota | None:
    """Return what `none`, a size, or a percentage of a file system of `disk_bytes` means. Raises UsageError."""
    word = text.strip()
    if word.lower() in {"", "none"}:
        return None
    if word.endswith("%"):
        digits = word[:-1].strip()
        if not digits.isascii() or not digits.isdigit() or not 1 <= int(digits) <= 100:
            raise UsageError(f"quota {text[:40]!r} is not understood, expected 1% to 100% of the file system")
        return Quota(disk_bytes * int(digits) // 100)
    limit = parse_size(word)
    if not limit:
        raise UsageError("a quota of 0 holds nothing; say none for no quota")
    return Quota(limit)
