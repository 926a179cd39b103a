"""Writing files of an image below a directory: what `rafs export` and `rafs get REF` share.

Rule: nothing is ever written outside the target. Every step goes through a descriptor of its directory, names from the image
are single components, symlinks are made and never followed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Protocol

import trio

from rafsfs.errors import RafsError, UsageError
from rafsfs.format.bootstrap import Bootstrap
from rafsfs.format.inode import Inode
from rafsfs.image import ImageReader

from .output import show_path
from .run import say

Arrived = Callable[[int], None]


class Content(Protocol):
    """Where the contents of regular files come from."""

    async def write(self, nid: int, fd: int, arrived: Arrived) -> None:
        """Write the content of a file, holes left out, to the empty file `fd`; `arrived` gets bytes. The size is set by the caller."""


class StoreContent:
    """Straight from the image's store."""

    def __init__(self, bootstrap: Bootstrap, reader: ImageReader) -> None:
        self._bootstrap = bootstrap
        self._reader = reader

    async def write(self, nid: int, fd: int, arrived: Arrived) -> None:
        """Write the content of a file."""
        extents = self._bootstrap.extents(nid)
        holes = [(e.file_offset, e.length) for e in extents if e.space is None]
        position = 0
        if len(holes) < len(extents) or not holes:
            async for part in self._reader.read_file(nid):
                if not _in_hole(holes, position, len(part)):
                    await trio.to_thread.run_sync(_write_all, fd, part, position)
                    arrived(len(part))
                position += len(part)


def prepare_directory(directory: str) -> None:
    """Make a directory to be written into, or see that it is empty. Raises UsageError."""
    try:
        os.makedirs(directory, exist_ok=True)
        full = bool(os.listdir(directory))
    except OSError as error:
        raise UsageError(f"{directory} cannot be exported to: {error.strerror}") from error
    if full:
        raise UsageError(f"{directory} is not empty; export into an empty directory")


def say_left_out(left_out: Counter[str]) -> None:
    """Say on standard error what could not be restored."""
    if left_out:
        said = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        say(f"not restored, for want of permission: {said}")


@dataclass(slots=True)
class _Open:
    """A directory being filled."""

    fd: int
    path: bytes
    inode: Inode


