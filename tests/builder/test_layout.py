"""Layout: files into data spaces, chunks in one order."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from builder.cut import cut_fixed
from builder.layout import chunks_of_space, interleave, plan_layout

BOUND = 1 << 16
sizes = st.lists(st.integers(1, 5 * BOUND), max_size=30)


@settings(max_examples=150, deadline=None)
@given(sizes)
def test_every_byte_has_one_aligned_place_inside_the_bound(lengths: list[int]) -> None:
    spaces, extents = plan_layout([[(0, length)] for length in lengths], {}, BOUND)
    taken: dict[int, list[tuple[int, int]]] = {}
    for length, found in zip(lengths, extents, strict=True):
        position = 0
        for extent in found:
            assert extent.space is not None
            assert extent.file_offset == position
            assert extent.offset % 4096 == 0
            assert extent.offset + extent.length <= spaces[extent.space].size <= BOUND
            taken.setdefault(extent.space, []).append((extent.offset, extent.offset + extent.length))
            position += extent.length
        assert position == length
    for ranges in taken.values():
        ranges.sort()
        assert all(left[1] <= right[0] for left, right in pairwise(ranges))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9 * BOUND))
def test_a_file_has_one_extent_per_data_space_it_runs_through(length: int) -> None:
    _, extents = plan_layout([[(0, 100)], [(0, length)]], {}, BOUND)
    assert len(extents[1]) <= -(-length // BOUND)
    assert all(extent.length == BOUND for extent in extents[1][:-1])


def test_copies_share_their_place() -> None:
    spaces, extents = plan_layout([[(0, 5000)], [(0, 6000)], [(0, 5000)]], {2: 0}, BOUND)
    assert extents[2] == extents[0]
    assert len(spaces) == 1
    assert len(spaces[0].pieces) == 2


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(1, 5))
def test_interleaving_keeps_each_space_in_order_and_marks_its_last_chunk(lengths: list[int], width: int) -> None:
    spaces, _ = plan_layout([[(0, length)] for length in lengths], {}, BOUND)
    cutter = cut_fixed(4096)
    streams = [chunks_of_space(number, space, lambda _: cutter) for number, space in enumerate(spaces)]
    seen: dict[int, list[int]] = {}
    ended: set[int] = set()
    opened: set[int] = set()
    for chunk, last in interleave(streams, width):
        assert chunk.space not in ended
        opened.add(chunk.space)
        assert len(opened - ended) <= width
        seen.setdefault(chunk.space, []).append(chunk.offset)
        if last:
            ended.add(chunk.space)
    assert ended == set(range(len(spaces)))
    for number, space in enumerate(spaces):
        assert seen[number] == sorted(seen[number])
        assert sum(piece.length for piece in space.pieces) > 0
