"""System calls for mounts that neither Python nor util-linux offers, by ctypes. Numbers are those of asm-generic, the same on every
architecture we run on (Linux 5.2; pidfd_getfd 5.6; MOVE_MOUNT_BENEATH and cachestat 6.5). ctypes lets go of the interpreter lock
during each call.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import Final

_MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _PIDFD_GETFD, _CACHESTAT = 429, 430, 431, 432, 438, 451
_CLOEXEC: Final = 1
"""FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC."""
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_AT_FDCWD: Final = -100
_FROM_EMPTY_PATH: Final = 0x4
_BENEATH: Final = 0x200
_MNT_DETACH: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: int | bytes | None) -> int:
    words = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def create_mount(kind: str, options: list[tuple[str, str | None]]) -> int:
    """Make a read-only, nosuid, nodev mount that is attached nowhere; return its descriptor.

    `options` in order; None: a flag. Raises OSError whose text ends with what the kernel said of it. Blocking: a file system that is
    served by a process asks it.
    """
    context = _call(_FSOPEN, kind.encode(), _CLOEXEC)
    try:
        for name, value in options:
            if value is None:
                _call(_FSCONFIG, context, _SET_FLAG, name.encode(), None, 0)
            else:
                _call(_FSCONFIG, context, _SET_STRING, name.encode(), os.fsencode(value), 0)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        return _call(_FSMOUNT, context, _CLOEXEC, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)
    except OSError as error:
        said = _messages(context)
        raise OSError(error.errno, f"{error.strerror}: {said}" if said else str(error.strerror)) from error
    finally:
        os.close(context)


def _messages(context: int) -> str:
    """Return what the kernel logged to a file system context."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        while line := os.read(context, 4096):
            lines.append(line.decode(errors="replace").strip())
    return "; ".join(lines)


def move_mount(mount: int, path: str, *, beneath: bool = False) -> None:
    """Attach a mount at `path`, on top of what is mounted there or beneath the topmost. Raises OSError."""
    _call(_MOVE_MOUNT, mount, b"", _AT_FDCWD, os.fsencode(path), _FROM_EMPTY_PATH | (_BENEATH if beneath else 0))


def detach(path: str) -> None:
    """Take the topmost mount at `path` out of the tree, also while it is in use. Raises OSError."""
    if _libc.umount2(os.fsencode(path), _MNT_DETACH):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)


def pidfd_getfd(pidfd: int, number: int) -> int:
    """Return a copy of descriptor `number` of another process. Raises OSError, also if that is not allowed."""
    return _call(_PIDFD_GETFD, pidfd, number, 0)


def cached_pages(descriptor: int) -> int:
    """Return how many pages of a file are in the page cache. Raises OSError."""
    whole = (ctypes.c_uint64 * 2)()  # offset and length; a length of 0 is all that follows
    found = (ctypes.c_uint64 * 5)()  # in the cache, dirty, under write-back, evicted, evicted of late
    if _libc.syscall(ctypes.c_long(_CACHESTAT), ctypes.c_long(descriptor), whole, found, ctypes.c_long(0)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found[0]


def mount_id(mount: int) -> int:
    """Return the kernel's number of a mount, as /proc/self/mountinfo shows it first; `mount`: any descriptor of a file of it."""
    with open(f"/proc/self/fdinfo/{mount}", encoding="ascii") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == "mnt_id":
                return int(value)
    return 0
