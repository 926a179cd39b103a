"""Base spaces and delta records: round trips, the rules a reader checks, hostile bytes."""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs.errors import FormatError, RafsError
from rafsfs.format.chunk_map import MAX_DELTA_DEPTH, ChunkMap
from rafsfs.format.chunk_map_builder import ChunkMapBuilder
from rafsfs.format.codec import CODEC_RAW, CODEC_XOR, CODEC_ZSTD
from rafsfs.format.space_table import SpaceTable, pack_record
from rafsfs.types import Digest

LENGTH = 4000


def base_table(count: int, mark: int = 200) -> SpaceTable:
    records = b"".join(pack_record(bytes([mark, i]) * 16, i * 4096, LENGTH) for i in range(count))
    return SpaceTable(records, count * 4096)


def chain(depth: int) -> bytes:
    """Return a map with one chunk of its own and `depth` bases, one through the other."""
    builder = ChunkMapBuilder()
    own = builder.add_space(4096)
    blob = builder.add_blob(Digest.of(b"blob"), 1 << 20)
    base = builder.add_base_space(base_table(depth))
    builder.add_chunk(own, 0, LENGTH, bytes(32), blob, 0, 100, CODEC_XOR, 2, (base, 0))
    for index in range(depth):
        last = index == depth - 1
        builder.store_base_chunk(
            base,
            index,
            blob,
            100 * index,
            100,
            CODEC_ZSTD if last else CODEC_XOR,
            0 if last else 2,
            None if last else (base, index + 1),
        )
    return builder.to_bytes()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.data())
def test_deltas_come_back_as_they_were_put(spaces: int, chunks: int, data: st.DataObject) -> None:
    builder = ChunkMapBuilder()
    for _ in range(spaces):
        builder.add_space(chunks * 4096)
    blob = builder.add_blob(Digest.of(b"blob"), 1 << 20)
    tables = [base_table(data.draw(st.integers(1, 9)), 200 + mark) for mark in range(data.draw(st.integers(1, 3)))]
    bases = [builder.add_base_space(table) for table in tables]
    expected = {}
    used = set()
    for index in range(chunks):
        for space in data.draw(st.permutations(range(spaces))):
            which = data.draw(st.none() | st.integers(0, len(bases) - 1))
            base = None
            if which is not None:
                base = (bases[which], data.draw(st.integers(0, tables[which].count - 1)))
                used.add(base)
            codec = CODEC_RAW if base is None else CODEC_XOR
            size = LENGTH if base is None else 50
            builder.add_chunk(space, index * 4096, LENGTH, bytes(32), blob, index, size, codec, 2, base)
            expected[space, index] = base
    for space, index in used:
        builder.store_base_chunk(space, index, blob, 7, LENGTH, CODEC_RAW, 0)
    chunk_map = ChunkMap(builder.to_bytes())
    chunk_map.validate()
    assert len(chunk_map.spaces) == spaces
    assert len(chunk_map.all_spaces) == spaces + len(tables)
    assert chunk_map.chunk_count == spaces * chunks
    assert chunk_map.data_bytes == spaces * chunks * LENGTH
    for (space, index), base in expected.items():
        assert chunk_map.stored(space, index).base == base
    for number, table in zip(bases, tables, strict=True):
        assert chunk_map.table(number).space_id == table.space_id
        for index in range(table.count):
            assert chunk_map.is_stored(number, index) == ((number, index) in used)
            if (number, index) not in used:
                with pytest.raises(FormatError):
                    chunk_map.stored(number, index)


@pytest.mark.parametrize("depth", range(1, MAX_DELTA_DEPTH + 1))
def test_a_chain_within_the_limit_is_taken(depth: int) -> None:
    ChunkMap(chain(depth)).validate()


@pytest.mark.parametrize("depth", [MAX_DELTA_DEPTH + 1, 40])
def test_a_longer_chain_is_refused(depth: int) -> None:
    with pytest.raises(FormatError, match="bases"):
        ChunkMap(chain(depth)).validate()


