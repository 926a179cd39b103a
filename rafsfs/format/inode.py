"""EROFS inodes: extended (64 bytes, the only form we write) and compact (32 bytes, read too); erofs_fs.h, Linux 6.6.

Decided here: i_format bits, field positions, device number coding. Rule: layouts that hold compressed data are refused.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from typing import Final

from ..errors import FormatError, UnsupportedError

SLOT: Final = 32
"""Inodes start at multiples of 32 bytes; nid = offset in the metadata area / 32."""
EXTENDED_SIZE: Final = 64
COMPACT_SIZE: Final = 32

LAYOUT_PLAIN: Final = 0
"""Data in whole blocks from block i_u on."""
LAYOUT_INLINE: Final = 2
"""As plain, but the part after the last whole block follows the inode, inside its block."""
LAYOUT_CHUNK: Final = 4
"""Chunk indexes follow the inode."""

_EXTENDED = struct.Struct("<HHHHQIIIIqII16x")
_COMPACT = struct.Struct("<HHHHIIIIHHI")
_TYPES: Final = frozenset(
    (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK)
)
_DEVICES: Final = frozenset((stat.S_IFCHR, stat.S_IFBLK))
_TYPE_MASK: Final = 0o170000
_FORMAT = struct.Struct("<H")
assert _EXTENDED.size == EXTENDED_SIZE
assert _COMPACT.size == COMPACT_SIZE


@dataclass(frozen=True, slots=True)
class Inode:
    """Metadata of one inode, decoded."""

    nid: int
    mode: int
    size: int
    uid: int
    gid: int
    mtime_ns: int
    nlink: int
    rdev: int
    """Device number as os.stat gives it; 0 unless a device."""
    layout: int
    i_u: int
    """Plain or inline: first data block. Chunk based: low 16 bits are the chunk format. Device: encoded number."""
    header_size: int
    """Bytes of the inode itself, 32 or 64."""
    xattr_size: int
    """Bytes of the xattr area that follows it."""


def encode_rdev(rdev: int) -> int:
    """Code a device number as the kernel's new_encode_dev does. Raises FormatError if it does not fit."""
    major, minor = os.major(rdev), os.minor(rdev)
    if major > 0xFFF or minor > 0xFFFFF:
        raise FormatError(f"device number {major}:{minor} does not fit EROFS (12 and 20 bits)")
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def decode_rdev(coded: int) -> int:
    """Undo encode_rdev."""
    return os.makedev((coded >> 8) & 0xFFF, (coded & 0xFF) | ((coded >> 12) & 0xFFF00))


def xattr_area_size(icount: int) -> int:
    """Return the bytes of the xattr area for an i_xattr_icount."""
    return 12 + 4 * (icount - 1) if icount else 0


def pack_inode(
    *,
    layout: int,
    xattr_size: int,
    mode: int,
    size: int,
    i_u: int,
    ino: int,
    uid: int,
    gid: int,
    mtime_ns: int,
    nlink: int,
) -> bytes:
    """Return an extended inode, 64 bytes. `xattr_size` is the area's size in bytes (0 or 12 + 4n)."""
    icount = (xattr_size - 12) // 4 + 1 if xattr_size else 0
    seconds, nanoseconds = divmod(mtime_ns, 1_000_000_000)
    i_format = 1 | (layout << 1)
    try:
        return _EXTENDED.pack(
            i_format, icount, mode, 0, size, i_u, ino & 0xFFFFFFFF, uid, gid, seconds, nanoseconds, nlink
        )
    except struct.error as error:
        raise FormatError(
            f"owner {uid}:{gid}, size {size}, time {mtime_ns} ns, {nlink} links or mode {mode:#o}: does not fit EROFS"
        ) from error


def unpack_inode(buffer: memoryview, offset: int, nid: int, epoch_ns: int = 0) -> Inode:
    """Decode the inode at `offset`. Raises FormatError, UnsupportedError.

    A compact inode has no time of its own but seconds since the superblock's, given as `epoch_ns`.
    """
    if offset < 0 or offset + COMPACT_SIZE > len(buffer):
        raise FormatError(f"inode {nid} lies outside the bootstrap")
    (i_format,) = _FORMAT.unpack_from(buffer, offset)
    layout = (i_format >> 1) & 7
    if i_format >> 4:
        raise UnsupportedError(f"inode {nid} has format {i_format:#x} with bits this program does not know")
    if layout not in {LAYOUT_PLAIN, LAYOUT_INLINE, LAYOUT_CHUNK}:
        raise UnsupportedError(f"inode {nid} has EROFS data layout {layout} (compressed), which RAFS images do not use")
    if i_format & 1:
        if offset + EXTENDED_SIZE > len(buffer):
            raise FormatError(f"inode {nid} lies outside the bootstrap")
        _, icount, mode, _, size, i_u, _, uid, gid, seconds, nanoseconds, nlink = _EXTENDED.unpack_from(buffer, offset)
        header = EXTENDED_SIZE
    else:
        _, icount, mode, nlink, size, since, i_u, _, uid, gid, _ = _COMPACT.unpack_from(buffer, offset)
        seconds, nanoseconds = divmod(epoch_ns, 1_000_000_000)
        seconds += since
        header = COMPACT_SIZE
    if size >= 1 << 63 or nanoseconds >= 1_000_000_000:
        raise FormatError(f"inode {nid} has size {size}, nanoseconds {nanoseconds}")
    kind = mode & _TYPE_MASK
    if kind not in _TYPES:
        raise FormatError(f"inode {nid} has mode {mode:#o}, which is no file type")
    rdev = decode_rdev(i_u) if kind in _DEVICES else 0
    mtime_ns = seconds * 1_000_000_000 + nanoseconds
    xattr_size = xattr_area_size(icount)
    return Inode(nid, mode, size, uid, gid, mtime_ns, nlink, rdev, layout, i_u, header, xattr_size)
