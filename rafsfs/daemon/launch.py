"""Starting the daemon of a cache directory, detached, by whoever needs it first.

Decided here: that racing starters end with one daemon (the directory's lock decides; the losers' processes exit with
CacheBusyError's code), and that a start that fails says why, from the daemon's log.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from ..errors import CacheBusyError, DaemonError
from .connection import Connection, open_connection, open_socket
from .spawn import daemon_argv, spawn_daemon

__all__ = ["connect", "daemon_argv", "spawn_daemon", "start_daemon"]

_START_LIMIT_S: Final = 30.0
"""A daemon that re-hashes chunks after a crash answers before it does so; this covers a slow interpreter start."""


async def start_daemon(cache_dir: str, argv: Sequence[str] | None = None) -> None:
    """Return when a daemon answers for `cache_dir`, started if none does. Raises DaemonError with the reason."""
    if await _answers(cache_dir):
        return
    process = spawn_daemon(cache_dir, argv)
    with trio.move_on_after(_START_LIMIT_S):
        while True:
            if await _answers(cache_dir):
                return
            code = process.poll()
            if code is not None and code != CacheBusyError.exit_code:
                raise DaemonError(f"the daemon of {cache_dir} did not start: {_last_line(cache_dir)}")
            if code is not None and not await _lock_is_held(cache_dir):
                process = spawn_daemon(cache_dir, argv)
            await trio.sleep(0.02)
    raise DaemonError(
        f"the daemon of {cache_dir} does not answer after {_START_LIMIT_S:g} s; see {cache_dir}/daemon.log"
    )


async def _answers(cache_dir: str) -> bool:
    try:
        stream = await open_socket(cache_dir)
    except DaemonError:
        return False
    await stream.aclose()
    return True


async def _lock_is_held(cache_dir: str) -> bool:
    """Tell whether a daemon holds the directory: then it is starting, and will answer or go."""
    import fcntl  # noqa: PLC0415 - only on this rare path

    try:
        descriptor = os.open(os.path.join(cache_dir, "lock"), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _last_line(cache_dir: str) -> str:
    try:
        with open(os.path.join(cache_dir, "daemon.log"), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return "it left no log"
    return lines[-1] if lines else "it left no log"


@asynccontextmanager
async def connect(
    cache_dir: str, *, start: bool = True, argv: Sequence[str] | None = None
) -> AsyncIterator[Connection]:
    """Connect to the daemon of a cache directory, started first if `start` and none runs."""
    if start:
        await start_daemon(cache_dir, argv)
    async with open_connection(cache_dir) as connection:
        yield connection
