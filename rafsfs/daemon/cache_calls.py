"""What `rafs cache` asks of the daemon: list, remove, verify. Rule: nothing that a mount or a pull uses is ever removed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from ..errors import CacheError, UsageError
from ..store.cache import Cache
from ..store.data_space import DataSpace
from .images import OpenImages
from .session import Progress


class CacheCalls:
    """The calls. `mounted` returns the digests of the images that are mounted."""

    def __init__(self, cache: Cache, images: OpenImages, mounted: Callable[[], set[str]]) -> None:
        self._cache = cache
        self._images = images
        self._mounted = mounted

    async def list(self) -> dict[str, Any]:
        """Return images and data spaces, with what is in use."""
        used = self._images.used_spaces()
        images = []
        for image in await trio.to_thread.run_sync(self._cache.images):
            mounted = str(image.digest) in self._mounted()
            images.append({"digest": str(image.digest), "references": image.references(), "mounted": mounted})
        spaces = [
            {
                "id": space.space_id.hex(),
                "size": space.size,
                "chunks": space.chunks,
                "present_chunks": space.present_chunks,
                "present_bytes": space.present_bytes,
                "images": space.images,
                "in_use": space.space_id in used,
            }
            for space in await trio.to_thread.run_sync(self._cache.spaces)
        ]
        return {"cache_dir": self._cache.path, "images": images, "spaces": spaces}

    async def remove(self, wanted: str | None) -> dict[str, Any]:
        """Remove an image by digest or reference, or everything that is not in use, and the spaces nobody else needs."""
        in_use = self._mounted() | self._images.digests()
        images = await trio.to_thread.run_sync(self._cache.images)
        if wanted:
            doomed = [image for image in images if wanted in {str(image.digest), image.digest.hex, *image.references()}]
            if not doomed:
                raise UsageError(f"no image {wanted} in cache {self._cache.path}; see `rafs cache ls`")
            held = next((image for image in doomed if str(image.digest) in in_use), None)
            if held:
                raise CacheError(f"image {held.digest} is mounted; unmount it before it is removed")
        else:
            doomed = [image for image in images if str(image.digest) not in in_use]
        for image in doomed:
            self._cache.remove_image(image.digest)
        freed = 0
        removed = 0
        used = self._images.used_spaces()
        for space in await trio.to_thread.run_sync(self._cache.spaces):
            if not space.images and space.space_id not in used:
                freed += await trio.to_thread.run_sync(self._cache.remove_space, space.space_id)
                removed += 1
        return {"images": [str(image.digest) for image in doomed], "spaces": removed, "freed_bytes": freed}

    async def verify(self, progress: Progress) -> dict[str, Any]:
        """Hash every present chunk; what does not match is unmarked and will be fetched again."""
        checked = 0
        bad: list[dict[str, Any]] = []
        for summary in await trio.to_thread.run_sync(self._cache.spaces):
            space = self._cache.opened_space(summary.space_id)
            if space is None:
                continue
            present = [index for index in range(space.table.count) if space.is_present(index)]
            for start in range(0, len(present), 16):
                batch = present[start : start + 16]
                good = await trio.to_thread.run_sync(_verify_chunks, space, batch)
                bad += [
                    {"space": space.space_id.hex(), "chunk": i} for i, ok in zip(batch, good, strict=True) if not ok
                ]
                checked += len(batch)
                progress({"checked": checked})
        return {"checked": checked, "bad": bad}


def _verify_chunks(space: DataSpace, indexes: list[int]) -> list[bool]:
    return [space.verify(index) for index in indexes]
