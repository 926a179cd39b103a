"""The lock of a cache directory: who holds it is its daemon. Standard library only, since it is taken before the rest is loaded.

Rule: a process takes it once. What was taken early is handed to `Cache.open` by `lock_directory`, never let go of in between.
"""

from __future__ import annotations

import fcntl
import os
from typing import Final

from ..errors import CacheBusyError

_taken_early: Final[dict[str, int]] = {}


def lock_directory(path: str) -> int:
    """Return the lock of a cache directory, an open descriptor; the one that `lock_early` took, if it did.

    Raises CacheBusyError if another daemon holds it, OSError.
    """
    early = _taken_early.pop(os.path.abspath(path), -1)
    if early >= 0:
        return early
    descriptor = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise CacheBusyError(
            f"cache directory {path} is held by another daemon (pid {holder}); use it, or another --cache-dir"
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def lock_early(path: str) -> None:
    """Take the lock for the `Cache.open` that comes later in this process. Raises CacheBusyError, OSError."""
    _taken_early[os.path.abspath(path)] = lock_directory(path)
