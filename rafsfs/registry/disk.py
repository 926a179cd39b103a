"""Blocking file work of a layout, off the event loop and with its errors in our words.

Rule: a thread hop is never abandoned on cancellation (it may hold the caller's buffer); so each piece of work is short.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import trio

from ..errors import AccessDeniedError, RemoteError

T = TypeVar("T")

_VECTOR: Final = 512
"""Buffers per call: the kernel takes 1024 (IOV_MAX)."""
_SYNC_FILE_RANGE_WRITE: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)


async def in_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread; OSErrors become RemoteErrors that name the file. Cancellation waits for the thread."""
    try:
        return await trio.to_thread.run_sync(work)
    except OSError as error:
        raise remote_error(error) from error


def remote_error(error: OSError) -> RemoteError:
    """Return what an OSError of the layout's files means to its user."""
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "the layout"
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return AccessDeniedError(f"no access to {where}: {error.strerror}; check its owner and mode")
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return RemoteError(f"no space left to write {where}; free some and run the same again")
    return RemoteError(f"cannot use {where}: {error.strerror or error}")


def write_synced(
    directory: str,
    name: str,
    data: bytes | bytearray | memoryview,
    *,
    staging: str | None = None,
    replace: bool = True,
) -> None:
    """Make `directory/name` with `data`: whole and on disk, or not at all. Blocking.

    Written under a temporary name in `staging` (default: `directory`; same file system), synced, then renamed; with
    `replace` false an existing file stays as it is.
    """
    parent = staging or directory
    os.makedirs(parent, exist_ok=True)
    temporary = os.path.join(parent, f".tmp-{secrets.token_hex(8)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            write_all(fd, [memoryview(data).cast("B")], temporary)
            os.fsync(fd)
        finally:
            os.close(fd)
        place(temporary, directory, name, replace=replace)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def place(temporary: str, directory: str, name: str, *, replace: bool = True) -> None:
    """Give a finished, synced file its name, durably. Blocking."""
    final = os.path.join(directory, name)
    os.makedirs(directory, exist_ok=True)
    if replace:
        os.rename(temporary, final)
    else:
        with contextlib.suppress(FileExistsError):
            os.link(temporary, final)
        os.unlink(temporary)
    sync_directory(directory)


def write_all(fd: int, views: Sequence[memoryview], path: str, *, offset: int = 0) -> None:
    """Write all of `views`, one behind the other, at `offset` of the file. Blocking."""
    waiting = [view for view in views if len(view)]
    while waiting:
        try:
            done = os.pwritev(fd, waiting[:_VECTOR], offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
        offset += done
        while waiting and done >= len(waiting[0]):
            done -= len(waiting.pop(0))
        if done:
            waiting[0] = waiting[0][done:]


def start_writing(fd: int, start: int) -> None:
    """Have the kernel write the dirty pages from `start` on to the disk now, without waiting: then the sync at the end has little left.

    sync_file_range(2), which Python does not offer; a hint, so an error is of no consequence.
    """
    _libc.sync_file_range(fd, ctypes.c_int64(start), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


def sync_directory(path: str) -> None:
    """Make the names in a directory durable. Blocking."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
