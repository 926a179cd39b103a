"""Running a command: one event loop, one place where an error becomes a line and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from rafsfs.errors import RafsError

_T = TypeVar("_T")


def run_async(function: Callable[..., Awaitable[_T]], *arguments: Any) -> _T:
    """Run an async use case to its end and return its result; an error comes out of its groups."""
    try:
        return trio.run(function, *arguments)
    except BaseExceptionGroup as group:
        raise single(group) from group


def single(group: BaseException) -> BaseException:
    """Return the error of a group that a user should see: ours first, then an interrupt, then any."""
    found = group
    while isinstance(found, BaseExceptionGroup):
        part = found.subgroup(RafsError) or found.subgroup(KeyboardInterrupt) or found
        found = part.exceptions[0]
    return found


def report(error: BaseException) -> int:
    """Say on stderr what went wrong, in one line; return the exit code."""
    if isinstance(error, RafsError):
        print(f"rafs: {_one_line(str(error))}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        print("rafs: interrupted", file=sys.stderr)
        return 130
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing more can be printed, not even at exit
        return 141
    if isinstance(error, OSError) and error.errno in {
        errno.ENOSPC,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
    }:
        print(f"rafs: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return 1
    if os.environ.get("RAFS_DEBUG"):
        traceback.print_exception(error)
        return 1
    descriptor, path = tempfile.mkstemp(prefix="rafs-fault-", suffix=".txt")
    with os.fdopen(descriptor, "w") as file:
        traceback.print_exception(error, file=file)
    print(f"rafs: a fault of our own ({type(error).__name__}); please report it with {path}", file=sys.stderr)
    return 1


def _one_line(text: str) -> str:
    return " ".join(text.split())
