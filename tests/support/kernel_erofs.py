"""Mounting a bootstrap and its data files by the kernel's EROFS driver, as the oracle of the format. Needs root."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence

_libc = ctypes.CDLL(None, use_errno=True)
# Numbers of the calls are the same on every architecture (asm-generic, Linux 5.2).
_FSOPEN, _FSCONFIG, _FSMOUNT, _MOVE_MOUNT = 430, 431, 432, 429
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_MOVE_MOUNT_F_EMPTY_PATH = 4
_AT_FDCWD = -100
_MNT_DETACH = 2


class KernelRefusedError(Exception):
    """The kernel did not mount the image; the message holds what it said."""


def _syscall(number: int, *arguments: object) -> int:
    """Make a system call with integer, bytes and None arguments. Raises OSError."""
    words = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"syscall {number}: {os.strerror(code)}")
    return result


def _messages(fs: int) -> str:
    """Return what the kernel logged to a file system context."""
    lines = []
    with contextlib.suppress(OSError):
        while line := os.read(fs, 4096):
            lines.append(line.decode(errors="replace").strip())
    return "; ".join(lines)


def why_no_kernel_mount() -> str | None:
    """Return what this machine lacks for `kernel_mount`, None if nothing (a mount may still be refused)."""
    if os.geteuid() != 0:
        return "mounting needs root"
    try:
        os.close(_syscall(_FSOPEN, b"erofs", 0))
    except OSError as error:
        return f"the kernel has no EROFS or no fsopen ({error.strerror})"
    release = os.uname().release.split(".")
    if (int(release[0]), int(release[1].split("-")[0])) < (6, 12):
        return f"Linux {os.uname().release} cannot mount EROFS from plain files, 6.12 can"
    return None


@contextlib.contextmanager
def kernel_mount(bootstrap: str, devices: Sequence[str], mountpoint: str) -> Iterator[str]:
    """Mount `bootstrap` with `devices` (files, in slot order) read-only; unmount at the end, also on failure.

    Raises KernelRefusedError with the kernel's own words if it does not take the image.
    """
    fs = _syscall(_FSOPEN, b"erofs", 0)
    try:
        _syscall(_FSCONFIG, fs, _SET_STRING, b"source", os.fsencode(bootstrap), 0)
        for device in devices:
            _syscall(_FSCONFIG, fs, _SET_STRING, b"device", os.fsencode(device), 0)
        _syscall(_FSCONFIG, fs, _SET_FLAG, b"ro", None, 0)
        _syscall(_FSCONFIG, fs, _CREATE, None, None, 0)
        mount = _syscall(_FSMOUNT, fs, 0, 0)
    except OSError as error:
        raise KernelRefusedError(f"{error}: {_messages(fs)}") from error
    finally:
        os.close(fs)
    try:
        _syscall(_MOVE_MOUNT, mount, b"", _AT_FDCWD, os.fsencode(mountpoint), _MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(mount)
    try:
        yield mountpoint
    finally:
        if _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH):
            raise OSError(ctypes.get_errno(), f"cannot unmount {mountpoint}")
