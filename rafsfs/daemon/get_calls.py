"""What `rafs get` asks of the daemon: bytes in the cache, held there until they are copied out.

Decided here: a call ends when its caller says that it has copied, or goes; until then nothing of it is removed. Concurrency: each call is a
task of its connection; `_holds` changes between checkpoints.
"""

from __future__ import annotations

import math
import os
import stat
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from ..errors import UsageError
from ..fetch.fetcher import Fetcher
from ..fetch.queue import Priority
from ..files.select import chunks_of, select
from ..interfaces import Room
from ..registry.options import RegistryOptions
from .images import OpenedImage, OpenImages
from .session import PROGRESS_S, Progress, first_error
from .web_files import WebFiles

_BATCH: Final = 64
"""Chunks of one wish: enough that neighbours merge into one read."""


class GetCalls:
    """The calls. `open_image` opens an image and takes part in its distribution."""

    def __init__(
        self,
        files: WebFiles,
        images: OpenImages,
        fetcher: Fetcher,
        room: Room,
        open_image: Callable[[str, RegistryOptions], Awaitable[OpenedImage]],
    ) -> None:
        self._files = files
        self._images = images
        self._fetcher = fetcher
        self._room = room
        self._open_image = open_image
        self._holds: dict[str, trio.Event] = {}

    async def file(self, params: dict[str, Any], options: RegistryOptions, progress: Progress) -> dict[str, Any]:
        """Get a file of a web server, tell where it is, and hold it."""
        started = time.monotonic()
        file = await self._files.open(params)
        try:
            result = await self._files.fetch(params, options, progress)
            await self._hold(result | {"seconds": round(time.monotonic() - started, 3)}, progress)
            return {}
        finally:
            self._files.close(file)

    async def image(self, params: dict[str, Any], options: RegistryOptions, progress: Progress) -> dict[str, Any]:
        """Get files of an image, tell where it is, and hold it."""
        started = time.monotonic()
        opened = await self._open_image(str(params["ref"]), options)
        sources: Counter[str] = Counter()
        try:
            wanted = await self._fetch(opened, [str(text) for text in params.get("paths", [])], sources, progress)
            result = {
                "digest": str(opened.image.digest),
                "directory": opened.image.directory,
                "data_bytes": wanted,
                "sources": dict(sources),
                "seconds": round(time.monotonic() - started, 3),
            }
            await self._hold(result, progress)
            return {}
        finally:
            self._images.release(opened)

    async def release(self, params: dict[str, Any]) -> dict[str, Any]:
        """Let go of what a call holds."""
        event = self._holds.get(str(params["hold"]))
        if event is None:
            raise UsageError("nothing is held under this name")
        event.set()
        return {}

    async def _hold(self, result: dict[str, Any], progress: Progress) -> None:
        hold = os.urandom(16).hex()
        event = self._holds[hold] = trio.Event()
        try:
            progress({"ready": result | {"hold": hold}})
            await event.wait()
        finally:
            del self._holds[hold]

    async def _fetch(self, opened: OpenedImage, patterns: list[str], sources: Counter[str], progress: Progress) -> int:
        """Get the chunks of files into the cache; return how many bytes they have."""
        wanted = await trio.to_thread.run_sync(_chunks_wanted, opened, patterns) if patterns else None
        total = opened.data_bytes if wanted is None else sum(size for _, sizes in wanted for size in sizes.values())
        before = sum(sources.values())

        async def tell() -> None:
            while True:
                done = (
                    sum(sources.values()) - before if wanted is not None else self._images.present_bytes(opened.source)
                )
                progress({"done": min(done, total), "total": total})
                await trio.sleep(PROGRESS_S)

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tell)
                if wanted is None:
                    await self._fetcher.prefetch_all(opened.source, on_behalf=sources)
                if wanted is not None:
                    await self._room.make_room(total)
                for space_id, sizes in wanted or ():
                    chunks = list(sizes)
                    for start in range(0, len(chunks), _BATCH):
                        await self._fetcher.ensure(
                            space_id,
                            chunks[start : start + _BATCH],
                            priority=Priority.PREFETCH,
                            deadline_s=math.inf,
                            on_behalf=sources,
                        )
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise first_error(group) from group
        return total


def _chunks_wanted(opened: OpenedImage, patterns: list[str]) -> list[tuple[bytes, dict[int, int]]]:
    """Return (data space, {chunk: length}) of the files that patterns mean. Reads the bootstrap: blocking."""
    bootstrap, chunk_map = opened.image.bootstrap(), opened.source.chunk_map
    files = {inode.nid for inode in select(bootstrap, patterns).values() if stat.S_ISREG(inode.mode)}
    found = []
    for space, chunks in chunks_of(bootstrap, chunk_map, files).items():
        table = chunk_map.table(space)
        found.append((table.space_id, {chunk: table.extent(chunk)[1] for chunk in chunks}))
    return found
