"""Checking a whole bootstrap, as fsck does: every inode, directory entry, link and extent.

Decided here: what a sound bootstrap is beyond what a reader must refuse: nothing overlaps, everything is reached once,
counts and types agree. Rule: the work is linear in the size of the bootstrap whatever its bytes are, because nothing is
looked into that overlaps what was seen before. Specification: docs/format/bootstrap.md.
"""

from __future__ import annotations

import itertools
import stat
from array import array
from collections import deque
from collections.abc import Iterator
from mmap import mmap
from typing import Final

from ..errors import FormatError
from ..types import BLOCK_SIZE, align_up
from .bootstrap import Bootstrap, DirEntry, Inode
from .chunk_index import INDEX_SIZE, index_count
from .dirent import file_type
from .inode import LAYOUT_CHUNK, LAYOUT_INLINE, SLOT
from .superblock import SLOT_SIZE, SUPER_OFFSET, SUPER_SIZE, Superblock

_SHOWN: Final = 200
"""Characters of a path shown in a finding."""


def check_bootstrap(buffer: bytes | bytearray | memoryview | mmap, max_findings: int = 100) -> Iterator[str]:
    """Yield what is wrong with the bootstrap in `buffer`, a line each; nothing if it is sound.

    Never raises FormatError. Stops with a last line after `max_findings`.
    """
    findings = _findings(buffer)
    yield from itertools.islice(findings, max_findings)
    if next(findings, None) is not None:
        yield f"more than {max_findings} findings; the rest is not shown"


def _findings(buffer: bytes | bytearray | memoryview | mmap) -> Iterator[str]:
    try:
        check = _Check(buffer)
    except FormatError as error:
        yield str(error)
        return
    yield from check.devices()
    yield from check.tree()
    yield from check.links()


