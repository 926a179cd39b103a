"""How much may be fetched that nobody has asked for. Pure: bytes asked for ahead and bytes read in, a grant out.

Rule: what was fetched ahead and has not been read is never more than FLOOR_BYTES plus what has been read. So guesses that are good pay
for bigger ones, and whoever reads at random from an image costs at most twice what he reads, and the floor.
"""

from __future__ import annotations

from typing import Final

FLOOR_BYTES: Final = 64 << 20
"""Two windows as configured at once before anything that was fetched ahead has been read."""


class AheadAccount:
    """What was fetched ahead of the readers of one data space, and what became of it. Chunks are counted once.

    Memory: a small integer per chunk fetched ahead and not read yet, which the rule bounds.
    """

    def __init__(self, floor: int = FLOOR_BYTES) -> None:
        self._floor = floor
        self._unread: dict[int, int] = {}
        self.unread_bytes = 0
        self.asked_bytes = 0
        self.read_bytes = 0
        """Bytes that readers got, whether they were fetched ahead or not."""
        self.used_bytes = 0
        """Of `asked_bytes`, those that a reader got later."""

    def grant(self, chunk: int, size: int) -> bool:
        """Tell whether a chunk of `size` bytes may be fetched ahead, and count it if so. One that was granted before still may."""
        if chunk in self._unread:
            return True
        if self.unread_bytes + size > self._floor + self.read_bytes:
            return False
        self._unread[chunk] = size
        self.unread_bytes += size
        self.asked_bytes += size
        return True

    def read(self, chunk: int, size: int) -> None:
        """Note that a reader got a chunk."""
        self.read_bytes += size
        ahead = self._unread.pop(chunk, 0)
        self.unread_bytes -= ahead
        self.used_bytes += ahead
