"""What `rafs cache` asks of the daemon: list, remove, verify, evict, pin. Rule: nothing that a mount or a pull uses is ever removed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from ..errors import CacheError, UsageError
from ..files.record import list_files
from ..store.cache import Cache, CachedImage
from ..store.data_space import DataSpace
from ..store.listing import list_cache
from .eviction import Evictor
from .images import OpenImages
from .session import Progress
from .web_files import WebFiles


class CacheCalls:
    """The calls. `mounted` returns the digests of the images that are mounted; `lost` is told which chunks of a space were wrong."""

    def __init__(
        self,
        cache: Cache,
        images: OpenImages,
        evictor: Evictor,
        mounted: Callable[[], set[str]],
        files: WebFiles,
        lost: Callable[[bytes, list[int]], None],
    ) -> None:
        self._files = files
        self._lost = lost
        self._cache = cache
        self._images = images
        self._evictor = evictor
        self._mounted = mounted

    async def show(self) -> dict[str, Any]:
        """Return images, data spaces and files, with what is in use, what is pinned and what was used when."""
        used = self._cache.used_spaces()
        quota = self._evictor.quota

        def look() -> dict[str, Any]:
            return list_cache(self._cache, self._mounted(), used, quota.limit if quota else None) | {
                "files": list_files(self._cache.path)
            }

        return await trio.to_thread.run_sync(look)

    async def remove(self, wanted: str | None) -> dict[str, Any]:
        """Remove an image by digest or reference, or everything that is not in use, and the spaces nobody else needs."""
        in_use = self._mounted() | self._images.digests()
        if wanted:
            free = self._files.forget(wanted)
            doomed = [] if free else await self._find(wanted)
            if free:
                removed, freed = await self._remove_orphans()
                return {"images": [], "spaces": removed, "freed_bytes": freed}
            held = next((image for image in doomed if str(image.digest) in in_use), None)
            if held:
                raise CacheError(f"image {held.digest} is mounted; unmount it before it is removed")
            pinned = next((image for image in doomed if image.pinned), None)
            if pinned:
                raise CacheError(f"image {pinned.digest} is pinned; `rafs cache unpin` it before it is removed")
        else:
            self._files.forget(None)
            images = await trio.to_thread.run_sync(self._cache.images)
            doomed = [image for image in images if str(image.digest) not in in_use and not image.pinned]
        gone = [image for image in doomed if self._images.forget(image.digest)]
        if wanted and not gone:
            raise CacheError(f"image {wanted} is about to be used; try again")
        removed, freed = await self._remove_orphans()
        return {"images": [str(image.digest) for image in gone], "spaces": removed, "freed_bytes": freed}

    async def _remove_orphans(self) -> tuple[int, int]:
        """Remove the data spaces that neither an image nor a file names; return how many and their bytes."""
        removed = freed = 0
        kept = {space_id for record in self._files.records.all() for space_id in record.spaces.values()}
        for space in await trio.to_thread.run_sync(self._cache.spaces):
            if not space.images and space.space_id not in kept and await self._evictor.remove(space.space_id):
                freed += space.present_bytes
                removed += 1
        await trio.to_thread.run_sync(self._cache.tidy)
        return removed, freed

    async def _find(self, wanted: str) -> list[CachedImage]:
        images = await trio.to_thread.run_sync(self._cache.images)
        found = [image for image in images if wanted in {str(image.digest), image.digest.hex, *image.references()}]
        if not found:
            raise UsageError(f"no image {wanted} in cache {self._cache.path}; see `rafs cache ls`")
        return found

    async def collect(self, target_bytes: int | None, *, dry_run: bool) -> dict[str, Any]:
        """Remove what no image names, and evict down to `target_bytes`, or to what the quota lets be held."""
        removed, freed = (0, 0) if dry_run else await self._remove_orphans()
        if target_bytes is None and self._evictor.quota is not None:
            target_bytes = self._evictor.quota.low
        gone = [] if target_bytes is None else await self._evictor.evict(target_bytes, dry_run=dry_run)
        return {
            "evicted": [
                {"id": space.space_id.hex(), "bytes": space.held_bytes, "last_used": int(space.last_used)}
                for space in gone
            ],
            "orphans": removed,
            "freed_bytes": freed + sum(space.held_bytes for space in gone),
            "target_bytes": target_bytes,
            "held_bytes": sum(s.held_bytes for s in await trio.to_thread.run_sync(self._cache.held)),
            "dry_run": dry_run,
        }

    async def pin(self, wanted: str, *, pinned: bool) -> dict[str, Any]:
        """Keep the data of an image from eviction, or let them go again."""
        found = await self._find(wanted)
        for image in found:
            await trio.to_thread.run_sync(lambda image=image: self._cache.set_pinned(image, pinned=pinned))  # type: ignore[misc]
        return {"images": [str(image.digest) for image in found], "pinned": pinned}

    async def verify(self, progress: Progress) -> dict[str, Any]:
        """Hash every present chunk; what does not match is unmarked and will be fetched again."""
        checked = 0
        bad: list[dict[str, Any]] = []
        for summary in await trio.to_thread.run_sync(self._cache.spaces):
            self._cache.acquire([summary.space_id])
            try:
                space = self._cache.opened_space(summary.space_id)
                if space is None:
                    continue
                wrong: list[int] = []
                present = [index for index in range(space.table.count) if space.is_present(index)]
                for start in range(0, len(present), 16):
                    batch = present[start : start + 16]
                    good = await trio.to_thread.run_sync(_verify_chunks, space, batch)
                    wrong += [index for index, ok in zip(batch, good, strict=True) if not ok]
                    checked += len(batch)
                    progress({"checked": checked})
                if wrong:
                    self._lost(space.space_id, wrong)
                bad += [{"space": space.space_id.hex(), "chunk": index} for index in wrong]
            finally:
                self._cache.release([summary.space_id], is_use=False)
        return {"checked": checked, "bad": bad}


def _verify_chunks(space: DataSpace, indexes: list[int]) -> list[bool]:
    return [space.verify(index) for index in indexes]
