"""Mounting a bootstrap and its data files by the kernel's EROFS driver, as the oracle of the format. Needs root."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence

_libc = ctypes.CDLL(None, use_errno=True)
_FSOPEN, _FSCONFIG, _FSMOUNT, _MOVE_MOUNT = 430, 431, 432, 429
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MNT_DETACH = 2


def _syscall(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"syscall {number}: {os.strerror(code)}")
    return result


@contextlib.contextmanager
def kernel_mount(bootstrap: str, devices: Sequence[str], mountpoint: str) -> Iterator[str]:
    """Mount `bootstrap` with `devices` (files, in slot order) read-only; unmount at the end, also on failure."""
    fs = _syscall(_FSOPEN, b"erofs", 0)
    try:
        _syscall(_FSCONFIG, fs, _SET_STRING, b"source", os.fsencode(bootstrap), 0)
        for device in devices:
            _syscall(_FSCONFIG, fs, _SET_STRING, b"device", os.fsencode(device), 0)
        _syscall(_FSCONFIG, fs, _SET_FLAG, b"ro", None, 0)
        _syscall(_FSCONFIG, fs, _CREATE, None, None, 0)
        mount = _syscall(_FSMOUNT, fs, 0, 1)
    finally:
        os.close(fs)
    try:
        _syscall(_MOVE_MOUNT, mount, b"", -100, os.fsencode(mountpoint), _MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(mount)
    try:
        yield mountpoint
    finally:
        _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH)
