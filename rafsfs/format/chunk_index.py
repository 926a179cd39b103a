"""EROFS chunk indexes: which device and block each piece of a regular file is in; erofs_fs.h, Linux 6.6.

Decided here: the chunk size of an inode and the widening of a sparse file's data ranges to it. One index per piece that
is contiguous in one data space: a 40 GiB file in 4 GiB data spaces has ten.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import FormatError, UnsupportedError
from ..types import BLOCK_SIZE, align_up

INDEX_SIZE: Final = 8
_INDEX = struct.Struct("<HHI")
_INDEXES: Final = 0x20
"""Chunk format bit 5: 8-byte indexes, the only form we use."""
_NULL: Final = 0xFFFFFFFF
"""Block address of a hole."""
_MAX_BITS: Final = 31
MAX_INDEXES: Final = 1 << 24
"""128 MiB of indexes for one file: beyond that the data is too scattered."""
_SPARSE_INDEXES: Final = 1 << 16
"""Indexes that a sparse file may cost: its holes are kept at the granularity that this allows."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of a file and where it is: `space` is the number of a data space, None for a hole. Bytes."""

    file_offset: int
    length: int
    space: int | None
    offset: int


def plan_data_ranges(size: int, ranges: Sequence[tuple[int, int]], space_bound: int) -> list[tuple[int, int]]:
    """Return the (offset, length) ranges of a sparse file to be stored, sorted, disjoint, inside [0, size).

    `ranges` are its data ranges as the source's file system reports them. They are widened to a power-of-two granularity at
    which the whole file needs at most 65,536 indexes, so small holes become stored zeros. `space_bound`: bytes of a data space.
    """
    grain = BLOCK_SIZE
    while grain < space_bound and size > grain * _SPARSE_INDEXES:
        grain *= 2
    widened: list[tuple[int, int]] = []
    for offset, length in sorted(ranges):
        if length <= 0 or offset >= size:
            continue
        start = offset & -grain
        end = min(align_up(offset + length, grain), size)
        if widened and start <= widened[-1][1]:
            widened[-1] = (widened[-1][0], max(widened[-1][1], end))
        else:
            widened.append((start, end))
    return [(start, end - start) for start, end in widened]


def pack_indexes(size: int, extents: Sequence[Extent]) -> tuple[int, bytes]:
    """Return (i_u, index bytes) of a regular file. Raises FormatError for extents that EROFS cannot express.

    Extents are sorted, disjoint and inside [0, size); gaps are holes.
    """
    merged = _merge(size, extents)
    bits = _chunk_bits(size, merged)
    grain = BLOCK_SIZE << bits
    count = (size + grain - 1) // grain
    if count > MAX_INDEXES:
        raise FormatError(f"{count} chunk indexes for one file, limit {MAX_INDEXES}: its data is too scattered")
    out = bytearray(_INDEX.pack(0, 0, _NULL) * count)
    for extent in merged:
        assert extent.space is not None
        end = extent.file_offset + extent.length
        for position in range(extent.file_offset, end, grain):
            block = (extent.offset + position - extent.file_offset) // BLOCK_SIZE
            if block >= _NULL or extent.space >= 0xFFFF:
                raise FormatError(f"data at block {block} of data space {extent.space}: EROFS addresses 32 and 16 bits")
            _INDEX.pack_into(out, position // grain * INDEX_SIZE, 0, extent.space + 1, block)
    return bits | _INDEXES, bytes(out)


def unpack_indexes(buffer: memoryview, offset: int, size: int, i_u: int, spaces: int) -> list[Extent]:
    """Return the extents of a file of `size` bytes, holes included, covering [0, size). Raises FormatError."""
    chunk_format = i_u & 0xFFFF
    if not chunk_format & _INDEXES or chunk_format & ~(_INDEXES | _MAX_BITS):
        raise UnsupportedError(f"chunk format {chunk_format:#x} is not one that RAFS images use")
    grain = BLOCK_SIZE << (chunk_format & _MAX_BITS)
    count = (size + grain - 1) // grain
    if offset + count * INDEX_SIZE > len(buffer):
        raise FormatError(f"{count} chunk indexes at {offset} leave the bootstrap")
    found: list[Extent] = []
    position = 0
    for _, device, block in _INDEX.iter_unpack(buffer[offset : offset + count * INDEX_SIZE]):
        length = min(grain, size - position)
        space: int | None = None
        start = 0
        if block != _NULL:
            if not 0 < device <= spaces:
                raise FormatError(f"chunk index names device {device} of {spaces}")
            space, start = device - 1, block * BLOCK_SIZE
        last = found[-1] if found else None
        if last and last.space == space and (space is None or last.offset + last.length == start):
            found[-1] = Extent(last.file_offset, last.length + length, space, last.offset)
        else:
            found.append(Extent(position, length, space, start))
        position += length
    return found


def _merge(size: int, extents: Sequence[Extent]) -> list[Extent]:
    merged: list[Extent] = []
    position = 0
    for extent in extents:
        if extent.space is None:
            continue
        end = extent.file_offset + extent.length
        if extent.file_offset < position or extent.length <= 0 or end > size or extent.offset % BLOCK_SIZE:
            raise FormatError(f"file extent [{extent.file_offset}, {end}) overlaps, leaves the file or is not aligned")
        last = merged[-1] if merged else None
        if (
            last
            and last.space == extent.space
            and last.file_offset + last.length == extent.file_offset
            and last.offset + last.length == extent.offset
        ):
            merged[-1] = Extent(last.file_offset, last.length + extent.length, last.space, last.offset)
        else:
            merged.append(extent)
        position = end
    return merged


def _chunk_bits(size: int, merged: Sequence[Extent]) -> int:
    """Return log2(chunk size / 4096): the largest chunk of which none holds two extents or data and a hole."""
    edges = 0
    for extent in merged:
        edges |= extent.file_offset
        end = extent.file_offset + extent.length
        if end < size:
            edges |= end
    if edges % BLOCK_SIZE:
        raise FormatError("file extents do not meet at block boundaries")
    bits = 0
    while bits < _MAX_BITS and (BLOCK_SIZE << bits) < size and not edges & ((BLOCK_SIZE << (bits + 1)) - 1):
        bits += 1
    return bits
