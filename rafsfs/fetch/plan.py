"""From missing chunks to ranged reads of blobs. Pure.

Rule: the reads cover exactly the stored bytes of the chunks asked for, plus gaps that are cheaper to read than to skip; none is
longer than `merge_bytes` unless one chunk is, none leaves its blob.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ..format.chunk_map import StoredChunk

GAP_BYTES: Final = 64 << 10
"""Unwanted bytes between two chunks that are read along: at 1 ms a request and 100 MB/s, a request costs 100 KB."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One missing chunk and where it is stored."""

    index: int
    stored: StoredChunk


@dataclass(frozen=True, slots=True)
class RangeRead:
    """One ranged read: bytes [offset, offset+length) of a blob, and the chunks in it in order of offset."""

    blob: int
    offset: int
    length: int
    chunks: tuple[Wanted, ...]


def plan_reads(wanted: Iterable[Wanted], merge_bytes: int, gap_bytes: int = GAP_BYTES) -> list[RangeRead]:
    """Return the reads for `wanted`, merged within each blob, in order of blob and offset."""
    reads: list[RangeRead] = []
    group: list[Wanted] = []
    start = end = 0
    for item in sorted(wanted, key=lambda item: (item.stored.blob, item.stored.offset)):
        stored = item.stored
        stop = stored.offset + stored.stored_size
        if (
            group
            and stored.blob == group[-1].stored.blob
            and stored.offset - end <= gap_bytes
            and max(stop, end) - start <= merge_bytes
        ):
            group.append(item)
            end = max(end, stop)
            continue
        if group:
            reads.append(RangeRead(group[0].stored.blob, start, end - start, tuple(group)))
        group, start, end = [item], stored.offset, stop
    if group:
        reads.append(RangeRead(group[0].stored.blob, start, end - start, tuple(group)))
    return reads
