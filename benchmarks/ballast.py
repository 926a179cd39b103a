"""Memory at hand: what a run will need is held before it begins and let go of while it runs.

Why. A virtual machine may give free memory back to its host; the first touch of such a page then waits for the host and is counted as the
guest's CPU time. Seen: files written at 0.25 GB/s into memory that had been free for ten seconds and at 3.6 GB/s into memory that had just
been freed, the same program in the same minute. Eight nodes that each fill a cache touch gigabytes: without this, such a host is what is
measured. It changes nothing on a machine that keeps its memory. Ours and the baseline run under it alike.

So as much is let go of as has been taken, AHEAD bytes before that: what is let go of long before it is taken has gone back to the host
by then. And what else is free has to be held for the whole run (`rest`): of much free memory the kernel takes large pieces for large
writes, which are just those that have long been free. With 8 nodes that alone was 3 s of 23 s of CPU.

Concurrency: one thread gives; `hold` and `giving` are called from one other thread, not at once.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

AHEAD: Final = 256 << 20
"""Less than eight nodes take in a second; a host is told of free pages after two."""
SPARE: Final = 1 << 30
"""Free beside what a run is said to need: for whatever else the machine does."""
_STEP: Final = 1 << 20
_PACE_S: Final = 0.02


class Ballast:
    """Touched memory. `size`: bytes, rounded down to MiB."""

    def __init__(self, size: int, *, kept: bool = False) -> None:
        """`kept`: it is not let go of before the end."""
        self._size = size // _STEP * _STEP
        self._map = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Small pages, since the page cache takes such: a huge page that is let go of in part is not free at once.
        self._map.madvise(mmap.MADV_HUGEPAGE if kept else mmap.MADV_NOHUGEPAGE)
        self._ended = threading.Event()

    def hold(self) -> None:
        """Touch all of it. Takes seconds where the host has to find the memory."""
        block = b"\1" * _STEP
        for offset in range(0, self._size, _STEP):
            self._map[offset : offset + _STEP] = block

    @contextmanager
    def giving(self) -> Iterator[None]:
        """Let go of it as it is needed; what is left at the end of the block is kept."""
        self._ended.clear()
        free = _free() + AHEAD
        thread = threading.Thread(target=self._give, args=(free,))
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _give(self, free: int) -> None:
        """Keep that many bytes free."""
        offset = 0
        while offset < self._size and not self._ended.is_set():
            length = min((free - _free()) // _STEP * _STEP, self._size - offset)
            if length > 0:
                self._map.madvise(mmap.MADV_DONTNEED, offset, length)
                offset += length
            self._ended.wait(_PACE_S)

    def close(self) -> None:
        """Let go of all of it."""
        self._map.close()


@contextmanager
def rest(needed: int) -> Iterator[None]:
    """Hold what is free but for `needed` bytes and SPARE. Takes a minute for 16 GiB where the host has to find them."""
    size = _free() - needed - SPARE
    if size < _STEP:
        yield
        return
    with closing(Ballast(size, kept=True)) as held:
        held.hold()
        yield


def _free() -> int:
    """Return the bytes of the machine that nothing uses."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemFree:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/meminfo does not say MemFree")
