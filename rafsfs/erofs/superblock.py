"""Superblocks of the kernel's EROFS driver made from our files: mounted, tuned, replaced, asked whether they live.

Decided here: the order of steps of a mount, how a superblock is named, how one mount takes the place of another. Rules: a mount is
complete before it is attached; what is attached at a mountpoint is replaced only if it is the very mount we put there; nothing
here looks into a mount, so no process can come to wait for itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import MountError
from . import syscalls

_SYSFS: Final = "/sys/fs/erofs"
"""One directory per superblock, `erofs-N`; N runs on and is not used again before the next boot."""
_naming = threading.Lock()
"""Held over the two listings between which a superblock is made: its name is what has come in between."""


@dataclass(slots=True)
class DetachedMount:
    """A mount that is attached nowhere; it ends with its descriptor unless `attach` is called."""

    descriptor: int
    superblocks: tuple[str, ...]
    """Names below /sys/fs/erofs: one, or more if somebody else on this machine mounted in the same instant. Ours is among them."""
    mount_id: int
    device: str
    """`major:minor` of its files."""

    def close(self) -> None:
        """Let go of it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def create(bootstrap: str, devices: Sequence[str], *, direct: bool = False) -> DetachedMount:
    """Make the superblock of `bootstrap` with `devices` (paths of regular files, in slot order). Blocking. Raises MountError.

    The kernel opens each path now and never again. `direct`: it reads the devices past their page cache, and does not wait for what
    it reads ahead; without, its reader waits for that too.
    """
    options: list[tuple[str, str | None]] = [("source", bootstrap)]
    options += [("device", device) for device in devices]
    if direct:
        options.append(("directio", None))
    options.append(("ro", None))
    _read_ahead_file(bootstrap)
    with _naming:
        before = _names()
        try:
            descriptor = syscalls.create_mount("erofs", options)
        except OSError as error:
            if error.errno == errno.ENOTBLK:
                raise MountError(
                    f"EROFS cannot read files of the file system of {bootstrap} (tmpfs, overlayfs, old kernels)"
                ) from error
            raise MountError(f"the kernel does not mount {bootstrap} as EROFS: {error.strerror}") from error
        names = tuple(sorted(_names() - before))
    if not names:
        os.close(descriptor)
        raise MountError(f"{_SYSFS} does not name the superblock of {bootstrap}: nobody could tell when it is gone")
    device = os.fstat(descriptor).st_dev  # of the root, which the bootstrap holds: no process is asked
    return DetachedMount(descriptor, names, syscalls.mount_id(descriptor), f"{os.major(device)}:{os.minor(device)}")


def attach(mount: DetachedMount, mountpoint: str, *, replacing: int = 0) -> None:
    """Attach at `mountpoint`, which nothing is mounted on, or in the place of mount number `replacing`. Blocking. Raises MountError.

    Replacing goes beneath and then takes the upper one away: there is no moment without a mount, and open files go on.
    """
    try:
        if not replacing:
            syscalls.move_mount(mount.descriptor, mountpoint)
            return
        if topmost(mountpoint) != replacing:
            raise MountError(f"what is mounted on {mountpoint} is not the mount that is to be replaced")
        syscalls.move_mount(mount.descriptor, mountpoint, beneath=True)
        syscalls.detach(mountpoint)
    except OSError as error:
        raise MountError(f"cannot attach a mount at {mountpoint}: {error.strerror}") from error


def is_alive(names: Sequence[str]) -> bool:
    """Tell whether a superblock is still mounted or open anywhere, in any namespace."""
    return any(os.path.isdir(os.path.join(_SYSFS, name)) for name in names)


def set_read_ahead(names: Sequence[str], kib: int) -> bool:
    """Set the kernel's read-ahead; return whether it could be. With more than one candidate nothing is touched."""
    if len(names) != 1:
        return False
    try:
        Path("/sys/class/bdi", names[0], "read_ahead_kb").write_text(str(kib))
    except OSError:
        return False
    return True


def topmost(mountpoint: str) -> int:
    """Return the number of the mount that a look-up of `mountpoint` ends at, 0 if nothing is mounted there."""
    wanted = os.path.abspath(mountpoint)
    here: dict[int, int] = {}
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ", 5)
        if _unescape(fields[4]) == wanted:
            here[int(fields[0])] = int(fields[1])
    covered = set(here.values())
    return next((number for number in here if number not in covered), 0)


def _names() -> set[str]:
    with contextlib.suppress(FileNotFoundError):
        return {name for name in os.listdir(_SYSFS) if name != "features"}
    return set()


def _read_ahead_file(path: str) -> None:
    """Bring a bootstrap into the page cache: the driver reads metadata page by page, each a wait for the disk."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
