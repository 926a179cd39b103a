"""Buffers of the pipeline: how many bytes may be out at once (ByteBudget), and using them again (BufferPool).

A fresh bytearray of a megabyte is zeroed and faulted in page by page, 0.15 ms each time; one that was used before is not.
BufferPool is thread-safe without a lock: the free lists are deques, whose append and pop are atomic. A buffer belongs to whoever took
it until it is given back; one that never is (a cancelled task) is simply collected. ByteBudget belongs to one trio run.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

_SMALLEST: Final = 1 << 16


class BufferPool:
    """Keeps up to about `limit` bytes of free buffers, in sizes of powers of two."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free: defaultdict[int, deque[bytearray]] = defaultdict(deque)
        self._held = 0

    def take(self, size: int) -> tuple[bytearray, memoryview]:
        """Return a buffer to be given back, and a view of its first `size` bytes, whatever they hold."""
        capacity = max(_SMALLEST, 1 << (size - 1).bit_length()) if size else _SMALLEST
        try:
            buffer = self._free[capacity].pop()
            self._held -= capacity
        except IndexError:
            buffer = bytearray(capacity)
        return buffer, memoryview(buffer)[:size]

    def give(self, buffer: bytearray) -> None:
        """Take a buffer back; no view of it is used any more."""
        if self._held + len(buffer) <= self._limit:
            self._free[len(buffer)].append(buffer)
            self._held += len(buffer)


class ByteBudget:
    """Bytes that may be in buffers at once. A request larger than all of it waits until nothing else is out."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._changed = trio.Event()

    @asynccontextmanager
    async def reserve(self, size: int) -> AsyncIterator[None]:
        """Hold `size` bytes of the budget for the block, waiting until they are free. Cancel-safe."""
        while self._used and self._used + size > self._limit:
            await self._changed.wait()
        self._used += size
        try:
            yield
        finally:
            self._used -= size
            self._changed.set()
            self._changed = trio.Event()
