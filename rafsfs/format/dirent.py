"""EROFS directory blocks: 12-byte records, then the names; erofs_fs.h, Linux 6.6.

Decided here: packing in unsigned byte order and reading back. Rule: order is load-bearing, since kernel and reader
search by halving; "." and ".." stand at their sorted place. A name is checked before anybody sees it.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Sequence
from typing import Final

from ..errors import FormatError
from ..types import BLOCK_SIZE

DIRENT_SIZE: Final = 12
MAX_NAME: Final = 255
SLOTS_PER_BLOCK: Final = BLOCK_SIZE // DIRENT_SIZE
"""341: an upper bound, so that block number * 341 + index numbers entries uniquely."""
MAX_TYPE: Final = 7

_DIRENT = struct.Struct("<QHBB")
_NAMEOFF = struct.Struct("<H")
_NAMEOFF_AT: Final = 8
assert _DIRENT.size == DIRENT_SIZE

_TYPES: Final = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}


def file_type(mode: int) -> int:
    """Return the directory entry type code of a mode. Raises FormatError for a mode that is no file type."""
    try:
        return _TYPES[stat.S_IFMT(mode)]
    except (KeyError, OverflowError):
        raise FormatError(f"mode {mode:#o} is no file type") from None


def check_name(name: bytes) -> None:
    """Raise FormatError unless `name` can stand in a directory."""
    if not 0 < len(name) <= MAX_NAME or b"/" in name or b"\0" in name:
        raise FormatError(f"name {name[:64]!r} of {len(name)} bytes cannot stand in a directory")


def split_blocks(names: Sequence[bytes]) -> list[int]:
    """Share sorted names out over directory blocks, in order, each as full as it goes.

    Return where each block begins in `names`, and at last len(names).
    """
    bounds = []
    used = BLOCK_SIZE
    for index, name in enumerate(names):
        used += DIRENT_SIZE + len(name)
        if used > BLOCK_SIZE:
            bounds.append(index)
            used = DIRENT_SIZE + len(name)
    bounds.append(len(names))
    return bounds


def directory_size(names: Sequence[bytes], bounds: Sequence[int]) -> int:
    """Return i_size of a directory: whole blocks, and exactly what is used of the last."""
    last = sum(DIRENT_SIZE + len(name) for name in names[bounds[-2] :])
    return BLOCK_SIZE * (len(bounds) - 2) + last


def pack_block(entries: Sequence[tuple[bytes, int, int]]) -> bytes:
    """Return one directory block, not padded, of sorted (name, nid, type code)."""
    offset = DIRENT_SIZE * len(entries)
    parts = []
    for name, nid, kind in entries:
        parts.append(_DIRENT.pack(nid, offset, kind, 0))
        offset += len(name)
    parts.extend(name for name, _, _ in entries)
    return b"".join(parts)


def read_block(block: bytes) -> list[tuple[bytes, int, int]]:
    """Return (name, nid, type code) of each entry of a block, sorted. Raises FormatError."""
    count = entry_count(block)
    names_at = DIRENT_SIZE * count
    records = list(_DIRENT.iter_unpack(block[:names_at]))
    end_of_names = block.find(b"\0", records[-1][1])  # the last name of a padded block ends at the first NUL
    if end_of_names < 0:
        end_of_names = len(block)
    starts = [start for _, start, _, _ in records]
    ends = starts[1:]
    ends.append(end_of_names)
    found: list[tuple[bytes, int, int]] = []
    previous = b""
    for (nid, start, kind, _), end in zip(records, ends, strict=True):
        name = block[start:end]
        if not (names_at <= start < end <= start + MAX_NAME and name > previous and kind <= MAX_TYPE):
            raise FormatError(
                f"directory entry {len(found)} of {count} has type {kind}, its name at [{start}, {end}): "
                f"{name[:64]!r} after {previous[:64]!r}, which is out of order or bounds"
            )
        found.append((name, nid, kind))
        previous = name
    names = block[names_at:end_of_names]
    if b"/" in names or b"\0" in names:
        raise FormatError("a directory block has a name with a slash or NUL")
    return found


def entry_count(block: bytes) -> int:
    """Return how many entries a block has, at least 1. Raises FormatError."""
    if len(block) < DIRENT_SIZE:
        raise FormatError(f"directory block of {len(block)} bytes, too short for an entry")
    (first,) = _NAMEOFF.unpack_from(block, _NAMEOFF_AT)
    if first % DIRENT_SIZE or not DIRENT_SIZE <= first < len(block):
        raise FormatError(f"directory block says its names begin at {first}")
    return int(first // DIRENT_SIZE)


def read_name(block: bytes, index: int, count: int) -> bytes:
    """Return the name of entry `index` of a block of `count`. Raises FormatError."""
    at = DIRENT_SIZE * index + _NAMEOFF_AT
    (start,) = _NAMEOFF.unpack_from(block, at)
    if index + 1 < count:
        (end,) = _NAMEOFF.unpack_from(block, at + DIRENT_SIZE)
    else:
        end = block.find(b"\0", start)
        if end < 0:
            end = len(block)
    if not DIRENT_SIZE * count <= start < end <= start + MAX_NAME or end > len(block):
        raise FormatError(f"directory entry {index} of {count} has its name at [{start}, {end})")
    return block[start:end]


def find_name(block: bytes, name: bytes) -> int | None:
    """Return the nid of `name` in a block, None if it is not there, by halving. Raises FormatError."""
    count = entry_count(block)
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        found = read_name(block, middle, count)
        if found < name:
            low = middle + 1
        elif found > name:
            high = middle
        else:
            nid, _, _, _ = _DIRENT.unpack_from(block, DIRENT_SIZE * middle)
            return int(nid)
    return None
