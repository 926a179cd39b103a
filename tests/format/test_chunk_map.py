"""Content tables and chunk maps: round trips, bounds, hostile bytes, golden file."""

from __future__ import annotations

import random
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs.errors import FormatError, UnsupportedError
from rafsfs.format.chunk_map import HEADER_SIZE, ChunkMap
from rafsfs.format.chunk_map_builder import ChunkMapBuilder
from rafsfs.format.codec import CODEC_RAW, CODEC_ZSTD
from rafsfs.format.space_table import MAX_CHUNK, SpaceTable, pack_record
from rafsfs.types import Digest

GOLDEN = Path(__file__).resolve().parents[2] / "fixtures" / "chunks" / "chunk-map-v1.bin"


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int]:
    extents = []
    position = 0
    for _ in range(draw(st.integers(0, 20))):
        position += draw(st.integers(0, 5000))
        length = draw(st.integers(1, 5000))
        extents.append((position, length))
        position += length
    return extents, (position + 4095) // 4096 * 4096


def table_of(extents: list[tuple[int, int]], size: int) -> SpaceTable:
    return SpaceTable(b"".join(pack_record(bytes([i]) * 32, *extent) for i, extent in enumerate(extents)), size)


@settings(max_examples=200, deadline=None)
@given(tables(), st.integers(0, 200_000), st.integers(1, 20_000))
def test_covering_is_what_a_linear_search_finds(
    made: tuple[list[tuple[int, int]], int], offset: int, length: int
) -> None:
    extents, size = made
    table = table_of(extents, size)
    table.validate()
    wanted = [i for i, (start, count) in enumerate(extents) if start < offset + length and offset < start + count]
    assert list(table.covering(offset, length)) == wanted
    assert [table.extent(i) for i in range(table.count)] == extents


@settings(max_examples=100, deadline=None)
@given(tables())
def test_the_space_id_names_content_and_size(made: tuple[list[tuple[int, int]], int]) -> None:
    extents, size = made
    assert table_of(extents, size).space_id == table_of(extents, size).space_id
    assert table_of(extents, size).space_id != table_of(extents, size + 4096).space_id
    if extents:
        assert table_of(extents, size).space_id != table_of(extents[:-1], size).space_id


@pytest.mark.parametrize(
    "extents",
    [[(0, 0)], [(0, MAX_CHUNK + 1)], [(0, 10), (9, 10)], [(20, 10), (0, 10)], [(4090, 10)], [((1 << 64) - 1, 10)]],
)
def test_bad_tables_are_refused(extents: list[tuple[int, int]]) -> None:
    with pytest.raises(FormatError):
        table_of(extents, 4096).validate()


def make_map(spaces: int = 3, chunks: int = 10, blobs: int = 2) -> ChunkMapBuilder:
    builder = ChunkMapBuilder()
    numbers = [builder.reserve_blob() for _ in range(blobs + 1)]  # the last stays unused
    for number in range(spaces):
        builder.add_space(chunks * 4096)
        for index in range(chunks):
            seed = number * chunks + index
            digest = random.Random(seed).randbytes(32)
            codec = CODEC_ZSTD if index % 2 else CODEC_RAW
            stored = 4000 if codec == CODEC_RAW else 1234
            builder.add_chunk(number, index * 4096, 4000, digest, numbers[seed % blobs], seed * 4000, stored, codec, 0)
    for number in numbers[:blobs]:
        builder.set_blob(number, Digest.of(str(number).encode()), spaces * chunks * 4000)
    return builder


def test_round_trip() -> None:
    chunk_map = ChunkMap(make_map().to_bytes())
    chunk_map.validate()
    assert [(space.size, space.first, space.count) for space in chunk_map.spaces] == [
        (40960, 10 * i, 10) for i in range(3)
    ]
    assert chunk_map.chunk_count == 30
    assert chunk_map.data_bytes == 30 * 4000
    assert len(chunk_map.blobs) == 2
    stored = chunk_map.stored(2, 3)
    assert (stored.blob, stored.offset, stored.stored_size, stored.codec) == (1, 23 * 4000, 1234, CODEC_ZSTD)
    assert stored.digest == random.Random(23).randbytes(32) == chunk_map.table(2).digest(3)


