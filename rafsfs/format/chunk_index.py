"""EROFS chunk indexes: which device and block each piece of a regular file is in; erofs_fs.h, Linux 6.6.

Decided here: the chunk size of an inode and the widening of a sparse file's data ranges to it. One index per piece that
is contiguous in one data space: a 40 GiB file in 4 GiB data spaces has ten. Here "chunk" is EROFS's word for the range
that one index stands for; it has nothing to do with the chunks of a data space.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import FormatError, UnsupportedError
from ..types import BLOCK_SIZE, align_up

INDEX_SIZE: Final = 8
_INDEX = struct.Struct("<HHI")
_INDEXES: Final = 0x20
"""Chunk format bit 5: 8-byte indexes, the only form we use."""
_HOLE: Final = 0xFFFFFFFF
"""Block address of a hole."""
_BITS_MASK: Final = 0x1F
_MAX_BITS: Final = 31
MAX_INDEXES: Final = 1 << 22
"""32 MiB of indexes for one file, read or written: what a 16 TiB file in pieces of 4 MiB needs."""
SPARSE_INDEXES: Final = 1 << 16
"""Indexes that a sparse file may cost, 512 KiB: its holes are kept at the finest granularity that this allows."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of a file and where it is: `space` is the number of a data space, None for a hole. Bytes."""

    file_offset: int
    length: int
    space: int | None
    offset: int


def plan_data_ranges(size: int, ranges: Sequence[tuple[int, int]], space_bound: int) -> list[tuple[int, int]]:
    """Return the (offset, length) ranges of a sparse file to be stored, sorted, disjoint, inside [0, size).

    `ranges` are its data ranges as the source's file system reports them. They are widened to the finest power-of-two
    granularity at which the whole file needs at most 65,536 indexes, so small holes become stored zeros; granularity
    stops at `space_bound`, the bytes of a data space. A range longer than the bound is to be cut at multiples of the
    bound from its own start.
    """
    grain = BLOCK_SIZE
    while grain < space_bound and size > grain * SPARSE_INDEXES:
        grain *= 2
    widened: list[tuple[int, int]] = []
    for offset, length in sorted(ranges):
        if length <= 0 or offset >= size:
            continue
        start = max(offset, 0) & -grain
        end = min(align_up(offset + length, grain), size)
        if widened and start <= widened[-1][1]:
            widened[-1] = (widened[-1][0], max(widened[-1][1], end))
        else:
            widened.append((start, end))
    return [(start, end - start) for start, end in widened]


def chunk_bits_for(size: int, extents: Sequence[Extent]) -> int:
    """Return log2(bytes that one index stands for / 4096) for merged extents of a file of `size` bytes.

    It is the largest power of two at whose multiples all extents begin and end (but for an end at the end of the file),
    so that no index holds two extents or data and a hole; a file of one piece or none has one index. Raises FormatError
    for extents that meet between blocks.
    """
    edges = 0
    for extent in extents:
        edges |= extent.file_offset
        end = extent.file_offset + extent.length
        if end < size:
            edges |= end
    if edges % BLOCK_SIZE:
        raise FormatError("its pieces do not meet at multiples of 4096 bytes")
    bits = 0
    while bits < _MAX_BITS and (BLOCK_SIZE << bits) < size and not edges & (BLOCK_SIZE << bits):
        bits += 1
    return bits