def rewritten(deltas: list[tuple[int, int]]) -> ChunkMap:
    """Return the chain of two bases with other delta records; chunk 0 is a delta on 1, chunk 1 on 2."""
    data = bytearray(chain(2))
    assert ChunkMap(bytes(data)).delta_count == 2
    at = len(data) - 16
    for index, record in enumerate(deltas):
        struct.pack_into("<II", data, at + 8 * index, *record)
    return ChunkMap(bytes(data))


@pytest.mark.parametrize(
    "deltas",
    [
        [(0, 0), (1, 2)],  # its own base
        [(0, 1), (1, 0)],  # a cycle
        [(0, 1), (1, 1)],
        [(0, 1), (0, 2)],  # one chunk twice, another never
        [(1, 2), (0, 1)],  # not sorted
        [(0, 1), (2, 1)],  # names a chunk that is no difference
        [(0, 3), (1, 2)],  # no such chunk
        [(0, 0xFFFFFFFF), (1, 2)],
    ],
)
def test_delta_records_that_lie_are_refused(deltas: list[tuple[int, int]]) -> None:
    with pytest.raises(FormatError):
        rewritten(deltas).validate()


def test_a_base_of_another_length_or_stored_nowhere_is_refused() -> None:
    for stored, length in ((False, LENGTH), (True, LENGTH - 1)):
        builder = ChunkMapBuilder()
        own = builder.add_space(4096)
        blob = builder.add_blob(Digest.of(b"blob"), 1 << 20)
        base = builder.add_base_space(SpaceTable(pack_record(bytes(32), 0, length), 4096))
        builder.add_chunk(own, 0, LENGTH, bytes(32), blob, 0, 100, CODEC_XOR, 2, (base, 0))
        if stored:
            builder.store_base_chunk(base, 0, blob, 0, 100, CODEC_ZSTD, 0)
        with pytest.raises(FormatError):
            ChunkMap(builder.to_bytes()).validate()


def test_a_chunk_of_the_image_itself_must_be_stored() -> None:
    data = bytearray(chain(1))
    struct.pack_into("<I", data, 80, 0)  # the base space becomes one of the image's own, its chunk is stored
    ChunkMap(bytes(data)).validate()
    builder = ChunkMapBuilder()
    builder.add_base_space(base_table(3))
    data = bytearray(builder.to_bytes())
    struct.pack_into("<I", data, 80, 0)
    with pytest.raises(FormatError):
        ChunkMap(bytes(data)).validate()


def test_counts_that_the_feature_bit_forbids_are_refused() -> None:
    data = bytearray(chain(1))
    struct.pack_into("<I", data, 16, 0)
    with pytest.raises(FormatError):
        ChunkMap(bytes(data))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(chain(3)) - 1), st.integers(1, 255))
def test_a_changed_byte_gives_a_map_or_an_error_of_ours(position: int, change: int) -> None:
    data = bytearray(chain(3))
    data[position] ^= change
    with contextlib.suppress(RafsError):
        chunk_map = ChunkMap(bytes(data))
        with contextlib.suppress(RafsError):
            for space in chunk_map.all_spaces:
                for index in range(min(space.count, 10)):
                    with contextlib.suppress(RafsError):
                        chunk_map.stored(space.index, index)
        chunk_map.validate()
        base_of: dict[int, int] = dict(chunk_map.deltas().tolist())
        for base in base_of.values():
            steps, below = 1, base
            while below in base_of:
                below = base_of[below]
                steps += 1
            assert steps <= MAX_DELTA_DEPTH


def test_numpy_views_are_what_the_records_say() -> None:
    chunk_map = ChunkMap(chain(2))
    assert chunk_map.storage()["codec"].tolist() == [CODEC_XOR, CODEC_XOR, CODEC_ZSTD]
    assert chunk_map.lengths().tolist() == [LENGTH] * 3
    assert np.array_equal(chunk_map.deltas(), [[0, 1], [1, 2]])
