"""Reading a header whose length nobody knows: small values from a file through a window that moves.

Rule: at most `limit` bytes are looked at, whatever the counts in them say.
"""

from __future__ import annotations

import struct

from ..errors import FormatError
from .tensor import ReadAt

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Window:
    """A position in a file of `size` bytes."""

    def __init__(self, read: ReadAt, size: int, limit: int, *, step: int = 1 << 20) -> None:
        self._read = read
        self._size = size
        self._left = limit
        self._data = b""
        self._step = step
        self._start = 0
        self.position = 0
        self._counted = 0

    def count_one(self, most: int) -> None:
        """Count something that the caller meets. Raises FormatError when there have been more than `most`."""
        self._counted += 1
        if self._counted > most:
            raise FormatError(f"more than {most} parts, which this program does not look through")

    def take(self, length: int) -> bytes:
        """Return the next bytes. Raises FormatError at the end of the file and beyond the limit."""
        at = self.position - self._start
        if at < 0 or at + length > len(self._data):
            self._fill(length)
            at = 0
        self.position += length
        return self._data[at : at + length]

    def skip(self, length: int) -> None:
        """Move on without looking."""
        if self.position + length > self._size:
            raise FormatError(f"something of {length} bytes at {self.position} leaves the file of {self._size}")
        self.position += length

    def u32(self) -> int:
        """Return the next little-endian u32."""
        found: int = _U32.unpack(self.take(4))[0]
        return found

    def u64(self) -> int:
        """Return the next little-endian u64."""
        found: int = _U64.unpack(self.take(8))[0]
        return found

    def _fill(self, length: int) -> None:
        if self.position + length > self._size:
            raise FormatError(f"header ends at byte {self._size}, in the middle of a value")
        wanted = min(max(length, self._step), self._size - self.position)
        self._left -= wanted
        if self._left < 0:
            raise FormatError("header is longer than this program looks at")
        self._start = self.position
        self._data = self._read(self.position, wanted)
        if len(self._data) < length:
            raise FormatError(f"header ends at byte {self._start + len(self._data)}, in the middle of a value")
