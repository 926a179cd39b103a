"""Bind mounts of pods: a directory of a mount becomes a pod's volume, read-only. Blocking calls; run them in a thread with a
limit.

Decided here: flags, and how a dead mount is told from a live one. Rule: a path inside an image is walked without following
links, since whoever built the image made them; what is bound is what the walk arrived at, by its descriptor.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from pathlib import Path
from typing import Final

from ..errors import MountError
from .codes import Code, CsiError

# The same numbers on every architecture since Linux 5.2 (5.12 for mount_setattr).
_OPEN_TREE: Final = 428
_MOVE_MOUNT: Final = 429
_MOUNT_SETATTR: Final = 442
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_AT_RECURSIVE: Final = 0x8000
_AT_READ_ONLY: Final = 0x1
_AT_NO_SUID: Final = 0x2
_AT_NO_DEV: Final = 0x4
_AT_NO_EXEC: Final = 0x8
_MS_BIND: Final = 0x1000
_MS_SHARED: Final = 1 << 20
_MNT_DETACH: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: str, flags: int) -> None:
    if _libc.mount(os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(flags), None):
        code = ctypes.get_errno()
        raise MountError(f"{target} cannot be mounted on: {os.strerror(code)}")


def open_below(root: str, path: str) -> int:
    """Return an O_PATH descriptor of a directory `path` below `root`. Raises CsiError if it is not there, or a link is in the way."""
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in filter(None, path.split("/")):
        try:
            deeper = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        except OSError as error:
            os.close(fd)
            raise CsiError(Code.NOT_FOUND, f"subPath {path!r} is not in the image: {error.strerror}") from None
        os.close(fd)
        fd = deeper
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            raise CsiError(
                Code.INVALID_ARGUMENT, f"subPath {path!r} is not a directory of the image (links are not followed)"
            )
    return fd


def bind(root: str, sub_path: str, target: str, *, executable: bool) -> None:
    """Make a directory of a mount appear at `target`, read-only. Raises CsiError, MountError; then nothing is mounted there."""
    fd = open_below(root, sub_path)
    try:
        make_target(target)
        _attach(fd, target, _AT_NO_SUID | _AT_NO_DEV | (0 if executable else _AT_NO_EXEC))
    finally:
        os.close(fd)


def bind_tree(root: str, target: str) -> None:
    """Make a directory appear at `target`, read-only, with all that is or will be mounted below it. `root` is shared."""
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        make_target(target)
        _attach(fd, target, _AT_NO_SUID | _AT_NO_DEV | _AT_NO_EXEC, recursive=True)
    finally:
        os.close(fd)


def _attach(fd: int, target: str, attributes: int, *, recursive: bool = False) -> None:
    """Attach a copy of the mount that holds a directory. It is made read-only before it can be seen: what propagates to other
    namespaces is a mount as it was when it was attached, and later changes stay here.
    """
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    tree = _syscall(_OPEN_TREE, fd, b"", flags, what=target)
    try:
        wanted = struct.pack("=4Q", _AT_READ_ONLY | attributes, 0, 0, 0)
        _syscall(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, wanted, len(wanted), what=target)
        _syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH, what=target)
    finally:
        os.close(tree)


def _syscall(number: int, *arguments: int | bytes, what: str) -> int:
    given = [ctypes.c_char_p(one) if isinstance(one, bytes) else ctypes.c_long(one) for one in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *given)
    if result < 0:
        code = ctypes.get_errno()
        raise MountError(f"{what} cannot be mounted on: {os.strerror(code)}")
    return result


def make_shared(directory: str) -> None:
    """Make a directory a mount of its own, whose later mounts appear wherever it has been bound."""
    if device_of(directory) is None:
        _mount(directory, directory, _MS_BIND)
    _mount("none", directory, _MS_SHARED)


def make_target(target: str) -> None:
    """Make the directory that a volume is mounted on; its parent is the kubelet's."""
    try:
        os.mkdir(target, 0o750)
    except FileExistsError:
        if not os.path.isdir(target):
            raise CsiError(Code.FAILED_PRECONDITION, f"target {target} is not a directory") from None
    except OSError as error:
        raise CsiError(Code.INTERNAL, f"target {target} cannot be made: {error.strerror}") from None


def detach(target: str) -> None:
    """Take away everything that is mounted at `target`, however deep. Nothing there is fine; nothing inside is touched."""
    for _ in range(16):
        if device_of(target) is None:
            return
        if _libc.umount2(os.fsencode(target), _MNT_DETACH):
            code = ctypes.get_errno()
            if code in {errno.EINVAL, errno.ENOENT}:
                return
            raise MountError(f"{target} cannot be unmounted: {os.strerror(code)}")
    raise MountError(f"{target} is mounted on again and again by somebody else")


def remove_target(target: str) -> None:
    """Remove what `make_target` made; what is not empty stays, as data of nobody knows whom."""
    try:
        os.rmdir(target)
    except FileNotFoundError:
        return
    except OSError as error:
        raise CsiError(Code.INTERNAL, f"target {target} cannot be removed: {error.strerror}") from None


def mount_devices() -> dict[str, str]:
    """Return what is mounted last at each path, as `major:minor`. Looks at the kernel's table only."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ", 5)
        if len(fields) > 5:
            found[_unescape(fields[4])] = fields[2]
    return found


def device_of(path: str) -> str | None:
    """Return `major:minor` of what is mounted at `path`, None if nothing is."""
    return mount_devices().get(os.path.abspath(path))


def is_alive(path: str) -> bool:
    """Tell whether a mount answers. Hangs as long as its server does: call it with a limit.

    By statfs: the kernel keeps the attributes of an image's files, and would answer a stat for a server that hangs or has died.
    """
    try:
        os.statvfs(path)
    except OSError:
        return False
    return True


def abort_fuse(device: str) -> bool:
    """End a FUSE connection whose server hangs: all that waits for it fails. Return whether there was one."""
    major, _, minor = device.partition(":")
    try:
        Path(f"/sys/fs/fuse/connections/{int(minor)}/abort").write_text("1")
    except (OSError, ValueError):
        return False
    return major == "0"


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
