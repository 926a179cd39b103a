"""EROFS directory blocks: 12-byte records, then the names; erofs_fs.h, Linux 6.6.

Decided here: packing in unsigned byte order and reading back. Rule: order is load-bearing, since kernel and reader search
by halving; "." and ".." stand at their sorted place. A name is checked before anybody sees it.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable, Mapping
from typing import Final

from ..errors import FormatError
from ..types import BLOCK_SIZE

DIRENT_SIZE: Final = 12
MAX_NAME: Final = 255
SLOTS_PER_BLOCK: Final = BLOCK_SIZE // DIRENT_SIZE
"""341: an upper bound, so that block number * 341 + index numbers entries uniquely."""

_DIRENT = struct.Struct("<QHBB")
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
    except KeyError:
        raise FormatError(f"mode {mode:#o} is no file type") from None


def check_name(name: bytes) -> None:
    """Raise FormatError unless `name` can stand in a directory."""
    if not 0 < len(name) <= MAX_NAME or b"/" in name or b"\0" in name:
        raise FormatError(f"name {name[:64]!r} of {len(name)} bytes cannot stand in a directory")


def split_blocks(names: Iterable[bytes]) -> list[list[bytes]]:
    """Share sorted names out over directory blocks, in order, each as full as it goes."""
    blocks: list[list[bytes]] = []
    used = BLOCK_SIZE + 1
    for name in names:
        need = DIRENT_SIZE + len(name)
        if used + need > BLOCK_SIZE:
            blocks.append([])
            used = 0
        blocks[-1].append(name)
        used += need
    return blocks


def directory_size(blocks: list[list[bytes]]) -> int:
    """Return i_size of a directory: whole blocks, and exactly what is used of the last."""
    last = sum(DIRENT_SIZE + len(name) for name in blocks[-1])
    return BLOCK_SIZE * (len(blocks) - 1) + last


def pack_block(names: list[bytes], entries: Mapping[bytes, tuple[int, int]]) -> bytes:
    """Return one directory block, not padded. `entries` maps a name to (nid, type code)."""
    offset = DIRENT_SIZE * len(names)
    records = bytearray()
    for name in names:
        nid, kind = entries[name]
        records += _DIRENT.pack(nid, offset, kind, 0)
        offset += len(name)
    return bytes(records) + b"".join(names)


def read_block(block: memoryview) -> list[tuple[int, bytes, int]]:
    """Return (nid, name, type code) of each entry of a block. Raises FormatError."""
    count = entry_count(block)
    found = []
    for index in range(count):
        found.append(read_entry(block, index, count))
    return found


def entry_count(block: memoryview) -> int:
    """Return how many entries a block has."""
    if len(block) < DIRENT_SIZE:
        raise FormatError(f"directory block of {len(block)} bytes")
    _, first, _, _ = _DIRENT.unpack_from(block, 0)
    if first % DIRENT_SIZE or not DIRENT_SIZE <= first < len(block):
        raise FormatError(f"directory block says its names begin at {first}")
    return int(first // DIRENT_SIZE)


def read_entry(block: memoryview, index: int, count: int) -> tuple[int, bytes, int]:
    """Return (nid, name, type code) of entry `index` of a block of `count`. Raises FormatError."""
    nid, start, kind, _ = _DIRENT.unpack_from(block, DIRENT_SIZE * index)
    if index + 1 < count:
        _, end, _, _ = _DIRENT.unpack_from(block, DIRENT_SIZE * (index + 1))
    else:
        end = len(block)
    if not DIRENT_SIZE * count <= start < end <= len(block):
        raise FormatError(f"directory entry {index} has its name at [{start}, {end})")
    name = bytes(block[start:end])
    if index + 1 == count:
        name = name.split(b"\0", 1)[0]  # the last name of a padded block ends at the first NUL
    check_name(name)
    return nid, name, kind