class _Check:
    def __init__(self, buffer: bytes | bytearray | memoryview | mmap) -> None:
        self._bootstrap = Bootstrap(buffer)
        superblock = Superblock.unpack_from(memoryview(buffer).cast("B"))
        self._meta = superblock.meta_blkaddr * BLOCK_SIZE
        self._taken = bytearray(superblock.blocks * BLOCK_SIZE // SLOT)
        """1 for each 32 bytes of the bootstrap that something was found in."""
        self._take(SUPER_OFFSET, SUPER_SIZE)
        if superblock.extra_devices:
            self._take(superblock.devt_slotoff * SLOT_SIZE, superblock.extra_devices * SLOT_SIZE)
        self._names = array("I", bytes(4 * len(self._taken)))
        """Per nid, how many directory entries name it, "." and ".." apart."""
        self._directories: dict[int, tuple[int, bytes]] = {}
        """Per directory found, its parent and its name there."""

    def devices(self) -> Iterator[str]:
        """Check the device slots."""
        for index, slot in enumerate(self._bootstrap.spaces):
            try:
                _ = slot.space_id
            except FormatError as error:
                yield f"device {index + 1}: {error}"

    def tree(self) -> Iterator[str]:
        """Check every inode that can be reached, breadth first."""
        root = self._bootstrap.root_nid
        self._directories[root] = (root, b"")
        yield from self._inode(self._bootstrap.inode(root))
        queue = deque([root])
        while queue:
            nid = queue.popleft()
            try:
                yield from self._directory(nid, queue)
            except FormatError as error:
                yield f"{self._path(nid)}: {error}"

    def links(self) -> Iterator[str]:
        """Compare link counts with the names found, and the number of inodes with the superblock's."""
        found = 1
        for nid, names in enumerate(self._names):
            if not names or nid == self._bootstrap.root_nid:
                continue
            found += 1
            if nid in self._directories:
                continue
            try:
                inode = self._bootstrap.inode(nid)
            except FormatError:
                continue  # told where its name was found
            if not stat.S_ISDIR(inode.mode) and inode.nlink != names:
                yield f"inode {nid} has link count {inode.nlink}, {names} names lead to it"
        if found != self._bootstrap.inode_count:
            yield f"the superblock counts {self._bootstrap.inode_count} inodes, {found} were found"

    def _directory(self, nid: int, queue: deque[int]) -> Iterator[str]:
        inode = self._bootstrap.inode(nid)
        parent = self._directories[nid][0]
        expected = {b".": nid, b"..": parent}
        subdirectories = 0
        for entry in self._bootstrap.entries(nid):
            if entry.name in expected:
                if entry.nid != expected.pop(entry.name) or entry.file_type != file_type(stat.S_IFDIR):
                    yield f"{self._path(nid)}: {entry.name!r} leads to inode {entry.nid}, type {entry.file_type}"
                continue
            try:
                child = self._bootstrap.inode(entry.nid)
            except FormatError as error:
                yield f"{self._path(nid, entry.name)}: {error}"
                continue
            subdirectories += stat.S_ISDIR(child.mode)
            yield from self._entry(nid, entry, child, queue)
        if expected:
            yield f"{self._path(nid)}: has no entry {' and '.join(map(repr, sorted(expected)))}"
        if inode.nlink != 2 + subdirectories:
            yield f"{self._path(nid)}: has link count {inode.nlink}, expected {2 + subdirectories}"

    def _entry(self, nid: int, entry: DirEntry, child: Inode, queue: deque[int]) -> Iterator[str]:
        is_first = not self._names[entry.nid]
        self._names[entry.nid] += 1
        if entry.file_type != file_type(child.mode):
            yield f"{self._path(nid, entry.name)}: entry has type {entry.file_type}, inode mode {child.mode:#o}"
        if not stat.S_ISDIR(child.mode):
            if is_first:
                for finding in self._inode(child):
                    yield f"{self._path(nid, entry.name)}: {finding}"
            return
        if entry.nid in self._directories:
            yield f"{self._path(nid, entry.name)}: directory {entry.nid} has a second name"
            return
        self._directories[entry.nid] = (nid, entry.name)
        sound = True
        for finding in self._inode(child):
            yield f"{self._path(entry.nid)}: {finding}"
            sound = False
        if sound:
            queue.append(entry.nid)

    def _inode(self, inode: Inode) -> Iterator[str]:
        """Check one inode by itself; yield what is wrong without its path."""
        bootstrap, nid = self._bootstrap, inode.nid
        try:
            if not self._take_inode(inode):
                yield f"inode {nid} overlaps something else or leaves the bootstrap"
                return
            if inode.xattr_size:
                bootstrap.xattrs(nid)
            if stat.S_ISREG(inode.mode):
                if inode.layout == LAYOUT_CHUNK:
                    bootstrap.extents(nid)
                else:
                    bootstrap.inline_data(nid)
            elif stat.S_ISLNK(inode.mode):
                bootstrap.readlink(nid)
            elif not stat.S_ISDIR(inode.mode) and inode.size:
                yield f"inode {nid} of mode {inode.mode:#o} has size {inode.size}"
        except FormatError as error:
            yield str(error)

    def _take_inode(self, inode: Inode) -> bool:
        """Mark all that an inode uses; False if any of it was used before or lies outside."""
        start = self._meta + inode.nid * SLOT
        fixed = inode.header_size + inode.xattr_size
        if inode.layout == LAYOUT_CHUNK:
            count = index_count(inode.i_u, inode.size) if stat.S_ISREG(inode.mode) else 0
            return self._take(start, align_up(fixed, INDEX_SIZE) + count * INDEX_SIZE)
        if stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode) or not inode.size:
            return self._take(start, fixed)
        whole = inode.size
        if inode.layout == LAYOUT_INLINE:
            whole = (inode.size - 1) & -BLOCK_SIZE
            fixed += inode.size - whole
        return self._take(start, fixed) and (not whole or self._take(inode.i_u * BLOCK_SIZE, whole))

    def _take(self, start: int, length: int) -> bool:
        first, stop = start // SLOT, (start + length + SLOT - 1) // SLOT
        if stop > len(self._taken) or self._taken.find(1, first, stop) >= 0:
            return False
        self._taken[first:stop] = b"\1" * (stop - first)
        return True

    def _path(self, nid: int, name: bytes = b"") -> str:
        """Return the path of directory `nid`, or of `name` in it, for a finding."""
        names = [name] if name else []
        length = len(name)
        while nid != self._bootstrap.root_nid and length < _SHOWN:
            nid, name = self._directories[nid]
            names.append(name)
            length += len(name) + 1
        return b"/".join(reversed(names)).decode("utf-8", "backslashreplace")[-_SHOWN:] or "/"
