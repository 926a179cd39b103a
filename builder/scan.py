"""Walking the source: every file, directory and special file with all its metadata, in byte order of names.

Decided here: what a source tree contains, which small files go into the bootstrap, where sparse files have data. Not here: where
data goes (layout.py). Rules: nothing is followed (no symlink, no mount is treated specially); the order depends on names alone;
what cannot be read is an error that names the path, never left out in silence.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from dataclasses import dataclass, field

from rafsfs.errors import SourceError
from rafsfs.format.bootstrap_writer import Node, inline_capacity
from rafsfs.format.chunk_index import plan_data_ranges
from rafsfs.format.xattr import can_store

from .exclude import Exclude

_log = logging.getLogger("rafsfs.builder")


@dataclass(frozen=True, slots=True)
class Signature:
    """What tells that a file is still the one that was scanned."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


def signature_of(status: os.stat_result) -> Signature:
    """Return the signature of a file's status."""
    return Signature(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(slots=True, eq=False)
class SourceFile:
    """A regular file whose content goes to a data space."""

    path: bytes
    """Absolute or relative to the working directory, as it is opened."""
    name: bytes
    """Relative to the source, for messages and the journal."""
    node: Node
    signature: Signature
    ranges: list[tuple[int, int]]
    """(offset, length) of what is stored, sorted; the rest is holes."""

    @property
    def size(self) -> int:
        """Bytes of the file, holes included."""
        return self.signature.size


@dataclass(slots=True)
class Scan:
    """A scanned source."""

    root: Node
    files: list[SourceFile] = field(default_factory=list)
    """Files with content in data spaces, in scan order, each inode once."""
    file_count: int = 0
    """Regular files, each inode once."""
    input_bytes: int = 0
    """Sum of their sizes."""
    has_xattrs: bool = False
    """Whether anything has extended attributes that are stored."""


def scan(source: str | bytes, exclude: Exclude, space_bound: int) -> Scan:
    """Walk `source`, a directory or a single regular file. Raises SourceError. Blocking."""
    top = os.fsencode(source)
    try:
        status = os.stat(top)
    except OSError as error:
        raise SourceError(f"{_show(top)}: {error.strerror}") from error
    walker = _Walker(exclude, space_bound)
    if stat.S_ISDIR(status.st_mode):
        root = walker.make_node(top, status)
        walker.result = Scan(root)
        walker.walk(top, root)
    elif stat.S_ISREG(status.st_mode):
        mode = stat.S_IFDIR | 0o755
        root = Node(mode, uid=status.st_uid, gid=status.st_gid, mtime_ns=status.st_mtime_ns)
        walker.result = Scan(root)
        name = os.path.basename(os.path.realpath(top))
        root.children[name] = walker.add(os.path.realpath(top), name)
    else:
        raise SourceError(f"{_show(top)} is neither a directory nor a regular file")
    walker.result.has_xattrs = walker.has_xattrs
    return walker.result


class _Walker:
    def __init__(self, exclude: Exclude, space_bound: int) -> None:
        self._exclude = exclude
        self._space_bound = space_bound
        self._links: dict[tuple[int, int], Node] = {}
        self._skipped_xattrs: set[bytes] = set()
        self.has_xattrs = False
        self.result = Scan(Node(stat.S_IFDIR))

    def walk(self, top: bytes, root: Node) -> None:
        """Add everything below `top`, depth first in byte order, without recursion."""
        stack = [(top, b"", root, iter(_names(top)))]
        while stack:
            path, relative, node, names = stack[-1]
            name = next(names, None)
            if name is None:
                stack.pop()
                continue
            child_path = os.path.join(path, name)
            child_relative = relative + b"/" + name if relative else name
            is_dir = stat.S_ISDIR(_lstat(child_path).st_mode)
            if self._exclude.matches(child_relative, is_dir=is_dir):
                continue
            child = self.add(child_path, child_relative)
            node.children[name] = child
            if stat.S_ISDIR(child.mode):
                stack.append((child_path, child_relative, child, iter(_names(child_path))))

    def add(self, path: bytes, relative: bytes) -> Node:
        """Return the node of one path; a further name of a file that is known is the same node."""
        status = _lstat(path)
        key = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            known = self._links.get(key)
            if known is not None:
                return known
        node = self.make_node(path, status)
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            self._links[key] = node
        if stat.S_ISREG(status.st_mode):
            self._add_file(path, relative, node, status)
        elif stat.S_ISLNK(status.st_mode):
            try:
                node.target = os.readlink(path)
            except OSError as error:
                raise _vanished(path, error) from error
        return node

    def make_node(self, path: bytes, status: os.stat_result) -> Node:
        """Return a node with the metadata of a path."""
        xattrs = self._xattrs(path)
        self.has_xattrs = self.has_xattrs or bool(xattrs)
        return Node(
            status.st_mode,
            uid=status.st_uid,
            gid=status.st_gid,
            mtime_ns=status.st_mtime_ns,
            rdev=status.st_rdev if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode) else 0,
            xattrs=xattrs,
        )

    def _add_file(self, path: bytes, relative: bytes, node: Node, status: os.stat_result) -> None:
        self.result.file_count += 1
        self.result.input_bytes += status.st_size
        if status.st_size <= inline_capacity(node.xattrs):
            node.inline = _read_small(path, status)
            return
        node.size = status.st_size
        ranges = [(0, status.st_size)]
        if status.st_blocks * 512 < status.st_size:
            ranges = plan_data_ranges(status.st_size, _data_ranges(path, status.st_size), self._space_bound)
        if ranges:
            self.result.files.append(SourceFile(path, relative, node, signature_of(status), ranges))

    def _xattrs(self, path: bytes) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        try:
            for name in os.listxattr(path, follow_symlinks=False):
                raw = os.fsencode(name)
                if can_store(raw):
                    found[raw] = os.getxattr(path, name, follow_symlinks=False)
                elif raw not in self._skipped_xattrs:
                    self._skipped_xattrs.add(raw)
                    _log.warning("xattr %s cannot be stored and is left out, first at %s", name, _show(path))
        except OSError as error:
            if error.errno not in {errno.ENOTSUP, errno.ENODATA, errno.EPERM, errno.EACCES}:
                raise _vanished(path, error) from error
        return found


