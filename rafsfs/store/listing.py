"""What a cache holds, in the words of `rafs cache ls --json`. Looks on: nothing is opened for writing or changed."""

from __future__ import annotations

from typing import Any

from .cache import Cache


def list_cache(cache: Cache, mounted: set[str], used: set[bytes], quota_bytes: int | None) -> dict[str, Any]:
    """Return what `rafs cache ls --json` prints. Blocking; for the daemon, and for who looks while none runs."""
    images = [
        {
            "digest": str(image.digest),
            "references": image.references(),
            "mounted": str(image.digest) in mounted,
            "pinned": image.pinned,
        }
        for image in cache.images()
    ]
    pinned = {image["digest"] for image in images if image["pinned"]}
    spaces = [
        {
            "id": space.space_id.hex(),
            "size": space.size,
            "chunks": space.chunks,
            "present_chunks": space.present_chunks,
            "present_bytes": space.present_bytes,
            "images": space.images,
            "in_use": space.space_id in used or not mounted.isdisjoint(space.images),
            "pinned": not pinned.isdisjoint(space.images),
            "last_used": int(space.last_used),
        }
        for space in cache.spaces()
    ]
    return {"cache_dir": cache.path, "quota_bytes": quota_bytes, "images": images, "spaces": spaces}
