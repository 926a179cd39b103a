"""One superblock of a mount of ours, as it is written down in the mount's record, and what is decided from it. Pure but for `from_spec`.

Decided here: when a mount is promoted, what a daemon makes of what it finds at its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

MOST_ALIVE: Final = 3
"""Generations of one mount alive, up to which an incomplete image is promoted: each older one that is read keeps a process."""
PARTIAL_PAUSE_S: Final = 30.0
"""Between two promotions of an image that is still incomplete."""


@dataclass(slots=True)
class Generation:
    """One superblock."""

    number: int
    rung: str
    """erofs: nobody serves it; lazy: a flat server does; kernel: a guard does."""
    superblocks: list[str]
    mount_id: int
    boot_id: str
    plain: list[bool] = field(default_factory=list)
    """By device slot: whether it is the plain file, and nobody asks before it is read."""
    worker_pid: int = 0
    worker_start: int = 0
    descriptors: list[int] = field(default_factory=list)
    """Numbers, in the worker, of what it serves: /dev/fuse; or group, journal and data files."""
    names: list[str] = field(default_factory=list)
    """Names under which the holder keeps these, in the same order."""
    device: str = ""
    """`major:minor` of its files."""
    breached: bool = False
    """Kernel mode: nobody held the group for a while, so holes may have been read."""

    def as_dict(self) -> dict[str, Any]:
        """Return it for the record."""
        return asdict(self)

    def held_names(self, mount: str) -> list[str]:
        """Return the names under which the holder keeps what the worker serves."""
        kinds = {"lazy": ["fuse"], "kernel": ["group", "journal"]}.get(self.rung, [])
        return [f"{kind}/{mount}/{self.number}" for kind in kinds]

    def file_name(self, mount: str, space: str) -> str:
        """Return the name under which the holder keeps a data file of kernel mode, opened before its mark; `space`: its id in hex."""
        return f"file/{mount}/{self.number}/{space}"

    def pid_name(self, mount: str) -> str:
        """Return the name under which the holder watches the worker."""
        return f"pid/{mount}/{self.number}"


def from_record(data: dict[str, Any]) -> Generation | None:
    """Return a generation from a mount's record; None for what is none."""
    known = {item.name for item in fields(Generation)}
    try:
        return Generation(**{name: value for name, value in data.items() if name in known})
    except TypeError:
        return None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be done about the attached generation."""

    replace: bool
    because: str = ""


def promotion(attached: Generation, settled: Sequence[bool], *, alive: int, since_last_s: float) -> Wanted:
    """Say whether the attached generation is to be replaced, from which data spaces are settled (complete and on the disk) now.

    A plain device whose data space is not settled any more goes first: a chunk of it was found damaged. In kernel mode what completes loses
    its mark, nothing is replaced.
    """
    if any(plain and not now for plain, now in zip(attached.plain, settled, strict=True)):
        return Wanted(True, "a chunk was found damaged")
    if attached.rung != "lazy" or not any(
        now and not plain for plain, now in zip(attached.plain, settled, strict=True)
    ):
        return Wanted(False)
    if all(settled):
        return Wanted(True, "the image is complete")
    if since_last_s >= PARTIAL_PAUSE_S and alive < MOST_ALIVE:
        return Wanted(True, "a data space is complete")
    return Wanted(False)
