"""Keeping the cache within its quota, and making space when the disk is full. What goes in which order: store/eviction.py.

Decided here. The quota is soft for readers: what a mount reads is stored even when all else is in use, and one line in the log says so.
It is hard for who can wait: prefetch pauses, a pull and a filling fail, when nothing may go. When the disk itself is full, something goes
whether there is a quota or not, before a reader gets ENOSPC. A data space leaves the swarm in the same step in which it is taken out
of reach, so that nobody is sent here for it; an image whose last data space has gone is forgotten.

Concurrency: trio tasks. `run` is one task, woken by `stored`, `relieve` and `poke`; `evict` is called by it, by prefetches and by
commands, one at a time by `_lock`. `_held` is an estimate between two passes: the last sum and what was stored since. A cancelled `evict`
leaves a data space there or gone, never in between, as docs/cache.md says.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Final

import trio

from ..errors import CacheError, CacheFullError
from ..store.cache import Cache
from ..store.eviction import Held, Quota, plan_eviction
from ..types import Digest
from ..units import format_size

_log = logging.getLogger(__name__)

RELIEF_BYTES: Final = 256 << 20
"""Freed at least when the disk is full: less would be gone again within the second, more may be missed."""
_STEP_BYTES: Final = 64 << 20
"""Stored after a pass that could not reach its target before the next one, or a hundredth of the quota if that is less: looking again for
each chunk would find the same."""
_RELIEF_LASTS_S: Final = 2.0
"""Who met a full disk just before something went is told to try again, too."""
NOTE_USE_S: Final = 60.0
"""How often it is written down when data spaces were last used. After a crash the order of eviction is wrong by that much at most."""


class Evictor:
    """Implements `rafsfs.interfaces.Room`. `leave` takes a data space out of the swarm, `forget` drops an image nobody uses."""

    def __init__(self, cache: Cache, quota: Quota | None) -> None:
        self._cache = cache
        self.quota = quota
        self.leave: Callable[[bytes], None] = lambda space_id: None
        self.forget: Callable[[Digest], bool] = lambda digest: False
        self.counters: Counter[str] = Counter()
        self._held = 0
        self._look_at = 0
        """Bytes held from which on a pass is worth while."""
        self._relief: list[Callable[[bool], None]] = []
        self._lock = trio.Lock()
        self._wake = trio.Event()
        self._relieved_at = -_RELIEF_LASTS_S
        self._is_over = False
        """Whether the log says that the quota is exceeded."""

    @property
    def held_bytes(self) -> int:
        """Bytes of data held, about."""
        return self._held

    async def start(self) -> None:
        """Look at what is there. Before anything is stored."""
        self._count(await trio.to_thread.run_sync(self._cache.held))

    def stored(self, size: int) -> None:
        """Say that so many bytes more are held. No checkpoint."""
        self._held += size
        if self.quota is not None and self._held > max(self.quota.high, self._look_at):
            self._wake.set()

    def poke(self) -> None:
        """Say that something is not in use any more. No checkpoint."""
        self._look_at = 0
        self.stored(0)

    def relieve(self, done: Callable[[bool], None]) -> None:
        """The disk is full: evict what may go, then call done(whether anything went). No checkpoint."""
        self._relief.append(done)
        self._wake.set()

    async def make_room(self, size: int) -> None:
        """Return when so many bytes more fit. Raises CacheFullError if what is in use or pinned fills the quota."""
        quota = self.quota
        if quota is None or self._held + size <= quota.high:
            return
        await self.evict(max(0, quota.low - size))
        if self._held + size > quota.limit:
            raise CacheFullError(
                f"{self._cache.path}: the quota of {format_size(quota.limit)} is full: {format_size(self._held)} are held, all in use or "
                f"pinned, {format_size(size)} more are wanted; unmount or unpin something, or raise --quota"
            )

    async def evict(self, target_bytes: int, *, dry_run: bool = False) -> list[Held]:
        """Evict until `target_bytes` are held or nothing may go; return what went, or would."""
        async with self._lock:
            held = await trio.to_thread.run_sync(self._cache.held)
            self._count(held)
            doomed = plan_eviction(held, target_bytes)
            if dry_run:
                return doomed
            gone = [space for space in doomed if await self._evict(space)]
            if gone:
                for digest in await trio.to_thread.run_sync(self._cache.emptied_images, {s.space_id for s in gone}):
                    self.forget(digest)
                await trio.to_thread.run_sync(self._cache.tidy)
            return gone

    async def _evict(self, space: Held) -> bool:
        if not await self.remove(space.space_id):
            return False
        self.counters["evicted_bytes"] += space.held_bytes
        self.counters["evicted_spaces"] += 1
        _log.info(
            "evicted: space=%s bytes=%d last_used=%d", space.space_id.hex()[:16], space.held_bytes, space.last_used
        )
        return True

    async def remove(self, space_id: bytes) -> bool:
        """Remove one data space unless somebody uses it."""
        if not self._cache.doom(space_id):
            return False
        self.leave(space_id)  # before any checkpoint: nobody can have come back to it
        with trio.CancelScope(shield=True):
            try:
                freed = await trio.to_thread.run_sync(self._cache.remove_doomed, space_id)
            except CacheError as error:
                _log.warning("data space cannot be removed: space=%s cause=%s", space_id.hex()[:16], error)
                return False
        self._held = max(0, self._held - freed)
        return True

    async def run(self) -> None:
        """Keep to the quota and answer calls for relief, for ever."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            await self._relieve_all()
            quota = self.quota
            if quota is None or self._held <= quota.high:
                self._is_over = False
                continue
            await self.evict(quota.low)
            self._look_at = self._held + min(_STEP_BYTES, quota.limit // 100)
            if self._held > quota.limit and not self._is_over:
                self._is_over = True
                _log.warning(
                    "quota exceeded, all that is held is in use or pinned: quota=%d held=%d; reads go on, prefetch pauses",
                    quota.limit,
                    self._held,
                )

    async def _relieve_all(self) -> None:
        waiting, self._relief = self._relief, []
        if not waiting:
            return
        held = sum(space.held_bytes for space in await trio.to_thread.run_sync(self._cache.held))
        gone = await self.evict(max(0, held - RELIEF_BYTES))
        self.counters["reliefs"] += 1
        _log.warning(
            "disk full: evicted=%d bytes=%d waiting=%d", len(gone), sum(s.held_bytes for s in gone), len(waiting)
        )
        now = trio.current_time()
        if gone:
            self._relieved_at = now
        for done in waiting:
            done(now - self._relieved_at < _RELIEF_LASTS_S)

    async def note_use_for_ever(self) -> None:
        """Write down now and then when data spaces were last used."""
        while True:
            await trio.sleep(NOTE_USE_S)
            await trio.to_thread.run_sync(self._cache.note_use)

    def _count(self, held: list[Held]) -> None:
        self._held = sum(space.held_bytes for space in held)
