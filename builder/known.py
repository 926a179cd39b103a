"""The chunks that a build has met, by digest, and where each is stored. In memory, about 60 bytes per distinct chunk, 200 more for
one stored as a difference.

Decided here: the table, and nothing about order: callers add in the order that decides which of two equal chunks is the new one. A
dict of objects would take 200 bytes per chunk: 3 GB for a TiB in chunks of 64 KiB.

Concurrency: one task adds; threads may ask `in` meanwhile, a lock keeps them from a table that is being made anew.
"""

from __future__ import annotations

import struct
import threading
from array import array
from dataclasses import dataclass
from typing import Final

_PLACE: Final = struct.Struct("<QIHBB")
_RECORD: Final = 32 + _PLACE.size
_FIRST_SLOTS: Final = 1 << 10


@dataclass(frozen=True, slots=True)
class Place:
    """Where a chunk is stored."""

    blob: int
    offset: int
    stored_size: int
    codec: int
    param: int
    base: tuple[int, int] | None = None
    """(data space, chunk) that it is a difference to."""


class KnownChunks:
    """Digests in the order of their arrival; an open-addressed table of 32-bit numbers finds them."""

    def __init__(self) -> None:
        self._records = bytearray()
        self._slots = array("I", bytes(4 * _FIRST_SLOTS))  # number + 1; 0: free
        self._count = 0
        self._bases: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def add(self, digest: bytes) -> tuple[int, bool]:
        """Return (number of the chunk with this digest, whether it is new)."""
        with self._lock:
            slot, number = self._find(digest)
            if number is not None:
                return number, False
            number = self._count
            self._slots[slot] = number + 1
            self._records += digest + bytes(_PLACE.size)
            self._count += 1
            if 3 * self._count > 2 * len(self._slots):
                self._grow()
            return number, True

    def __contains__(self, digest: bytes) -> bool:
        with self._lock:
            return self._find(digest)[1] is not None

    def set_place(self, number: int, place: Place) -> None:
        """Say where chunk `number` is stored."""
        _PLACE.pack_into(
            self._records,
            number * _RECORD + 32,
            place.offset,
            place.stored_size,
            place.blob,
            place.codec,
            place.param,
        )
        if place.base is not None:
            self._bases[number] = place.base

    def place(self, number: int) -> Place:
        """Return what `set_place` was told."""
        offset, stored_size, blob, codec, param = _PLACE.unpack_from(self._records, number * _RECORD + 32)
        return Place(blob, offset, stored_size, codec, param, self._bases.get(number))

    def _find(self, digest: bytes) -> tuple[int, int | None]:
        """Return (slot, number) of a digest; (free slot, None) if it is not known."""
        mask = len(self._slots) - 1
        slot = int.from_bytes(digest[:8], "little") & mask
        while taken := self._slots[slot]:
            at = (taken - 1) * _RECORD
            if self._records[at : at + 32] == digest:
                return slot, taken - 1
            slot = (slot + 1) & mask
        return slot, None

    def _grow(self) -> None:
        slots = array("I", bytes(8 * len(self._slots)))
        mask = len(slots) - 1
        for number in range(self._count):
            at = number * _RECORD
            slot = int.from_bytes(self._records[at : at + 8], "little") & mask
            while slots[slot]:
                slot = (slot + 1) & mask
            slots[slot] = number + 1
        self._slots = slots
