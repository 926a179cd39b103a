"""`rafs export`: an image becomes an ordinary directory again.

Rule: nothing is ever written outside the target. Every step goes through a descriptor of its directory, names from the image
are single components, symlinks are made and never followed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import trio

from rafsfs.errors import RafsError, UsageError
from rafsfs.format.inode import Inode
from rafsfs.image import Image, ImageReader
from rafsfs.registry.store import RegistryOptions

from .options import registry_options, take_registry_options
from .output import progress_bar, show_path
from .run import run_async, say
from .wiring import opened_image


@click.command("export")
@click.argument("ref")
@click.argument("directory", type=click.Path(file_okay=False))
@registry_options
def command(ref: str, directory: str, **options: Any) -> None:
    """Write the image REF out to DIRECTORY, which must be empty or not exist.

    Owners, devices and trusted xattrs need root and are left out without it, and said so on standard error.

    Example: rafs export registry.example/models/llama:v1 ./llama
    """
    left_out = run_async(_export, ref, directory, take_registry_options(options))
    if left_out:
        said = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        say(f"not restored, for want of permission: {said}")


async def _export(ref: str, directory: str, options: RegistryOptions) -> Counter[str]:
    async with opened_image(ref, options) as (image, store):
        try:
            os.makedirs(directory, exist_ok=True)
            full = bool(os.listdir(directory))
        except OSError as error:
            raise UsageError(f"{directory} cannot be exported to: {error.strerror}") from error
        if full:
            raise UsageError(f"{directory} is not empty; export into an empty directory")
        with progress_bar("exporting") as progress:
            exporter = Exporter(image, ImageReader(store, image), progress)
            await exporter.run(directory)
        return exporter.left_out


@dataclass(slots=True)
class _Open:
    """A directory being filled."""

    fd: int
    path: bytes
    inode: Inode


class Exporter:
    """Writes one image below one directory."""

    def __init__(self, image: Image, reader: ImageReader, progress: Callable[[int, int], None]) -> None:
        self.left_out: Counter[str] = Counter()
        """What this user or file system may not have, by kind."""
        self._image = image
        self._reader = reader
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
            for path, inode in self._image.bootstrap.walk():
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
            os.symlink(self._image.bootstrap.readlink(inode.nid), name, dir_fd=parent)
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
            extents = self._image.bootstrap.extents(inode.nid)
            holes = [(e.file_offset, e.length) for e in extents if e.space is None]
            position = 0
            if len(holes) < len(extents) or not holes:
                async for part in self._reader.read_file(inode.nid):
                    if not _in_hole(holes, position, len(part)):
                        await trio.to_thread.run_sync(_write_all, fd, part, position)
                        self._done += len(part)
                        total = self._image.chunk_map.data_bytes
                        self._progress(min(self._done, total), total)
                    position += len(part)
            os.ftruncate(fd, inode.size)
        finally:
            os.close(fd)

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
        for key, value in self._image.bootstrap.xattrs(inode.nid).items():
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
