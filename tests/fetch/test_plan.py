"""Merging missing chunks into ranged reads."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs.fetch.plan import RangeRead, Wanted, plan_reads
from rafsfs.format.chunk_map import StoredChunk

MERGE = 1000
GAP = 50


@st.composite
def wanted(draw: st.DrawFn) -> list[Wanted]:
    found = []
    for blob in range(draw(st.integers(1, 3))):
        position = 0
        for _ in range(draw(st.integers(0, 15))):
            position += draw(st.integers(0, 120))
            size = draw(st.integers(1, 1500))
            found.append(Wanted(len(found), StoredChunk(blob, position, size, 0, 0, size, bytes(32))))
            if draw(st.booleans()):
                position += size
    return draw(st.permutations(found))


def end(item: Wanted) -> int:
    return item.stored.offset + item.stored.stored_size


@settings(max_examples=200, deadline=None)
@given(wanted())
def test_reads_cover_exactly_the_chunks_within_the_bounds(items: list[Wanted]) -> None:
    reads = plan_reads(items, MERGE, GAP)
    assert sorted(item.index for read in reads for item in read.chunks) == sorted(item.index for item in items)
    for read in reads:
        assert all(item.stored.blob == read.blob for item in read.chunks)
        assert read.offset == min(item.stored.offset for item in read.chunks)
        assert read.offset + read.length == max(end(item) for item in read.chunks)
        assert (
            read.length <= MERGE
            or len({(item.stored.offset, item.stored.stored_size) for item in read.chunks}) == 1
            or one_is_large(read)
        )
        offsets = [item.stored.offset for item in read.chunks]
        assert offsets == sorted(offsets)


def one_is_large(read: RangeRead) -> bool:
    return any(item.stored.stored_size == read.length for item in read.chunks)


def test_adjacent_chunks_become_one_read_and_distant_ones_do_not() -> None:
    items = [
        Wanted(i, StoredChunk(0, offset, 100, 0, 0, 100, bytes(32))) for i, offset in enumerate([0, 100, 240, 800])
    ]
    assert [(read.offset, read.length) for read in plan_reads(items, MERGE, GAP)] == [(0, 340), (800, 100)]
