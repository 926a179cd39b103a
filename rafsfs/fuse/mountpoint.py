"""Mountpoints: whether one can be used, and taking a mount away. Nothing here looks inside a mount."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Final

from ..errors import FuseError, MountError, MountpointError

_MNT_DETACH: Final = 2
_UMOUNT_TIMEOUT_S: Final = 15.0
_BUSY_S: Final = 0.5
"""How long a mount may be busy: a look-up that walks through it, or a mount namespace that is being copied, is over in a moment."""


def check_mountpoint(path: str) -> None:
    """Raise MountpointError unless `path` is an empty directory that nothing is mounted on."""
    if is_mounted(path):
        raise MountpointError(f"{path} is a mountpoint already; unmount it first or choose another directory")
    try:
        if next(iter(os.scandir(path)), None) is not None:
            raise MountpointError(f"{path} is not empty; choose an empty directory to mount on")
    except FileNotFoundError:
        raise MountpointError(f"{path} does not exist; make it with `mkdir -p {path}`") from None
    except NotADirectoryError:
        raise MountpointError(f"{path} is not a directory") from None
    except OSError as error:
        raise MountpointError(f"{path}: {error.strerror}") from error


def check_fuse() -> None:
    """Raise FuseError unless this process can mount by FUSE."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise FuseError(
            "/dev/fuse is missing; load the kernel module with `modprobe fuse`, see `rafs doctor`"
        ) from None
    except OSError as error:
        raise FuseError(f"/dev/fuse cannot be opened ({error.strerror}); see `rafs doctor`") from error
    if not os.stat("/dev/fuse").st_rdev == os.makedev(10, 229):
        raise FuseError("/dev/fuse is not the FUSE device (10, 229); see `rafs doctor`")
    if os.geteuid() and not shutil.which("fusermount3"):
        raise FuseError("fusermount3 is missing, which users other than root need; install the package fuse3")


def why_no_fuse() -> str:
    """Return why this process cannot mount by FUSE, empty if it can."""
    try:
        check_fuse()
    except FuseError as error:
        return str(error)
    return ""


def may_allow_other() -> bool:
    """Tell whether this user may make a mount that others can read."""
    if os.geteuid() == 0:
        return True
    try:
        lines = Path("/etc/fuse.conf").read_text().splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def is_mounted(path: str) -> bool:
    """Tell whether something is mounted exactly at `path`, from the kernel's table: a dead mount is seen too."""
    return mount_source(path) is not None


def mount_source(path: str) -> str | None:
    """Return the source of what is mounted last at `path`, None if nothing is."""
    wanted = os.path.abspath(path)
    found = None
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if len(fields) > 4 and len(rest) > 1 and _unescape(fields[4]) == wanted:
            found = _unescape(rest[1])
    return found


def unmount(path: str, *, lazy: bool = False) -> None:
    """Take the mount at `path` away. Raises MountError if it is busy and not `lazy`. Nothing there is fine. Blocking."""
    if not is_mounted(path):
        return
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        end = time.monotonic() + _BUSY_S
        while True:
            if libc.umount2(os.fsencode(path), _MNT_DETACH if lazy else 0) == 0:
                return
            code = ctypes.get_errno()
            if code != errno.EBUSY or time.monotonic() > end:
                break
            time.sleep(0.02)
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", path]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_UMOUNT_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MountError(f"{path} cannot be unmounted: {error}") from error
        if done.returncode == 0:
            return
        code = errno.EBUSY if b"busy" in done.stderr else errno.EPERM
    if code in {errno.EINVAL, errno.ENOENT}:
        return
    if code == errno.EBUSY:
        raise MountError(f"{path} is in use; stop what reads it, or detach it with `rafs umount --lazy {path}`")
    raise MountError(f"{path} cannot be unmounted: {os.strerror(code)}")


def set_read_ahead(path: str, kib: int) -> bool:
    """Set the kernel's read-ahead of the file system mounted at `path`; return whether it could be (root only).

    Blocking, and asks the mount for its device: never called by the process that serves it.
    """
    try:
        device = os.stat(path).st_dev
        Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").write_text(str(kib))
    except OSError:
        return False
    return True


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
