"""Cuts: every byte once, in order, within bounds; along tensors; by content; golden boundaries."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.cut import PACK, Cut, Cutter, cdc_sizes, cut_by_content, cut_fixed, cut_tensors, is_compressed
from rafsfs.weights.tensor import Tensor

CHUNK = 1 << 20


def check(cuts: Iterator[Cut], start: int, stop: int, chunk_size: int) -> list[Cut]:
    found = list(cuts)
    position = start
    for cut in found:
        assert cut.offset == position
        assert 0 < cut.length <= chunk_size
        position += cut.length
    assert position == stop
    return found


@st.composite
def tensor_files(draw: st.DrawFn) -> tuple[list[Tensor], int]:
    position = draw(st.integers(0, 300_000))
    tensors = []
    for number in range(draw(st.integers(0, 12))):
        length = draw(st.one_of(st.integers(1, 200_000), st.integers(1, 4 * CHUNK), st.just(PACK)))
        dtype = draw(st.sampled_from(["F32", "BF16", "I8", "Q4_0", "X9"]))
        tensors.append(Tensor(f"t{number}", dtype, (length,), position, length))
        position += length + draw(st.sampled_from([0, 0, 0, 7, 100_000]))
    return tensors, position + draw(st.sampled_from([0, 0, 50, 2_000_000])) + (1 if not tensors else 0)


@settings(max_examples=200, deadline=None)
@given(tensor_files(), st.data())
def test_tensor_cuts_cover_any_range_once_and_follow_the_tensors(
    made: tuple[list[Tensor], int], data: st.DataObject
) -> None:
    tensors, size = made
    chunk_size = data.draw(st.sampled_from([64 << 10, 1 << 20, 4 << 20]))
    start = data.draw(st.sampled_from([0, 0, size // 3]))
    stop = data.draw(st.sampled_from([size, size, (start + size) // 2 + 1]))
    cuts = check(cut_tensors(tensors, chunk_size)(start, stop), start, stop, chunk_size)
    begins = {cut.offset for cut in cuts}
    for tensor in tensors:
        if tensor.length < PACK or tensor.offset < start or tensor.stop > stop:
            continue
        # A large tensor is cut from its own start, whatever is around it, and shares no chunk.
        for position in range(tensor.offset, tensor.stop, chunk_size):
            assert position in begins
        assert tensor.stop in begins or tensor.stop == stop
        for cut in cuts:
            if tensor.offset <= cut.offset < tensor.stop:
                assert cut.tensor == tensor
                assert cut.width == tensor.width
                assert (cut.offset - tensor.offset) % chunk_size == 0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5_000_000), st.integers(1, 5_000_000), st.sampled_from([64 << 10, 1 << 20]))
def test_fixed_cuts_cover_once(start: int, length: int, chunk_size: int) -> None:
    cuts = check(cut_fixed(chunk_size)(start, start + length), start, start + length, chunk_size)
    assert all(cut.offset % chunk_size == 0 for cut in cuts[1:])


@functools.cache
def content(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def by_content(data: bytes, chunk_size: int = CHUNK) -> Cutter:
    return cut_by_content(lambda offset, length: data[offset : offset + length], chunk_size)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 12_000_000), st.integers(1, 12_000_000), st.sampled_from([64 << 10, 1 << 20]))
def test_cuts_by_content_cover_once_within_their_bounds(start: int, length: int, chunk_size: int) -> None:
    data = content(24 << 20)
    low, _, high = cdc_sizes(chunk_size)
    cuts = check(by_content(data, chunk_size)(start, start + length), start, start + length, high)
    assert all(cut.length >= low for cut in cuts[:-1])


def test_cuts_by_content_do_not_depend_on_the_window() -> None:
    """Cut boundaries across a window's end are those of one long look."""
    from pyfastcdc import FastCDC  # noqa: PLC0415

    data = content(40 << 20)
    low, mean, high = cdc_sizes(CHUNK)
    whole = FastCDC(avg_size=mean, min_size=low, max_size=high, normalized_chunking=1, seed=0).cut_buf(data)
    assert [cut.length for cut in by_content(data)(0, len(data))] == [chunk.length for chunk in whole]


def test_golden_boundaries() -> None:
    """These decide which chunks of images built years apart are equal: a change breaks dedup, not reading."""
    data = content(4 << 20, seed=2026)
    assert [cut.offset for cut in by_content(data)(0, len(data))] == GOLDEN_1M
    assert [cut.offset for cut in by_content(data, 64 << 10)(0, 400_000)] == GOLDEN_64K


GOLDEN_1M = [0, 374564, 723670, 873887, 1559645, 1735176, 2066615, 2378671, 2886682, 3030071, 3439984, 3788384]
GOLDEN_64K = [
    0,
    26539,
    46630,
    54618,
    88505,
    133048,
    153758,
    180005,
    206326,
    228173,
    257019,
    298537,
    364073,
    374564,
    383127,
]


def test_an_insertion_changes_the_chunks_around_it_only() -> None:
    data = content(16 << 20)
    other = data[:5_000_000] + b"inserted" + data[5_000_000:]
    before = {data[c.offset : c.offset + c.length] for c in by_content(data)(0, len(data))}
    after = [other[c.offset : c.offset + c.length] for c in by_content(other)(0, len(other))]
    assert sum(len(piece) for piece in after if piece not in before) < 2 * CHUNK


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"\x1f\x8b\x08", True),
        (b"\x89PNG\r\n\x1a\n", True),
        (b"\0\0\0\x20ftypisom", True),
        (b"RIFF\0\0\0\0WEBPVP8 ", True),
        (b"RIFF\0\0\0\0WAVEfmt ", False),
        (b"PK\x03\x04", False),
        (b"", False),
    ],
)
def test_formats_that_are_rewritten_as_a_whole(head: bytes, expected: bool) -> None:
    assert is_compressed(head) == expected


def test_a_file_that_shrinks_while_it_is_cut_is_left_to_its_reader() -> None:
    cuts = check(by_content(b"")(0, 3 << 20), 0, 3 << 20, CHUNK)
    assert len(cuts) == 3
