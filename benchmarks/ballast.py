"""Memory at hand: what a run will need is held before it begins and let go of while it runs.

Why. A virtual machine may give free memory back to its host; the first touch of such a page then waits for the host and is counted as the
guest's CPU time. Seen: files written at 0.25 GB/s into memory that had been free for ten seconds and at 3.6 GB/s into memory that had just
been freed, the same program in the same minute. Eight nodes that each fill a cache touch gigabytes: without this, such a host is what is
measured. It changes nothing on a machine that keeps its memory. Ours and the baseline run under it alike.

Concurrency: one thread gives; `hold` and `giving` are called from one other thread, not at once.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_STEP: Final = 1 << 20
_PACE_S: Final = 0.05


class Ballast:
    """Touched memory. `size`: bytes, rounded down to MiB."""

    def __init__(self, size: int) -> None:
        self._size = size // _STEP * _STEP
        self._map = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Small pages, since the page cache takes such: a huge page that is let go of in part is not free at once.
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self._ended = threading.Event()

    def hold(self) -> None:
        """Touch all of it. Takes seconds where the host has to find the memory."""
        block = b"\1" * _STEP
        for offset in range(0, self._size, _STEP):
            self._map[offset : offset + _STEP] = block

    @contextmanager
    def giving(self, seconds: float) -> Iterator[None]:
        """Let go of it bit by bit, a tenth at once and the rest within `seconds`; what is left at the end of the block is kept."""
        self._ended.clear()
        thread = threading.Thread(target=self._give, args=(seconds,))
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _give(self, seconds: float) -> None:
        step = max(_STEP, int(self._size * _PACE_S / seconds) // _STEP * _STEP)
        offset = 0
        ahead = self._size // 10 // _STEP * _STEP
        while offset < self._size:
            length = min(ahead or step, self._size - offset)
            ahead = 0
            self._map.madvise(mmap.MADV_DONTNEED, offset, length)
            offset += length
            if self._ended.wait(_PACE_S):
                return

    def close(self) -> None:
        """Let go of all of it."""
        self._map.close()
