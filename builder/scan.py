"""Walking the source: every file, directory and special file with all its metadata, in byte order of names.

Decided here: what a source tree contains, which small files go into the bootstrap, where sparse files have data. Not here: where
data goes (layout.py). Rules: nothing is followed (no symlink below the source; mounts are not told from directories); the order depends
on names alone; what cannot be read is an error that names the path, never left out in silence.

One directory is open at a time and its entries are named relative to it: neither the depth of a tree nor the length of its paths has
a bound. Memory: about 1 KB per file, and the content of files that go into the bootstrap.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from dataclasses import dataclass, field
from typing import Final

from rafsfs.errors import SourceError
from rafsfs.format.bootstrap_writer import Node, inline_capacity
from rafsfs.format.chunk_index import plan_data_ranges
from rafsfs.format.xattr import can_store
from rafsfs.patterns import Patterns

from .source_file import SourceFile, changed, open_path, read_error, show, signature_of

_log = logging.getLogger("rafsfs.builder")

_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY
_LONGEST: Final = 4095
"""Bytes of a path that a system call without a directory descriptor takes."""


@dataclass(slots=True)
class Scan:
    """A scanned source."""

    root: Node
    top: bytes
    """Directory that the paths of the files begin with."""
    files: list[SourceFile] = field(default_factory=list)
    """Files with content in data spaces, in scan order, each inode once."""
    file_count: int = 0
    """Regular files, each inode once."""
    input_bytes: int = 0
    """Sum of their sizes."""
    has_xattrs: bool = False
    """Whether anything has extended attributes that are stored."""

    def relative(self, file: SourceFile) -> str:
        """Return the path of a file below the top, what is not UTF-8 escaped as the interpreter does."""
        return os.fsdecode(file.path[len(self.top) :].lstrip(b"/"))


@dataclass(frozen=True, slots=True)
class _Directory:
    """A directory yet to be read."""

    path: bytes
    relative: bytes
    node: Node
    identity: tuple[int, int]
    above: _Directory | None


def scan(source: str | bytes, exclude: Patterns, space_bound: int) -> Scan:
    """Walk `source`, a directory or a single regular file; a symlink to one is followed, and keeps its own name.

    Raises SourceError. Blocking; changes nothing, so a thread that runs it can be abandoned.
    """
    top = os.path.abspath(os.fsencode(source))
    try:
        real = os.path.realpath(top, strict=True)
        status = os.lstat(real)
    except OSError as error:
        raise SourceError(f"{show(top)} cannot be read: {error.strerror}") from error
    walker = _Walker(exclude, space_bound)
    if stat.S_ISDIR(status.st_mode):
        return walker.walk(real, status)
    if stat.S_ISREG(status.st_mode):
        return walker.wrap(real, os.path.basename(top), status)
    raise SourceError(f"{show(top)} is neither a directory nor a regular file")


class _Walker:
    def __init__(self, exclude: Patterns, space_bound: int) -> None:
        self._exclude = exclude
        self._space_bound = space_bound
        self._links: dict[tuple[int, int], Node] = {}
        self._seen: set[tuple[int, int]] = set()
        self._skipped_xattrs: set[bytes] = set()
        self._sources: dict[Node, SourceFile] = {}
        self._file_count = 0
        self._input_bytes = 0
        self._has_xattrs = False

    def walk(self, top: bytes, status: os.stat_result) -> Scan:
        """Return the tree below directory `top`."""
        root = _node(status)
        waiting = [_Directory(top, b"", root, (status.st_dev, status.st_ino), None)]
        while waiting:
            waiting += reversed(self._read(waiting.pop()))
        return self._result(root, top)

    def wrap(self, path: bytes, name: bytes, status: os.stat_result) -> Scan:
        """Return a directory with one file in it, called `name`."""
        root = Node(stat.S_IFDIR | 0o755, uid=status.st_uid, gid=status.st_gid, mtime_ns=status.st_mtime_ns)
        parent = open_path(os.path.dirname(path), _DIRECTORY)
        try:
            root.children[name] = self._entry(parent, path, os.path.basename(path), status)
        finally:
            os.close(parent)
        return self._result(root, os.path.dirname(path))

    def _result(self, root: Node, top: bytes) -> Scan:
        """Return the scan, its files in the order in which a walk in byte order, depth first, meets them."""
        result = Scan(
            root, top, file_count=self._file_count, input_bytes=self._input_bytes, has_xattrs=self._has_xattrs
        )
        waiting = [root]
        while waiting:
            node = waiting.pop()
            source = self._sources.pop(node, None)
            if source is not None:
                result.files.append(source)
            waiting += reversed(node.children.values())  # they were added in byte order
        return result

    def _read(self, directory: _Directory) -> list[_Directory]:
        """Add the entries of a directory to its node; return those that are directories themselves."""
        self._refuse_loop(directory)
        path = directory.path
        try:
            parent = open_path(path, _DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise read_error(path, error) from error
        try:
            opened = os.fstat(parent)
            if (opened.st_dev, opened.st_ino) != directory.identity:
                raise changed(path)
            try:
                directory.node.xattrs = self._xattrs(parent, path)
                names = sorted(map(os.fsencode, os.listdir(parent)))
            except OSError as error:
                raise read_error(path, error) from error
            return [
                below for name in names if (below := self._add(parent, directory, name)) is not None
            ]  # fmt: skip
        finally:
            os.close(parent)

    def _add(self, parent: int, directory: _Directory, name: bytes) -> _Directory | None:
        """Add one entry; return it if it is a directory to be read."""
        path = os.path.join(directory.path, name)
        relative = directory.relative + b"/" + name if directory.relative else name
        try:
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except OSError as error:
            raise read_error(path, error) from error
        is_dir = stat.S_ISDIR(status.st_mode)
        if self._exclude.matches(relative, is_dir=is_dir):
            return None
        if is_dir:
            node = directory.node.children[name] = _node(status)
            return _Directory(path, relative, node, (status.st_dev, status.st_ino), directory)
        directory.node.children[name] = self._entry(parent, path, name, status)
        return None

    def _entry(self, parent: int, path: bytes, name: bytes, status: os.stat_result) -> Node:
        """Return the node of what is no directory; a further name of a file that is known is the same node."""
        key = (status.st_dev, status.st_ino)
        if status.st_nlink > 1:
            known = self._links.get(key)
            if known is not None:
                return known
        node = _node(status)
        try:
            node.xattrs = self._xattrs(_reachable(parent, path, name), path)
            if stat.S_ISREG(status.st_mode):
                self._fill_file(parent, path, name, node, status)
            elif stat.S_ISLNK(status.st_mode):
                node.target = os.readlink(name, dir_fd=parent)
        except OSError as error:
            raise read_error(path, error) from error
        if status.st_nlink > 1:
            self._links[key] = node
        return node

    def _fill_file(self, parent: int, path: bytes, name: bytes, node: Node, status: os.stat_result) -> None:
        self._file_count += 1
        self._input_bytes += status.st_size
        inline = status.st_size <= inline_capacity(node.xattrs)
        if inline and not status.st_size:
            node.inline = b""
            return
        node.size = status.st_size
        ranges = [(0, status.st_size)]
        if inline or status.st_blocks * 512 < status.st_size:
            descriptor = os.open(name, _FILE, dir_fd=parent)
            try:
                if inline:
                    data = os.read(descriptor, status.st_size + 1)
                else:
                    found = _data_ranges(descriptor, status.st_size)
                after = os.fstat(descriptor)
            finally:
                os.close(descriptor)
            if signature_of(after) != signature_of(status):
                raise changed(path)
            if inline:
                if len(data) != status.st_size:
                    raise changed(path)
                node.inline, node.size = data, 0
                return
            ranges = plan_data_ranges(status.st_size, found, self._space_bound)
        if ranges:
            self._sources[node] = SourceFile(path, node, signature_of(status), ranges)

    def _xattrs(self, target: int | bytes, path: bytes) -> dict[bytes, bytes]:
        """Return the xattrs of an open directory or of a path. Raises OSError, SourceError."""
        try:
            names = os.listxattr(target) if isinstance(target, int) else os.listxattr(target, follow_symlinks=False)
        except OSError as error:
            if error.errno == errno.ENOTSUP:
                return {}
            raise
        found: dict[bytes, bytes] = {}
        for name in names:
            raw = os.fsencode(name)
            if can_store(raw):
                try:
                    found[raw] = (
                        os.getxattr(target, name)
                        if isinstance(target, int)
                        else os.getxattr(target, name, follow_symlinks=False)
                    )
                except OSError as error:
                    if error.errno == errno.ENODATA:
                        raise changed(path) from error
                    reason = f"xattr {name}: {error.strerror}"
                    raise read_error(path, OSError(error.errno, reason)) from error
            elif raw not in self._skipped_xattrs:
                self._skipped_xattrs.add(raw)
                _log.warning("xattr %s cannot be stored and is left out, first at %s", name, show(path))
        self._has_xattrs = self._has_xattrs or bool(found)
        return found

    def _refuse_loop(self, directory: _Directory) -> None:
        """Raise SourceError for a directory that is one of those above it, as a bind mount or a broken file system can make it."""
        if directory.identity not in self._seen:
            self._seen.add(directory.identity)
            return
        above = directory.above
        while above is not None:
            if above.identity == directory.identity:
                raise SourceError(
                    f"{show(directory.path)} is {show(above.path)} once more: the source holds itself; "
                    "unmount it or leave it out with --exclude"
                )
            above = above.above


def _node(status: os.stat_result) -> Node:
    """Return a node with the metadata that stat tells."""
    return Node(
        status.st_mode,
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        rdev=status.st_rdev if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode) else 0,
    )


def _reachable(parent: int, path: bytes, name: bytes) -> bytes:
    """Return a path by which calls that take no directory descriptor reach an entry, however long its own is."""
    return path if len(path) <= _LONGEST else b"/proc/self/fd/%d/%s" % (parent, name)


def _data_ranges(descriptor: int, size: int) -> list[tuple[int, int]]:
    """Return where a sparse file has data, as its file system tells. Raises OSError."""
    ranges = []
    position = 0
    while position < size:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
            position = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break  # a hole to the end
            if error.errno in {errno.EINVAL, errno.ENOTSUP}:
                return [(0, size)]
            raise
        ranges.append((start, position - start))
    return ranges
