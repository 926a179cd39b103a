"""Control groups that hold processes to an amount of memory, in version 1 or 2 of the kernel's interface; and where there is none, why."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

_TOP = Path("/sys/fs/cgroup")


def why_no_memory_group() -> str | None:
    """Return what this machine lacks for `memory_group`, None if nothing."""
    try:
        with memory_group(64 << 20):
            return None
    except OSError as error:
        return f"no control group of memory can be made: {error}"


class MemoryGroup:
    """A group. What is put into it is held to its limit together with what it starts."""

    def __init__(self, path: Path, home: Path) -> None:
        self.path = path
        self._home = home

    def put(self, pids: Iterable[int]) -> None:
        """Move processes into the group."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                (self.path / "cgroup.procs").write_text(str(pid))

    def command(self) -> list[str]:
        """Return what to put before a command so that it runs in the group."""
        return ["sh", "-c", f'echo $$ > {self.path}/cgroup.procs && exec "$@"', "sh"]

    def times_at_limit(self) -> int:
        """Return how often the kernel has had to take memory back because of the limit."""
        if (self.path / "memory.failcnt").exists():
            return int((self.path / "memory.failcnt").read_text())
        return int(dict(line.split() for line in (self.path / "memory.events").read_text().splitlines())["max"])

    def empty(self) -> None:
        """Move whatever is in it back."""
        for pid in (self.path / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (self._home / "cgroup.procs").write_text(pid)


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    """Make a group of `limit` bytes, without swap; it goes at the end, and what is in it then goes on outside. Raises OSError."""
    if (_TOP / "cgroup.controllers").exists():
        home, name = _TOP, "memory.max"
        if "memory" not in (home / "cgroup.subtree_control").read_text():
            (home / "cgroup.subtree_control").write_text("+memory")
    else:
        home, name = _TOP / "memory", "memory.limit_in_bytes"
    path = home / f"rafs-test-{uuid.uuid4().hex[:12]}"
    os.mkdir(path)
    group = MemoryGroup(path, home)
    try:
        (path / name).write_text(str(limit))
        with contextlib.suppress(OSError):  # version 2; a kernel may be without accounting of swap
            (path / "memory.swap.max").write_text("0")
        yield group
    finally:
        group.empty()
        os.rmdir(path)