class Exporter:
    """Writes one image, or the `wanted` paths of it, below one directory. `total`: bytes of contents, for `progress`."""

    def __init__(
        self,
        bootstrap: Bootstrap,
        content: Content,
        total: int,
        progress: Callable[[int, int], None],
        wanted: Container[bytes] | None = None,
    ) -> None:
        self.left_out: Counter[str] = Counter()
        """What this user or file system may not have, by kind."""
        self._bootstrap = bootstrap
        self._content = content
        self._total = total
        self._wanted = wanted
        self._progress = progress
        self._root = os.geteuid() == 0
        self._made: dict[int, tuple[bytes, ...]] = {}
        self._closed: list[tuple[bytes, int]] = []
        self._done = 0

    async def run(self, directory: str) -> None:
        """Write everything; a directory gets its metadata when it is complete. Raises RafsError naming the path."""
        top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        stack: list[_Open] = []
        path = b""
        try:
            for path, inode in self._bootstrap.walk():
                if self._wanted is not None and path not in self._wanted:
                    continue
                parent, _, name = path.rpartition(b"/")
                while stack and path and stack[-1].path != parent:
                    self._finish(stack)
                if not path:
                    stack.append(_Open(os.dup(top), b"", inode))
                elif stat.S_ISDIR(inode.mode):
                    os.mkdir(name, 0o700, dir_fd=stack[-1].fd)
                    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=stack[-1].fd)
                    stack.append(_Open(fd, path, inode))
                else:
                    await self._write(top, stack[-1].fd, name, path, inode)
            while stack:
                path = stack[-1].path
                self._finish(stack)
            for path, mode in self._closed:
                self._close_directory(top, path, mode)
        except OSError as error:
            place = os.path.join(directory, show_path(path))
            raise RafsError(
                f"{place} cannot be written: {error.strerror}; what is there so far is incomplete"
            ) from error
        finally:
            for opened in stack:
                os.close(opened.fd)
            os.close(top)

    async def _write(self, top: int, parent: int, name: bytes, path: bytes, inode: Inode) -> None:
        known = self._made.get(inode.nid)
        if known is not None:
            fd = _open_directory(top, known[:-1])
            try:
                os.link(known[-1], name, src_dir_fd=fd, dst_dir_fd=parent, follow_symlinks=False)
            finally:
                os.close(fd)
            return
        if stat.S_ISREG(inode.mode):
            await self._write_file(parent, name, inode)
        elif stat.S_ISLNK(inode.mode):
            os.symlink(self._bootstrap.readlink(inode.nid), name, dir_fd=parent)
        elif not self._make_node(parent, name, inode):
            return
        if inode.nlink > 1:
            self._made[inode.nid] = tuple(path.split(b"/"))
        self._apply(f"/proc/self/fd/{parent}/".encode() + name, inode, follow=False)

    def _make_node(self, parent: int, name: bytes, inode: Inode) -> bool:
        """Make a fifo, socket or device; return whether it could be."""
        try:
            os.mknod(name, inode.mode & ~0o7777 | 0o600, inode.rdev, dir_fd=parent)
        except PermissionError:
            self.left_out["device nodes"] += 1
            return False
        return True

    async def _write_file(self, parent: int, name: bytes, inode: Inode) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=parent)
        try:
            await self._content.write(inode.nid, fd, self._arrived)
            os.ftruncate(fd, inode.size)
        finally:
            os.close(fd)

    def _arrived(self, size: int) -> None:
        self._done += size
        self._progress(min(self._done, self._total), self._total)

    def _finish(self, stack: list[_Open]) -> None:
        """Give the innermost directory, now complete, its metadata through its own descriptor, and close it."""
        opened = stack.pop()
        try:
            self._apply(f"/proc/self/fd/{opened.fd}".encode(), opened.inode, follow=True)
            if not opened.inode.mode & 0o100 and not self._root:
                # A hard link to a file in here may still come, and its way leads through this directory.
                os.fchmod(opened.fd, 0o700)
                self._closed.append((opened.path, opened.inode.mode))
        finally:
            os.close(opened.fd)

    def _close_directory(self, top: int, path: bytes, mode: int) -> None:
        fd = _open_directory(top, tuple(path.split(b"/")) if path else ())
        try:
            os.fchmod(fd, stat.S_IMODE(mode))
        finally:
            os.close(fd)

    def _apply(self, path: bytes, inode: Inode, *, follow: bool) -> None:
        mode = stat.S_IMODE(inode.mode)
        try:
            os.chown(path, inode.uid, inode.gid, follow_symlinks=follow)
        except PermissionError:
            self.left_out["owners"] += 1
            mode &= ~(stat.S_ISUID | stat.S_ISGID)  # they would run as another than the image says
        for key, value in self._bootstrap.xattrs(inode.nid).items():
            try:
                os.setxattr(path, key, value, follow_symlinks=follow)
            except OSError as error:
                if error.errno not in {errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL}:
                    raise
                self.left_out["extended attributes"] += 1
        if not stat.S_ISLNK(inode.mode):
            os.chmod(path, mode)
        os.utime(path, ns=(inode.mtime_ns, inode.mtime_ns), follow_symlinks=follow)


def _open_directory(top: int, parts: tuple[bytes, ...]) -> int:
    fd = os.dup(top)
    for part in parts:
        following = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
        os.close(fd)
        fd = following
    return fd


def _in_hole(holes: list[tuple[int, int]], position: int, length: int) -> bool:
    return any(start <= position and position + length <= start + size for start, size in holes)


def _write_all(fd: int, data: bytes | memoryview, position: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, position)
        view, position = view[done:], position + done
