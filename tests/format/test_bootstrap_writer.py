"""What the writer refuses, naming the path, and how sparse files are planned."""

from __future__ import annotations

import os
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs.errors import FormatError
from rafsfs.format.bootstrap import Bootstrap
from rafsfs.format.bootstrap_writer import Extent, Node, SpaceSpec, inline_capacity, plan_data_ranges, write_bootstrap
from rafsfs.format.chunk_index import chunk_bits_for

from .erofs_trees import MIB, directory, file, space_id, symlink

SPACE = SpaceSpec(space_id(0), 16 * MIB)


def refused(name: bytes, node: Node, *spaces: SpaceSpec) -> str:
    """Write `node` as d/<name>; return the FormatError's line."""
    root = directory()
    root.children[b"d"] = directory()
    root.children[b"d"].children[name] = node
    with pytest.raises(FormatError) as caught:
        write_bootstrap(root, spaces)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"system.other", b""),
        (b"user.", b""),
        (b"btrfs.compression", b""),
        (b"user." + b"n" * 251, b""),
        (b"user.a", bytes(65536)),
        (b"user.a\0b", b""),
    ],
)
def test_xattr_that_erofs_cannot_hold_is_refused_with_path_and_name(name: bytes, value: bytes) -> None:
    message = refused(b"f", file(xattrs={name: value}))
    assert message.startswith("d/f: xattr ")
    assert repr(name[:64]) in message


def test_xattrs_that_are_too_much_together_are_refused() -> None:
    assert "d/f" in refused(b"f", file(xattrs={b"user.%d" % index: bytes(65000) for index in range(5)}))


@pytest.mark.parametrize("name", [b"", b"n" * 256, b"a/b", b"a\0b", b".", b".."])
def test_bad_names_are_refused(name: bytes) -> None:
    refused(name, file())


@pytest.mark.parametrize(
    "node",
    [
        file(uid=1 << 32),
        file(gid=-1),
        file(mtime_ns=1 << 100),
        file(size=-1),
        file(size=1 << 63),
        Node(0o644),
        Node(stat.S_IFREG | 1 << 20),
        symlink(b""),
        symlink(b"a\0b"),
        symlink(b"t" * 4096),
        Node(stat.S_IFCHR, rdev=os.makedev(1 << 12, 0)),
        Node(stat.S_IFBLK, rdev=os.makedev(0, 1 << 20)),
        file(inline=b"x" * 4033),
        file(inline=b"x" * 4000, xattrs={b"user.a": b"y" * 100}),
        file(inline=b"x", size=5),
        file(children={b"x": file()}),
    ],
)
def test_what_does_not_fit_an_inode_is_refused_with_its_path(node: Node) -> None:
    assert "d/f" in refused(b"f", node)


@pytest.mark.parametrize(
    "extents",
    [
        [Extent(0, 4096, 1, 0)],
        [Extent(0, 4096, -1, 0)],
        [Extent(0, 8192, 0, 16 * MIB - 4096)],
        [Extent(0, 4096, 0, 1)],
        [Extent(0, 4096, 0, -4096)],
        [Extent(0, 100, 0, 0), Extent(100, 4096, 0, 8192)],
        [Extent(100, 4096, 0, 0)],
        [Extent(0, 100, 0, 0)],
        [Extent(0, 8192, 0, 0), Extent(4096, 4096, 0, 8192)],
        [Extent(0, 0, 0, 0)],
        [Extent(8192, 4096, 0, 0)],
    ],
)
def test_extents_that_cannot_be_expressed_are_refused_with_the_path(extents: list[Extent]) -> None:
    assert refused(b"f", file(size=12_000, extents=extents), SPACE).startswith("d/f: ")


def test_file_scattered_over_too_many_pieces_is_refused_with_advice() -> None:
    message = refused(b"f", file(size=1 << 40, extents=[Extent(4096, 4096, 0, 0)]), SPACE)
    assert "chunk indexes" in message
    assert "power of two" in message


def test_directory_with_two_names_is_refused() -> None:
    root = directory()
    root.children[b"a"] = root.children[b"b"] = directory()
    with pytest.raises(FormatError, match="second name"):
        write_bootstrap(root, [])


def test_directory_in_itself_is_refused() -> None:
    root = directory()
    root.children[b"a"] = directory()
    root.children[b"a"].children[b"loop"] = root
    with pytest.raises(FormatError, match="second name"):
        write_bootstrap(root, [])


def test_root_that_is_no_directory_is_refused() -> None:
    with pytest.raises(FormatError, match="root"):
        write_bootstrap(file(), [])


@pytest.mark.parametrize(
    "spaces",
    [
        [SpaceSpec(b"short", 1)],
        [SpaceSpec(space_id(0), 16 << 40)],
        [SpaceSpec(space_id(0), -1)],
    ],
)
def test_bad_data_spaces_are_refused(spaces: list[SpaceSpec]) -> None:
    with pytest.raises(FormatError):
        write_bootstrap(directory(), spaces)


def test_data_space_may_be_as_large_as_block_addresses_reach() -> None:
    size = (16 << 40) - 4096
    root = directory()
    root.children[b"f"] = file(size=size, extents=[Extent(0, size, 0, 0)])
    reader = Bootstrap(write_bootstrap(root, [SpaceSpec(space_id(0), size)]))
    nid = reader.resolve(b"f")
    assert nid is not None
    assert reader.extents(nid) == [Extent(0, size, 0, 0)]
    assert reader.allocated_bytes(nid) == size


def test_two_thousand_data_spaces_fit() -> None:
    spaces = [SpaceSpec(space_id(index), 1 << 32) for index in range(2000)]
    root = directory()
    extents = [Extent(index << 32, 1 << 32, index, 0) for index in range(2000)]
    root.children[b"f"] = file(size=2000 << 32, extents=extents)
    reader = Bootstrap(write_bootstrap(root, spaces))
    nid = reader.resolve(b"f")
    assert nid is not None
    assert reader.extents(nid) == extents


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 1 << 44),
    st.lists(st.tuples(st.integers(0, 1 << 44), st.integers(0, 1 << 40)), max_size=8),
    st.sampled_from([1 << 20, 1 << 30, 4 << 30]),
)
def test_planned_ranges_hold_all_data_and_can_be_expressed(
    size: int, ranges: list[tuple[int, int]], bound: int
) -> None:
    planned = plan_data_ranges(size, ranges, bound)
    position = 0
    for offset, length in planned:
        assert offset % 4096 == 0
        assert length > 0
        assert offset >= position
        position = offset + length
    assert position <= size
    for offset, length in ranges:
        end = min(offset + length, size)
        if offset < end:
            assert any(start <= offset and end <= start + held for start, held in planned)
    grain = 4096 << chunk_bits_for(size, [Extent(offset, length, 0, 0) for offset, length in planned])
    assert grain >= bound or size <= grain << 16


def test_aligned_holes_survive_planning_exactly() -> None:
    ranges = [(0, MIB), (100 * MIB, 5 * MIB)]
    assert plan_data_ranges(200 * MIB, ranges, 4 << 30) == ranges


def test_inline_capacity_is_what_the_writer_takes() -> None:
    for xattrs in ({}, {b"user.a": b"x" * 100}, {b"user.a": b"x" * 3990}, {b"user.a": b"x" * 8000}):
        room = inline_capacity(xattrs)
        root = directory()
        root.children[b"f"] = file(inline=b"y" * room, xattrs=xattrs)
        write_bootstrap(root, [])
        root.children[b"f"] = file(inline=b"y" * (room + 1), xattrs=xattrs)
        with pytest.raises(FormatError):
            write_bootstrap(root, [])
