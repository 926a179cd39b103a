"""Fetching a section whose digests nobody knows: bytes from the server into a staging file, hashed as they come.

Concurrency: one task per section; hashing and writing are in a thread, one chunk at a time. A connection that breaks off is gone on with
where it stopped, at a chunk's start. Cancelled or failed, the staging file is deleted. Memory: one chunk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Final

import trio

from ..errors import UnavailableError
from ..fetch.buffers import BufferPool
from ..format.codec import chunk_digest
from ..store.data_space import write_error
from .origin_file import Origin
from .plan import FilePlan

_BREAKS: Final = 4
"""Connections that break off without a chunk, one after the other, until the section is given up."""


async def fetch_section(
    origin: Origin,
    plan: FilePlan,
    section: int,
    path: str,
    buffers: BufferPool,
    arrived: Callable[[int], None],
) -> bytes:
    """Write a section to the new file `path`, synced by nobody; return the digests of its chunks. `arrived` gets bytes.

    Raises ChangedError and what else OriginFile.open_range raises, CacheError, CacheFullError.
    """
    start, length = plan.extent(section)
    digests: list[bytes] = []
    breaks = 0
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise write_error(error, path) from error
    done = False
    try:
        while len(digests) * plan.chunk_bytes < length:
            before = len(digests)
            try:
                await _read_on(origin, plan, (start, length), fd, digests, buffers, arrived)
            except UnavailableError:
                breaks = breaks + 1 if len(digests) == before else 0
                if breaks >= _BREAKS:
                    raise
        done = True
        return b"".join(digests)
    finally:
        os.close(fd)
        if not done:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


async def _read_on(
    origin: Origin,
    plan: FilePlan,
    extent: tuple[int, int],
    fd: int,
    digests: list[bytes],
    buffers: BufferPool,
    arrived: Callable[[int], None],
) -> None:
    start, length = extent
    position = len(digests) * plan.chunk_bytes
    async with origin.open_range(None, start + position, length - position) as stream:
        while position < length:
            size = min(plan.chunk_bytes, length - position)
            buffer, view = buffers.take(size)
            await stream.readinto(view)
            digests.append(await trio.to_thread.run_sync(_keep, fd, view, position))
            buffers.give(buffer)
            arrived(size)
            position += size


def _keep(fd: int, view: memoryview, position: int) -> bytes:
    digest = chunk_digest(view)
    try:
        while view:
            written = os.pwrite(fd, view, position)
            view, position = view[written:], position + written
    except OSError as error:
        raise write_error(error, "section being fetched") from error
    return digest
