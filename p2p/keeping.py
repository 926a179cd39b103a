"""Chunks that have come from other nodes are verified and written, several in one hop to a thread.

Decided here: what waits while a thread is at work goes together in the next hop. A hop costs as much as hashing and writing 250 KiB, so a
node that is short of CPU makes fewer of them, and one that is not loses nothing. Rule: a chunk is announced after its bytes are verified
and written, and its buffer is used again only then.

Concurrency: `run` is one of a few tasks that live as long as the peer; `put` has no checkpoint. An order is waited for by whoever fetches
it; cancelled, it leaves what is queued to be stored all the same.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from rafsfs.errors import DaemonError, FormatError, IntegrityError, RafsError
from rafsfs.fetch.buffers import BufferPool

_log = logging.getLogger(__name__)

Store = Callable[[int, memoryview], None]
"""Verifies and writes a chunk, in a thread. Raises FormatError or IntegrityError for a wrong one, CacheError."""

KEEPERS: Final = 2
"""Threads at once: one hashes while the other writes."""
_TOGETHER: Final = 8
"""Chunks in one hop: what came first is not announced much later for it."""


@dataclass(slots=True, eq=False)
class Order:
    """The chunks of one request."""

    store: Store
    landed: Callable[[int], None]
    """Called with each chunk that is stored."""
    error: RafsError | None = None
    """The first failure."""
    left: int = 0
    done: trio.Event = field(default_factory=trio.Event)

    async def wait(self) -> None:
        """Return when all that was put has been stored or has failed."""
        while self.left:
            self.done = trio.Event()
            await self.done.wait()


@dataclass(slots=True, eq=False)
class _Item:
    order: Order
    chunk: int
    buffer: bytearray
    view: memoryview
    error: RafsError | None = None


class Keeper:
    """The chunks that are to be stored."""

    def __init__(self, buffers: BufferPool) -> None:
        self.buffers = buffers
        self._items: deque[_Item] = deque()
        self._wake = trio.Event()

    def put(self, order: Order, chunk: int, buffer: bytearray, view: memoryview) -> None:
        """Have a chunk stored; `buffer`, of `buffers`, is given back. No checkpoint."""
        order.left += 1
        self._items.append(_Item(order, chunk, buffer, view))
        self._wake.set()

    async def run(self) -> None:
        """Store what is put, for ever."""
        while True:
            if not self._items:
                if self._wake.is_set():
                    self._wake = trio.Event()
                await self._wake.wait()
                continue
            batch = [self._items.popleft() for _ in range(min(len(self._items), _TOGETHER))]
            await trio.to_thread.run_sync(_store, batch)
            for item in batch:
                self._settle(item)

    def _settle(self, item: _Item) -> None:
        order = item.order
        if item.error is not None:
            order.error = order.error or item.error
        else:
            self.buffers.give(item.buffer)
            try:
                order.landed(item.chunk)
            except Exception:  # noqa: BLE001 - our own fault fails this request, not everybody's
                _log.exception("a chunk could not be handed on: chunk=%d", item.chunk)
                order.error = order.error or DaemonError(f"chunk {item.chunk} could not be handed on; see the log")
        order.left -= 1
        if not order.left:
            order.done.set()


def _store(batch: list[_Item]) -> None:
    """Verify and write; a failure stays with its chunk. In a thread."""
    for item in batch:
        try:
            item.order.store(item.chunk, item.view)
        except (FormatError, IntegrityError) as error:
            item.error = IntegrityError(str(error))
        except RafsError as error:
            item.error = error
        except Exception as error:  # noqa: BLE001 - as above
            _log.exception("a chunk could not be stored: chunk=%d", item.chunk)
            item.error = DaemonError(f"chunk {item.chunk} could not be stored: {error!r}")
