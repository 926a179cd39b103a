"""Reading what a daemon has put into its cache and holds there: descriptors of data spaces, their presence maps looked at once.

Rule: a chunk that is not marked present is never copied. Blocking calls.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import trio

from rafsfs.errors import CacheError
from rafsfs.format.bootstrap import Bootstrap
from rafsfs.format.chunk_map import ChunkMap
from rafsfs.format.space_table import SpaceTable
from rafsfs.store.copying import copy_range

from .exporting import Arrived


def open_data(directory: str, chunks: Iterable[int]) -> int:
    """Return a descriptor of a data space's data, in which `chunks` are present. Raises CacheError."""
    try:
        fd = os.open(os.path.join(directory, "data"), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        marks = Path(directory, "present").read_bytes()
    except OSError as error:
        raise CacheError(f"{directory}: {error.strerror}; it was removed meanwhile, run again") from error
    if not all(chunk < len(marks) and marks[chunk] for chunk in chunks):
        os.close(fd)
        raise CacheError(f"{directory}: not all of it is present any more; run again")
    return fd


class CacheContent:
    """Contents of an image's files from the cache. `close` gives the descriptors back."""

    def __init__(self, cache_dir: str, bootstrap: Bootstrap, chunk_map: ChunkMap, chunks: dict[int, list[int]]) -> None:
        self._bootstrap = bootstrap
        self._fds: dict[int, int] = {}
        try:
            for space, numbers in chunks.items():
                table: SpaceTable = chunk_map.table(space)
                directory = os.path.join(cache_dir, "spaces", table.space_id.hex())
                self._fds[space] = open_data(directory, numbers)
        except BaseException:
            self.close()
            raise

    async def write(self, nid: int, fd: int, arrived: Arrived) -> None:
        """Write the content of a file."""
        inline = self._bootstrap.inline_data(nid)
        if inline is not None:
            await trio.to_thread.run_sync(os.write, fd, inline)
            return
        for extent in self._bootstrap.extents(nid):
            if extent.space is not None:
                source = self._fds[extent.space]
                await trio.to_thread.run_sync(copy_range, source, extent.offset, fd, extent.file_offset, extent.length)
                arrived(extent.length)

    def close(self) -> None:
        """Close all descriptors."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
