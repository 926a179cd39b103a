"""`rafs export`: an image becomes an ordinary directory again.

Rule: nothing is ever written outside the target. Every step goes through a descriptor of its directory, names from the image
are single components, symlinks are made and never followed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import click
import trio

from rafsfs.errors import UsageError
from rafsfs.format.inode import Inode
from rafsfs.image import Image, ImageReader
from rafsfs.registry.store import RegistryOptions

from .options import registry_options, take_registry_options
from .output import progress_bar
from .run import run_async
from .wiring import opened_image


@click.command("export")
@click.argument("ref")
@click.argument("directory", type=click.Path(file_okay=False))
@registry_options
def command(ref: str, directory: str, **options: Any) -> None:
    """Write the image REF out to DIRECTORY, which must be empty or not exist.

    Owners, devices and trusted xattrs need root and are left out without it.

    Example: rafs export registry.example/models/llama:v1 ./llama
    """
    run_async(_export, ref, directory, take_registry_options(options))


async def _export(ref: str, directory: str, options: RegistryOptions) -> None:
    async with opened_image(ref, options) as (image, store):
        os.makedirs(directory, exist_ok=True)
        if os.listdir(directory):
            raise UsageError(f"{directory} is not empty; export into an empty directory")
        with progress_bar("exporting") as progress:
            await Exporter(image, ImageReader(store, image), progress).run(directory)


@dataclass(slots=True)
class _Open:
    """A directory being filled."""

    fd: int
    path: bytes
    inode: Inode


class Exporter:
    """Writes one image below one directory."""

    def __init__(self, image: Image, reader: ImageReader, progress: Callable[[int, int], None]) -> None:
        self._image = image
        self._reader = reader
        self._progress = progress
        self._root = os.geteuid() == 0
        self._made: dict[int, tuple[bytes, ...]] = {}
        self._done = 0

    async def run(self, directory: str) -> None:
        """Write everything; directories get their metadata when they are complete."""
        top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        stack: list[_Open] = []
        try:
            for path, inode in self._image.bootstrap.walk():
                parent, _, name = path.rpartition(b"/")
                while stack and path and stack[-1].path != parent:
                    self._finish(stack.pop())
                if not path:
                    stack.append(_Open(os.dup(top), b"", inode))
                elif stat.S_ISDIR(inode.mode):
                    os.mkdir(name, 0o700, dir_fd=stack[-1].fd)
                    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=stack[-1].fd)
                    stack.append(_Open(fd, path, inode))
                else:
                    await self._write(top, stack[-1].fd, name, path, inode)
            while stack:
                self._finish(stack.pop())
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
        elif self._root or stat.S_ISFIFO(inode.mode):
            os.mknod(name, inode.mode & ~0o7777 | 0o600, inode.rdev, dir_fd=parent)
        else:
            return
        if inode.nlink > 1:
            self._made[inode.nid] = tuple(path.split(b"/"))
        self._set_metadata(parent, name, inode)

    async def _write_file(self, parent: int, name: bytes, inode: Inode) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=parent)
        try:
            holes = [(e.file_offset, e.length) for e in self._image.bootstrap.extents(inode.nid) if e.space is None]
            if holes and len(holes) == len(self._image.bootstrap.extents(inode.nid)):
                os.ftruncate(fd, inode.size)
                return
            position = 0
            async for part in self._reader.read_file(inode.nid):
                if not _in_hole(holes, position, len(part)):
                    await trio.to_thread.run_sync(_write_all, fd, part, position)
                position += len(part)
                self._done += len(part)
                self._progress(min(self._done, self._image.chunk_map.data_bytes), self._image.chunk_map.data_bytes)
            os.ftruncate(fd, inode.size)
        finally:
            os.close(fd)

    def _finish(self, opened: _Open) -> None:
        """Give a complete directory its metadata, through its own descriptor, and close it."""
        try:
            self._apply(f"/proc/self/fd/{opened.fd}".encode(), opened.inode, follow=True)
        finally:
            os.close(opened.fd)

    def _set_metadata(self, parent: int, name: bytes, inode: Inode) -> None:
        self._apply(f"/proc/self/fd/{parent}/".encode() + name, inode, follow=False)

    def _apply(self, path: bytes, inode: Inode, *, follow: bool) -> None:
        if self._root:
            os.chown(path, inode.uid, inode.gid, follow_symlinks=follow)
        for key, value in self._image.bootstrap.xattrs(inode.nid).items():
            with suppress(OSError):  # a file system or user that may not have this one
                os.setxattr(path, key, value, follow_symlinks=follow)
        if not stat.S_ISLNK(inode.mode):
            os.chmod(path, stat.S_IMODE(inode.mode))
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