def pack_indexes(size: int, extents: Sequence[Extent]) -> tuple[int, bytes]:
    """Return (i_u, index bytes) of a regular file. Raises FormatError for extents that EROFS cannot express.

    Extents are sorted, disjoint and inside [0, size); gaps and extents without a space are holes.
    """
    merged = _merge(size, extents)
    bits = chunk_bits_for(size, merged)
    grain = BLOCK_SIZE << bits
    count = (size + grain - 1) // grain
    if count > MAX_INDEXES:
        raise FormatError(
            f"it needs {count} chunk indexes of {grain} bytes each, limit {MAX_INDEXES}: its pieces should meet at "
            f"multiples of a larger power of two (choose one as the bound of data spaces)"
        )
    out = bytearray(_INDEX.pack(0, 0, _HOLE) * count)
    for extent in merged:
        assert extent.space is not None
        end = extent.file_offset + extent.length
        for position in range(extent.file_offset, end, grain):
            block = (extent.offset + position - extent.file_offset) // BLOCK_SIZE
            if block >= _HOLE or extent.space >= 0xFFFF:
                raise FormatError(f"data at block {block} of data space {extent.space}: EROFS addresses 32 and 16 bits")
            _INDEX.pack_into(out, position // grain * INDEX_SIZE, 0, extent.space + 1, block)
    return bits | _INDEXES, bytes(out)


def unpack_extents(
    indexes: memoryview, i_u: int, size: int, space_blocks: Sequence[int], first: int, stop: int
) -> list[Extent]:
    """Return the extents of bytes [first, stop) of a file of `size` bytes, holes included, clipped and merged.

    `indexes` is the file's whole array (`index_count` of them), `space_blocks` the size of each data space. Raises
    FormatError for an index that names no data space or leaves it.
    """
    grain = _grain(i_u)
    number = first // grain
    position = number * grain
    last_number = (stop + grain - 1) // grain
    found: list[Extent] = []
    start_of, length_of, space_of, offset_of = 0, 0, None, 0  # the extent that still grows
    for high, device, block in _INDEX.iter_unpack(indexes[number * INDEX_SIZE : last_number * INDEX_SIZE]):
        length = min(grain, size - position)
        space: int | None = None
        offset = 0
        if block != _HOLE:
            if high or not 0 < device <= len(space_blocks):
                raise FormatError(f"chunk index names device {device} of {len(space_blocks)}, high address {high}")
            if block + (length + BLOCK_SIZE - 1) // BLOCK_SIZE > space_blocks[device - 1]:
                raise FormatError(f"chunk index at block {block} leaves device {device}")
            space, offset = device - 1, block * BLOCK_SIZE
        if length_of and space == space_of and (space is None or offset == offset_of + length_of):
            length_of += length
        else:
            if length_of:
                found.append(Extent(start_of, length_of, space_of, offset_of))
            start_of, length_of, space_of, offset_of = position, length, space, offset
        position += length
    if length_of:
        found.append(Extent(start_of, length_of, space_of, offset_of))
    return [_clip(extent, first, stop) for extent in found]


def index_count(i_u: int, size: int) -> int:
    """Return how many indexes a file of `size` bytes has. Raises FormatError, UnsupportedError for its chunk format."""
    grain = _grain(i_u)
    count = (size + grain - 1) // grain
    if count > MAX_INDEXES:
        raise FormatError(f"a file of {size} bytes has {count} chunk indexes, limit {MAX_INDEXES}")
    return count


def stored_bytes(indexes: memoryview, i_u: int, size: int) -> int:
    """Return how many bytes of a file are no hole, in whole blocks. Does not look at where they are."""
    grain = _grain(i_u)
    words = array("I", bytes(indexes))
    if sys.byteorder == "big":
        words.byteswap()
    blocks = words[1::2]
    stored = grain * (len(blocks) - blocks.count(_HOLE))
    if blocks and blocks[-1] != _HOLE:
        stored -= len(blocks) * grain - align_up(size, BLOCK_SIZE)
    return stored


def _grain(i_u: int) -> int:
    chunk_format = i_u & 0xFFFF
    if not chunk_format & _INDEXES or chunk_format & ~(_INDEXES | _BITS_MASK):
        raise UnsupportedError(f"chunk format {chunk_format:#x} is not one that RAFS images use (0x20 to 0x3f)")
    return BLOCK_SIZE << (chunk_format & _BITS_MASK)


def _clip(extent: Extent, first: int, stop: int) -> Extent:
    before = max(0, first - extent.file_offset)
    after = max(0, extent.file_offset + extent.length - stop)
    if not before and not after:
        return extent
    offset = extent.offset + before if extent.space is not None else 0
    return Extent(extent.file_offset + before, extent.length - before - after, extent.space, offset)


def _merge(size: int, extents: Sequence[Extent]) -> list[Extent]:
    merged: list[Extent] = []
    position = 0
    for extent in extents:
        if extent.space is None:
            continue
        end = extent.file_offset + extent.length
        if extent.file_offset < position or extent.length <= 0 or end > size:
            raise FormatError(f"its piece [{extent.file_offset}, {end}) overlaps another or leaves the {size} bytes")
        position = end
        last = merged[-1] if merged else None
        if (
            last
            and last.space == extent.space
            and last.file_offset + last.length == extent.file_offset
            and last.offset + last.length == extent.offset
        ):
            merged[-1] = Extent(last.file_offset, last.length + extent.length, last.space, last.offset)
            continue
        if extent.offset % BLOCK_SIZE or extent.offset < 0:
            raise FormatError(f"its piece at {extent.offset} of data space {extent.space} is not aligned to 4096 bytes")
        merged.append(extent)
    return merged