def _names(path: bytes) -> list[bytes]:
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise _vanished(path, error) from error


def _lstat(path: bytes) -> os.stat_result:
    try:
        return os.lstat(path)
    except OSError as error:
        raise _vanished(path, error) from error


def _read_small(path: bytes, status: os.stat_result) -> bytes:
    """Return the content of a file that goes into the bootstrap, checked to be what was scanned."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            data = os.read(descriptor, status.st_size + 1)
            after = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _vanished(path, error) from error
    if len(data) != status.st_size or signature_of(after) != signature_of(status):
        raise changed(path)
    return data


def _data_ranges(path: bytes, size: int) -> list[tuple[int, int]]:
    """Return where a sparse file has data, as its file system tells."""
    ranges = []
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            position = 0
            while position < size:
                try:
                    start = os.lseek(descriptor, position, os.SEEK_DATA)
                except OSError as error:
                    if error.errno == errno.ENXIO:
                        break
                    raise
                position = os.lseek(descriptor, start, os.SEEK_HOLE)
                ranges.append((start, position - start))
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return [(0, size)]
        raise _vanished(path, error) from error
    return ranges


def changed(path: bytes) -> SourceError:
    """Return the error for a file that is not what it was when it was scanned."""
    return SourceError(f"{_show(path)} changed while it was read; build again when nothing writes to it")


def _vanished(path: bytes, error: OSError) -> SourceError:
    if error.errno in {errno.ENOENT, errno.ELOOP, errno.ENOTDIR}:
        return SourceError(f"{_show(path)} vanished while it was read; build again when nothing changes the source")
    return SourceError(f"{_show(path)} cannot be read: {error.strerror}")


def read_error(path: bytes, error: OSError) -> SourceError:
    """Return the error for a failed read of a source file."""
    return _vanished(path, error)


def _show(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")
