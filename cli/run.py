"""Running a command: one event loop, one place where an error becomes a line and an exit code.

The event loop and what is only needed when something goes wrong are loaded when they are used: `rafs --help` is quick.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from rafsfs.errors import RafsError

_T = TypeVar("_T")


def run_async(function: Callable[..., Awaitable[_T]], *arguments: Any) -> _T:
    """Run an async use case to its end and return its result; an error comes out of its groups."""
    import trio  # noqa: PLC0415

    gc.freeze()
    gc.enable()
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
    if os.environ.get("RAFS_DEBUG") and not isinstance(error, BrokenPipeError):
        import traceback  # noqa: PLC0415

        traceback.print_exception(error)
    if isinstance(error, RafsError):
        say(str(error))
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        say("interrupted")
        return 130
    if isinstance(error, BrokenPipeError):
        # Nothing more can be printed, not even what is still buffered when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(error, OSError) and error.errno is not None:
        say(f"{_path(error.filename)}: {error.strerror}")
        return 1
    say(_record(error))
    return 1


def say(line: str) -> None:
    """Print one line on stderr, whatever was in it."""
    text = " ".join(line.split()).encode(errors="backslashreplace").decode()
    print(f"rafs: {text}", file=sys.stderr)


def _path(name: object) -> str:
    """Return what an OSError says it is about."""
    if name is None:
        return "input or output"
    return os.fsdecode(name) if isinstance(name, str | bytes) else str(name)


def _record(error: BaseException) -> str:
    """Write the traceback of a fault of ours to a file; return the line that says so."""
    import tempfile  # noqa: PLC0415
    import traceback  # noqa: PLC0415

    text = f"{type(error).__name__}: {str(error)[:200]}"
    try:
        descriptor, path = tempfile.mkstemp(prefix="rafs-fault-", suffix=".txt")
        with os.fdopen(descriptor, "w", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return f"a fault of our own, {text}; run again with RAFS_DEBUG=1 to see where"
    return f"a fault of our own, {text}; please report it with {path}"
