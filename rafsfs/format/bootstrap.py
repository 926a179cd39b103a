"""A read-only view over a whole bootstrap: inodes by number, directories, links, xattrs and file extents.

Decided here: how a path or an inode number becomes metadata and ranges of data spaces. Not here: bytes of structs
(their own modules) and where data comes from. Rules: every offset is checked before use, so any bytes give a value or a
FormatError in time and memory bounded by their own size; nothing is kept per inode; the FUSE worker imports this, so it
stays small.
Specification: docs/format/bootstrap.md.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap

from ..errors import FormatError
from ..types import BLOCK_SIZE, align_up
from . import dirent as dirents
from .chunk_index import INDEX_SIZE, Extent, index_count, stored_bytes, unpack_extents
from .inode import LAYOUT_CHUNK, LAYOUT_INLINE, SLOT, Inode, unpack_inode
from .superblock import DeviceSlot, Superblock
from .xattr import unpack_xattrs

__all__ = ["Bootstrap", "DeviceSlot", "DirEntry", "Extent", "Inode"]

_MAX_LINK = 4095
"""Longest symlink target: PATH_MAX less its NUL."""
_PATH_BYTES = 4 << 30
"""What the paths of one walk may add up to, besides 4096 bytes for each: 5,000 levels of 255-byte names stay below."""


@dataclass(frozen=True, slots=True)
class DirEntry:
    """One name in a directory."""

    nid: int
    name: bytes
    file_type: int
    """EROFS type code: 1 file, 2 directory, 3 char, 4 block, 5 fifo, 6 socket, 7 symlink."""
    position: int
    """Where it stands; `entries(nid, position + 1)` continues behind it."""


class Bootstrap:
    """The bootstrap in `buffer`, which must stay as it is for the life of this object.

    Raises FormatError or UnsupportedError from the constructor for a bad superblock, from each method for bad
    metadata that the method meets.
    """

    def __init__(self, buffer: bytes | bytearray | memoryview | mmap) -> None:
        whole = memoryview(buffer).cast("B")
        superblock = Superblock.unpack_from(whole)
        self._view = whole[: superblock.blocks * BLOCK_SIZE]
        self.spaces = superblock.read_slots(self._view)
        self._space_blocks = tuple(slot.blocks for slot in self.spaces)
        self.root_nid = superblock.root_nid
        self.inode_count = superblock.inos
        self.blocks = superblock.blocks
        self._meta = superblock.meta_blkaddr * BLOCK_SIZE
        self._nids = (len(self._view) - self._meta) // SLOT
        self._epoch_ns = superblock.epoch_ns
        if not stat.S_ISDIR(self.inode(self.root_nid).mode):
            raise FormatError("the root of the bootstrap is not a directory")

    @property
    def size(self) -> int:
        """Bytes of the bootstrap."""
        return len(self._view)

    def inode(self, nid: int) -> Inode:
        """Return the inode `nid`."""
        if not 0 <= nid < self._nids:
            raise FormatError(f"inode {nid} lies outside the bootstrap, which has room for {self._nids}")
        return unpack_inode(self._view, self._meta + nid * SLOT, nid, self._epoch_ns)

    def lookup(self, parent_nid: int, name: bytes) -> int | None:
        """Return the nid of `name` in a directory, None if it is not there. Halves over blocks, then inside one."""
        inode = self._directory(parent_nid)
        low, high = 0, (inode.size + BLOCK_SIZE - 1) // BLOCK_SIZE - 1
        if high < 0:
            return None
        while low < high:
            middle = (low + high + 1) // 2
            block = self._block(inode, middle)
            if dirents.read_name(block, 0, dirents.entry_count(block)) <= name:
                low = middle
            else:
                high = middle - 1
        nid = dirents.find_name(self._block(inode, low), name)
        if nid is not None and nid >= self._nids:
            raise FormatError(f"directory {parent_nid} has an entry for inode {nid}, outside the bootstrap")
        return nid

    def entries(self, nid: int, start: int = 0) -> Iterator[DirEntry]:
        """Yield the entries of a directory in byte order, "." and ".." included, from position `start` on."""
        inode = self._directory(nid)
        blocks = (inode.size + BLOCK_SIZE - 1) // BLOCK_SIZE
        number, skip = divmod(max(start, 0), dirents.SLOTS_PER_BLOCK)
        previous = b""
        while number < blocks:
            position = number * dirents.SLOTS_PER_BLOCK
            found = dirents.read_block(self._block(inode, number))
            if found[0][0] <= previous:
                raise FormatError(f"directory {nid} is out of order at block {number}")
            previous = found[-1][0]
            for index in range(skip, len(found)):
                name, child, kind = found[index]
                if child >= self._nids:
                    raise FormatError(f"directory {nid} has an entry for inode {child}, outside the bootstrap")
                yield DirEntry(child, name, kind, position + index)
            number, skip = number + 1, 0

    def parent(self, dir_nid: int) -> int:
        """Return the nid of the parent of a directory; the root is its own."""
        found = self.lookup(dir_nid, b"..")
        if found is None:
            raise FormatError(f"directory {dir_nid} has no entry for its parent")
        return found

    def readlink(self, nid: int) -> bytes:
        """Return the target of a symlink."""
        inode = self.inode(nid)
        if not stat.S_ISLNK(inode.mode):
            raise FormatError(f"inode {nid} is not a symlink")
        if not 0 < inode.size <= _MAX_LINK:
            raise FormatError(f"symlink {nid} has a target of {inode.size} bytes")
        target = bytes(self._flat(inode))
        if b"\0" in target:
            raise FormatError(f"symlink {nid} has a NUL in its target")
        return target

    def xattrs(self, nid: int) -> dict[bytes, bytes]:
        """Return the extended attributes of an inode, full names."""
        inode = self.inode(nid)
        if not inode.xattr_size:
            return {}
        return unpack_xattrs(self._slice(self._address(inode) + inode.header_size, inode.xattr_size, nid))

    def extents(self, nid: int, first: int = 0, stop: int | None = None) -> list[Extent]:
        """Return where bytes [first, stop) of a chunk-based regular file are; without them, all of it.

        Sorted, clipped, covering the range with its holes, merged where contiguous; [] for files that are not chunk
        based. The cost grows with the indexes in the range, one per contiguous piece as we write them.
        """
        inode = self.inode(nid)
        if not stat.S_ISREG(inode.mode) or inode.layout != LAYOUT_CHUNK:
            return []
        indexes = self._indexes(inode)
        stop = inode.size if stop is None else min(stop, inode.size)
        if not 0 <= first < stop:
            return []
        return unpack_extents(indexes, inode.i_u, inode.size, self._space_blocks, first, stop)

    def inline_data(self, nid: int) -> memoryview | None:
        """Return the whole content of a regular file that the bootstrap holds, None if data spaces hold it."""
        inode = self.inode(nid)
        if not stat.S_ISREG(inode.mode):
            raise FormatError(f"inode {nid} is not a regular file")
        return None if inode.layout == LAYOUT_CHUNK else self._flat(inode)

    def allocated_bytes(self, nid: int) -> int:
        """Return the bytes that `du` should count for an inode: data in whole blocks, holes left out."""
        inode = self.inode(nid)
        if stat.S_ISREG(inode.mode) and inode.layout == LAYOUT_CHUNK:
            return stored_bytes(self._indexes(inode), inode.i_u, inode.size)
        if stat.S_ISREG(inode.mode) or stat.S_ISDIR(inode.mode):
            return align_up(inode.size, BLOCK_SIZE)
        return 0

    def walk(self, nid: int | None = None) -> Iterator[tuple[bytes, Inode]]:
        """Yield (path, inode) depth first, directories before their entries, in byte order; b"" is the start.

        Raises FormatError if a directory is met twice, so a loop ends, and if directories add up to more than the
        bootstrap or paths to more than any real tree has, so that the work is bounded by its size.
        """
        start = self.root_nid if nid is None else nid
        root = self.inode(start)
        yield b"", root
        if not stat.S_ISDIR(root.mode):
            return
        seen = {start}
        directory_bytes = root.size
        path_bytes = 0
        stack = [(b"", self.entries(start))]
        while stack:
            path, entries = stack[-1]
            entry = next(entries, None)
            if entry is None:
                stack.pop()
                continue
            if entry.name in {b".", b".."}:
                continue
            inode = self.inode(entry.nid)
            path_bytes += max(0, len(path) - BLOCK_SIZE)
            if path_bytes > _PATH_BYTES:
                raise FormatError(f"paths below inode {start} add up to more than {_PATH_BYTES} bytes")
            child = path + b"/" + entry.name if path else entry.name
            yield child, inode
            if stat.S_ISDIR(inode.mode):
                directory_bytes += inode.size
                if entry.nid in seen or directory_bytes > len(self._view):
                    raise FormatError(f"directory {entry.nid} is reached twice or overlaps others, at {child[:200]!r}")
                seen.add(entry.nid)
                stack.append((child, self.entries(entry.nid)))

    def resolve(self, path: bytes) -> int | None:
        """Return the nid at `path` below the root, None if there is none. Symlinks are not followed."""
        nid = self.root_nid
        for name in path.split(b"/"):
            if name in {b"", b"."}:
                continue
            if not stat.S_ISDIR(self.inode(nid).mode):
                return None
            found = self.lookup(nid, name)
            if found is None:
                return None
            nid = found
        return nid

    def _address(self, inode: Inode) -> int:
        return self._meta + inode.nid * SLOT

    def _directory(self, nid: int) -> Inode:
        inode = self.inode(nid)
        if not stat.S_ISDIR(inode.mode):
            raise FormatError(f"inode {nid} is not a directory")
        if inode.layout == LAYOUT_CHUNK or inode.size > len(self._view):
            raise FormatError(f"directory {nid} has layout {inode.layout}, size {inode.size}")
        return inode

    def _block(self, inode: Inode, number: int) -> bytes:
        """Return block `number` of a directory, the last one cut to the size."""
        start = number * BLOCK_SIZE
        length = min(BLOCK_SIZE, inode.size - start)
        if inode.layout == LAYOUT_INLINE and start + length == inode.size:
            return bytes(self._tail(inode, length))
        return bytes(self._slice(inode.i_u * BLOCK_SIZE + start, length, inode.nid))

    def _flat(self, inode: Inode) -> memoryview:
        """Return all data of a flat inode; a copy only when whole blocks and a tail lie apart."""
        if inode.layout == LAYOUT_CHUNK or inode.size > len(self._view):
            raise FormatError(f"inode {inode.nid} has layout {inode.layout}, size {inode.size}, no flat data")
        if not inode.size:
            return memoryview(b"")
        if inode.layout != LAYOUT_INLINE:
            return self._slice(inode.i_u * BLOCK_SIZE, inode.size, inode.nid)
        whole = (inode.size - 1) & -BLOCK_SIZE  # as the kernel has it, the tail is 1 to 4096 bytes
        tail = self._tail(inode, inode.size - whole)
        if not whole:
            return tail
        return memoryview(bytes(self._slice(inode.i_u * BLOCK_SIZE, whole, inode.nid)) + tail)

    def _indexes(self, inode: Inode) -> memoryview:
        """Return the chunk indexes of a chunk-based file."""
        start = align_up(self._address(inode) + inode.header_size + inode.xattr_size, INDEX_SIZE)
        return self._slice(start, index_count(inode.i_u, inode.size) * INDEX_SIZE, inode.nid)

    def _tail(self, inode: Inode, length: int) -> memoryview:
        start = self._address(inode) + inode.header_size + inode.xattr_size
        if start % BLOCK_SIZE + length > BLOCK_SIZE:
            raise FormatError(f"inline data of inode {inode.nid} crosses a block")
        return self._slice(start, length, inode.nid)

    def _slice(self, start: int, length: int, nid: int) -> memoryview:
        if start < 0 or start + length > len(self._view):
            raise FormatError(f"data of inode {nid} at [{start}, {start + length}) leaves the bootstrap")
        return self._view[start : start + length]