def test_equal_blobs_become_one_and_unused_ones_vanish() -> None:
    builder = ChunkMapBuilder()
    builder.add_space(8192)
    first, unused, second = (builder.reserve_blob() for _ in range(3))
    del unused
    builder.add_chunk(0, 0, 10, bytes(32), first, 0, 10, CODEC_RAW, 0)
    builder.add_chunk(0, 4096, 10, bytes(32), second, 10, 10, CODEC_RAW, 0)
    for number in (first, second):
        builder.set_blob(number, Digest.of(b"same"), 20)
    chunk_map = ChunkMap(builder.to_bytes())
    chunk_map.validate()
    assert len(chunk_map.blobs) == 1
    assert (chunk_map.stored(0, 0).blob, chunk_map.stored(0, 1).blob) == (0, 0)


def test_golden_file() -> None:
    assert make_map().to_bytes() == GOLDEN.read_bytes()


@pytest.mark.parametrize(
    ("offset", "value", "error"), [(0, b"X", FormatError), (8, b"\2", UnsupportedError), (16, b"\2", UnsupportedError)]
)
def test_other_magic_version_and_features_are_refused(offset: int, value: bytes, error: type[Exception]) -> None:
    data = bytearray(make_map().to_bytes())
    data[offset : offset + len(value)] = value
    with pytest.raises(error):
        ChunkMap(data)


def test_unknown_compatible_features_are_ignored() -> None:
    data = bytearray(make_map().to_bytes())
    data[12] = 0xFF
    ChunkMap(data).validate()


def use(data: bytes) -> None:
    """Do all that a reader does with a map; only our own error may come out."""
    try:
        chunk_map = ChunkMap(data)
        for space in chunk_map.spaces:
            table = chunk_map.table(space.index)
            list(table.covering(0, 100_000))[:100]
            for index in range(min(table.count, 50)):
                try:
                    table.extent(index)
                    chunk_map.stored(space.index, index)
                except FormatError:
                    continue
        chunk_map.validate()
        _ = chunk_map.data_bytes
    except FormatError:
        pass


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_and_cut_maps_give_a_value_or_a_format_error(data: st.DataObject) -> None:
    raw = bytearray(make_map().to_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    use(bytes(raw[: data.draw(st.integers(0, len(raw)))]) if data.draw(st.booleans()) else bytes(raw))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=600), st.booleans())
def test_any_bytes_give_a_value_or_a_format_error(data: bytes, with_header: bool) -> None:
    use(make_map().to_bytes()[:HEADER_SIZE] + data if with_header else data)


def test_validate_finds_chunks_outside_their_blob_or_with_unknown_codecs() -> None:
    raw = make_map(1, 4, 1).to_bytes()
    storage = len(raw) - 4 * 16
    for at, value, error in [
        (0, b"\xff" * 8, FormatError),
        (8, b"\0\0\0\0", FormatError),
        (8, b"\xff\xff\0\0", FormatError),
        (12, b"\7\0", FormatError),
        (14, b"\x63", UnsupportedError),
    ]:
        data = bytearray(raw)
        data[storage + at : storage + at + len(value)] = value
        with pytest.raises(error):
            ChunkMap(data).validate()


def test_a_terabyte_map_opens_without_an_object_per_chunk() -> None:
    count, chunk = 262_144, 4 << 20
    builder = ChunkMapBuilder()
    builder.add_space(count * chunk)
    blob = builder.reserve_blob()
    builder.add_chunk(0, 0, chunk, bytes(32), blob, 0, chunk, CODEC_RAW, 0)
    builder.set_blob(blob, Digest.of(b""), count * chunk)
    small = bytearray(builder.to_bytes())
    content = np.zeros(count, dtype=[("digest", "V32"), ("offset", "<u8"), ("length", "<u4"), ("flags", "<u4")])
    content["offset"] = np.arange(count, dtype=np.uint64) * chunk
    content["length"] = chunk
    storage = np.zeros(
        count, dtype=[("offset", "<u8"), ("size", "<u4"), ("blob", "<u2"), ("codec", "u1"), ("param", "u1")]
    )
    storage["offset"] = content["offset"]
    storage["size"] = chunk
    head = small[: HEADER_SIZE + 32 + 48]
    at = len(head)
    head[32:40] = count.to_bytes(8, "little")
    head[40:48] = (at + 64 * count).to_bytes(8, "little")
    head[72:80] = (at + 48 * count).to_bytes(8, "little")
    head[HEADER_SIZE + 16 : HEADER_SIZE + 24] = count.to_bytes(8, "little")
    data = bytes(head) + content.tobytes() + storage.tobytes()
    tracemalloc.start()
    try:
        chunk_map = ChunkMap(data)
        table = chunk_map.table(0)
        assert table.find(777 * chunk + 5) == 777
        assert chunk_map.stored(0, 262_143).offset == 262_143 * chunk
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    chunk_map.validate()
    assert all(left < right for left, right in pairwise(table.extent(i)[0] for i in range(0, count, 10_000)))
