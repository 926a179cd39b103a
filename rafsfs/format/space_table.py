"""Content table of one data space: where its chunks are and what they hash to.

Decided here: the 48-byte content record and how an offset finds its chunk. Not here: where stored bytes are
(chunk_map.py). Rule: the FUSE worker imports this module, so it loads neither numpy nor any I/O library, and no
object is kept per chunk. Specification: docs/format/chunk-map.md.
"""

from __future__ import annotations

import struct
import sys
from bisect import bisect_left, bisect_right
from functools import cached_property
from typing import Final, Protocol

from blake3 import blake3

from ..errors import FormatError
from ..types import SpaceId

RECORD_SIZE: Final = 48
"""Bytes per content record: digest 32s, offset u64, length u32, flags u32."""

MAX_CHUNK: Final = 16 << 20
"""Most bytes of one chunk: bounds every buffer that a reader allocates for it."""

MAX_SPACE: Final = 16 << 40
"""Most bytes of a data space: 32-bit EROFS block addresses of 4 KiB blocks."""

SPACE_ID_CONTEXT: Final = b"rafs.space.v1\0"
"""Domain separation: a content table never hashes to the digest of some chunk."""

_RECORD = struct.Struct("<32sQII")
_EXTENT = struct.Struct("<QI")
_OFFSET = struct.Struct("<Q")
assert _RECORD.size == RECORD_SIZE
_IS_LITTLE: Final = sys.byteorder == "little"


class _Numbers(Protocol):
    """What bisect looks through."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> int: ...


class _Offsets:
    """The offsets of a table on a machine of the other byte order."""

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def __len__(self) -> int:
        return self._view.nbytes // RECORD_SIZE

    def __getitem__(self, index: int) -> int:
        return int(_OFFSET.unpack_from(self._view, index * RECORD_SIZE + 32)[0])


def pack_record(digest: bytes, offset: int, length: int) -> bytes:
    """Return one content record (48 bytes)."""
    return _RECORD.pack(digest, offset, length, 0)


class SpaceTable:
    """A view over the content table of a data space of `size` bytes; copies nothing.

    The constructor checks sizes only, so that opening is O(1); `validate` checks every record. Chunk numbers run
    from 0 to count-1 in order of offset.
    """

    def __init__(self, buffer: bytes | bytearray | memoryview, size: int) -> None:
        view = memoryview(buffer)
        if view.nbytes % RECORD_SIZE:
            raise FormatError(f"content table is {view.nbytes} bytes, expected a multiple of {RECORD_SIZE}")
        if not 0 <= size <= MAX_SPACE:
            raise FormatError(f"data space of {size} bytes, expected at most {MAX_SPACE}")
        self._view = view.cast("B")
        self.size = size
        self.count = view.nbytes // RECORD_SIZE
        # The offsets alone, where they lie: bisect goes through them at the speed of C, and nothing is copied.
        self._offsets: _Numbers = self._view.cast("Q")[4::6] if _IS_LITTLE else _Offsets(self._view)

    @property
    def buffer(self) -> memoryview:
        """The raw table, 48 bytes per chunk."""
        return self._view

    @cached_property
    def space_id(self) -> SpaceId:
        """Identity of the space: hash of its size and this table. Always computed, never read from an image."""
        hasher = blake3(SPACE_ID_CONTEXT + _OFFSET.pack(self.size))
        hasher.update(self._view)
        return hasher.digest()

    def digest(self, index: int) -> bytes:
        """Return the BLAKE3-256 digest of chunk `index`."""
        start = self._start(index)
        return bytes(self._view[start : start + 32])

    def extent(self, index: int) -> tuple[int, int]:
        """Return (offset in the space, length) of chunk `index`, in bytes. Raises FormatError if it leaves the space."""
        offset, length = _EXTENT.unpack_from(self._view, self._start(index) + 32)
        if not 0 < length <= MAX_CHUNK or offset + length > self.size:
            raise FormatError(
                f"chunk {index} covers [{offset}, {offset + length}) of a data space of {self.size} bytes"
            )
        return offset, length

    def find(self, offset: int) -> int:
        """Return the chunk that holds byte `offset`, or the next one after it (`count` if there is none)."""
        low = bisect_right(self._offsets, offset)
        if low:
            start, length = _EXTENT.unpack_from(self._view, (low - 1) * RECORD_SIZE + 32)
            if offset < start + length:
                return low - 1
        return low

    def covering(self, offset: int, length: int) -> range:
        """Return the numbers of the chunks that overlap [offset, offset+length)."""
        if length <= 0:
            return range(0)
        first = self.find(offset)
        return range(first, max(first, bisect_left(self._offsets, offset + length, first)))

    def validate(self) -> None:
        """Check every record: sorted, disjoint, inside the space, flags zero. Raises FormatError naming the first bad one."""
        import numpy as np  # noqa: PLC0415 - only the daemon and tools validate; the worker never pays for numpy

        if not self.count:
            return
        records = np.frombuffer(
            self._view,
            dtype=[("digest", "V32"), ("offset", "<u8"), ("length", "<u4"), ("flags", "<u4")],
        )
        offsets = records["offset"]
        lengths = records["length"].astype(np.uint64)
        bad = (lengths == 0) | (lengths > MAX_CHUNK) | (records["flags"] != 0)
        bad |= (offsets > MAX_SPACE) | (offsets + lengths > self.size)
        ends = offsets[:-1] + lengths[:-1]
        bad[1:] |= offsets[1:] < ends
        if bad.any():
            index = int(bad.argmax())
            raise FormatError(
                f"chunk {index} of the content table is out of order or out of bounds "
                f"(offset {int(offsets[index])}, length {int(lengths[index])}, space {self.size})"
            )

    def _start(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise FormatError(f"chunk {index} of a data space with {self.count} chunks")
        return index * RECORD_SIZE
