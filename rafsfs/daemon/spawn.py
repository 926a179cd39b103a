"""Starting the process of a daemon, detached. Standard library only: workers that must be there at once load this.

Decided here: the command, where its log goes and when a long log is put aside.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from ..errors import CacheError

_LOG_LIMIT: Final = 16 << 20
"""Bytes of a log that is put aside at the next start, over the one before; so a cache directory holds two at most."""


def daemon_argv(cache_dir: str) -> list[str]:
    """Return the command that runs the daemon of a cache directory."""
    return [sys.executable, "-m", "rafsfs", "daemon", "--cache-dir", os.path.abspath(cache_dir)]


def spawn_daemon(cache_dir: str, argv: Sequence[str] | None = None) -> subprocess.Popen[bytes]:
    """Start a daemon in a session of its own, its log appended to CACHE/daemon.log; a long log is put aside first."""
    try:
        os.makedirs(cache_dir, mode=0o700, exist_ok=True)
        _put_long_log_aside(os.path.join(cache_dir, "daemon.log"))
        return spawn_detached(argv or daemon_argv(cache_dir), os.path.join(cache_dir, "daemon.log"))
    except OSError as error:
        raise CacheError(f"cache directory {cache_dir}: {error.strerror}") from error


def spawn_detached(command: Sequence[str], log_path: str, *, pass_fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, its output appended to a log. `pass_fds` keep their numbers. Raises OSError."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            close_fds=True,
            pass_fds=tuple(pass_fds),
            cwd="/",
        )
    finally:
        os.close(log)


def _put_long_log_aside(path: str) -> None:
    with suppress(FileNotFoundError):
        if os.path.getsize(path) > _LOG_LIMIT:
            os.replace(path, f"{path}.1")
