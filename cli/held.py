"""A call that gets bytes into the cache and holds them there while they are copied out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from rafsfs.daemon.launch import connect
from rafsfs.errors import DaemonError

from .run import single


@asynccontextmanager
async def held(
    cache_dir: str, method: str, params: dict[str, Any], progress: Callable[[int, int], None]
) -> AsyncIterator[dict[str, Any]]:
    """Yield what `get_file` or `get_image` says when all is there; it stays there until the end of the block."""
    try:
        async with _held(cache_dir, method, params, progress) as found:
            yield found
    except BaseExceptionGroup as group:
        raise single(group) from group


@asynccontextmanager
async def _held(
    cache_dir: str, method: str, params: dict[str, Any], progress: Callable[[int, int], None]
) -> AsyncIterator[dict[str, Any]]:
    async with connect(cache_dir) as connection, trio.open_nursery() as nursery:
        ready = trio.Event()
        found: dict[str, Any] = {}

        def take(event: dict[str, Any]) -> None:
            if "done" in event:
                progress(event["done"], event["total"])
            if "ready" in event:
                found.update(event["ready"])
                ready.set()

        async def call() -> None:
            await connection.call(method, params, take)
            if not ready.is_set():
                raise DaemonError(f"the daemon ended {method} without a result")

        nursery.start_soon(call)
        await ready.wait()
        yield found
        await connection.call("release", {"hold": found["hold"]})
        nursery.cancel_scope.cancel()
