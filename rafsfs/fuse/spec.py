"""What one mount is: written by the daemon to CACHE/mounts/ID.json, read by the worker and by the next daemon. No secrets.

Also names the process that serves it, by pid and start time, so that a daemon that comes later can tell it from a stranger.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import CacheError, FormatError


@dataclass(slots=True)
class MountSpec:
    """One mount that should exist."""

    id: str
    ref: str
    digest: str
    mountpoint: str
    cache_dir: str
    mode: str = "fuse"
    prefetch: str = "none"
    deadline_s: float = 60.0
    read_ahead_kb: int = 1024
    allow_other: bool = True
    has_xattrs: bool = True
    registry: dict[str, Any] = field(default_factory=dict)
    """RegistryOptions as a dict: paths and switches."""
    scheduler: str = ""
    """Schedulers that the mount was made with, `HOST:PORT[,...]`."""
    daemon_argv: list[str] = field(default_factory=list)
    """What a worker runs when it needs a daemon and none answers."""
    rung: str = "fuse"
    """How it is mounted now: fuse, erofs, lazy or kernel; `mode` is what was asked for."""
    why: str = ""
    """Why not a better way."""
    detached: bool = False
    """Unmounted, but somebody still has it open: guarded and counted until the kernel lets it go."""
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    view: str = ""
    """Bootstrap that is served in place of the image's own: of the files that `include` and `exclude` leave."""
    generations: list[dict[str, Any]] = field(default_factory=list)
    """Superblocks of kernel mounts, oldest first (rafsfs/erofs/generation.py)."""
    spaces: list[str] = field(default_factory=list)
    """Ids of the data spaces of a kernel mount: in use as long as this record is there."""
    worker_pid: int = 0
    worker_start: int = 0
    """Start time of the process in clock ticks since boot, field 22 of /proc/PID/stat."""

    @property
    def path(self) -> str:
        """Where the spec is kept."""
        return os.path.join(self.cache_dir, "mounts", f"{self.id}.json")

    def save(self) -> None:
        """Write the spec, replacing the one before. Raises CacheError."""
        temporary = f"{self.path}.new"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(asdict(self), file, indent=1, sort_keys=True)
            os.rename(temporary, self.path)
        except OSError as error:
            raise CacheError(f"{self.path}: {error.strerror}") from error

    def remove(self) -> None:
        """Delete the file of the spec."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def worker_alive(self) -> bool:
        """Tell whether the process named here is still the one that was started."""
        return self.worker_pid > 0 and process_start(self.worker_pid) == self.worker_start


def load_spec(path: str) -> MountSpec:
    """Read a spec. Raises FormatError."""
    try:
        data = json.loads(Path(path).read_bytes())
        known = {item.name for item in fields(MountSpec)}
        return MountSpec(**{key: value for key, value in data.items() if key in known})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FormatError(f"mount record {path} cannot be read: {error}") from error


def load_specs(cache_dir: str) -> Iterator[MountSpec]:
    """Yield the specs of a cache directory; unreadable ones are left out."""
    directory = os.path.join(cache_dir, "mounts")
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(directory)):
            if name.endswith(".json"):
                with contextlib.suppress(FormatError):
                    yield load_spec(os.path.join(directory, name))


def process_start(pid: int) -> int:
    """Return when a process started, clock ticks since boot; 0 if there is none or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    rest = text.rpartition(")")[2].split()
    return 0 if rest[0] in {"Z", "X"} else int(rest[19])
