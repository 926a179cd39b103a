"""Any bytes give the bootstrap reader a value or a FormatError, in bounded time; nothing else."""

from __future__ import annotations

import contextlib
import stat
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs.errors import FormatError, UnsupportedError
from rafsfs.format.bootstrap import Bootstrap
from rafsfs.format.bootstrap_writer import write_bootstrap
from rafsfs.format.check import check_bootstrap
from rafsfs.format.inode import pack_inode
from rafsfs.format.superblock import Superblock

from .erofs_trees import directory, file, golden

GOLDEN = write_bootstrap(*golden())
META = 4096
"""Where inodes begin in the golden bootstrap."""


def explore(data: bytes) -> None:
    """Use all of the reader and the checker; let only values and FormatErrors pass."""
    began = time.perf_counter()
    findings = list(check_bootstrap(data, max_findings=50))
    assert len(findings) <= 51
    try:
        reader = Bootstrap(data)
    except FormatError:
        assert findings
        return
    nids = set(range(0, len(data) // 32, 1 + len(data) // 4096)) | {2, 3, 1 << 40, (1 << 64) - 1}
    try:
        for path, inode in reader.walk():
            assert 0 not in path
            nids.add(inode.nid)
    except FormatError:
        pass
    for nid in nids:
        examine(reader, nid)
    assert time.perf_counter() - began < 30


def examine(reader: Bootstrap, nid: int) -> None:
    try:
        inode = reader.inode(nid)
    except FormatError:
        return
    assert 0 <= inode.mode <= 0xFFFF
    assert 0 <= inode.size < 1 << 63
    for use in (reader.xattrs, reader.readlink, reader.inline_data, reader.allocated_bytes, reader.parent):
        with contextlib.suppress(FormatError):
            use(nid)
    try:
        position = 0
        for extent in reader.extents(nid):
            assert extent.file_offset == position
            assert extent.length > 0
            position += extent.length
            if extent.space is not None:
                blocks = reader.spaces[extent.space].blocks
                assert extent.offset >= 0
                assert extent.offset + extent.length <= blocks * 4096
        assert position in {0, inode.size}
    except FormatError:
        pass
    if stat.S_ISDIR(inode.mode):
        try:
            for count, entry in enumerate(reader.entries(nid)):
                assert count < len(GOLDEN) * 2
                assert 0 < len(entry.name) <= 255
                assert b"/" not in entry.name
                assert 0 <= entry.file_type <= 7
        except FormatError:
            pass
        for name in (b"config.json", b"", b"\xff" * 255, b"a/b"):
            with contextlib.suppress(FormatError):
                reader.lookup(nid, name)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=6000))
def test_random_bytes(data: bytes) -> None:
    explore(data)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=6000), st.integers(0, 3))
def test_random_bytes_behind_a_sound_superblock(data: bytes, kind: int) -> None:
    blocks = (4096 + len(data)) // 4096
    superblock = Superblock(root_nid=2, inos=3, blocks=blocks, meta_blkaddr=0, extra_devices=1, devt_slotoff=9)
    image = bytearray(GOLDEN[:4096] + data)
    image[1024:1152] = superblock.pack()
    image[64:128] = pack_inode(
        layout=(0, 2, 4, 0)[kind],
        xattr_size=0,
        mode=stat.S_IFDIR,
        size=len(data),
        i_u=1,
        ino=0,
        uid=0,
        gid=0,
        mtime_ns=0,
        nlink=2,
    )
    explore(bytes(image))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(GOLDEN)))
def test_truncation_is_refused(length: int) -> None:
    explore(GOLDEN[:length])
    if length < len(GOLDEN):
        with pytest.raises(FormatError):
            Bootstrap(GOLDEN[:length])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(1024, len(GOLDEN) - 1), st.integers(0, 7)), min_size=1, max_size=6))
def test_flipped_bits(flips: list[tuple[int, int]]) -> None:
    data = bytearray(GOLDEN)
    for at, bit in flips:
        data[at] ^= 1 << bit
    explore(bytes(data))


NIDS = sorted({inode.nid for _, inode in Bootstrap(GOLDEN).walk()})
WORDS = st.sampled_from([0, 1, 2, 4, 8, 32, 0x7F, 0xFF, 0xFFF, 0x1000, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(NIDS), st.integers(0, 31), WORDS), min_size=1, max_size=4))
def test_extreme_values_in_inodes_and_what_follows_them(changes: list[tuple[int, int, int]]) -> None:
    data = bytearray(GOLDEN)
    for nid, field, value in changes:
        at = META + nid * 32 + field * 4
        size = 8 if value > 0xFFFFFFFF else 4 if value > 0xFFFF else 2
        data[at : at + size] = value.to_bytes(size, "little")
    explore(bytes(data))


def patched(offset: int, form: str, *values: int) -> bytes:
    data = bytearray(GOLDEN)
    struct.pack_into(form, data, offset, *values)
    return bytes(data)


def test_unknown_features_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="COMPR_CFGS, 48BIT, 0x40000000"):
        Bootstrap(patched(1024 + 80, "<I", 0xC | 0x2 | 0x80 | 0x40000000))


@pytest.mark.parametrize(("offset", "value"), [(12, 9), (13, 1), (90, 1)])
def test_other_block_sizes_and_longer_superblocks_are_refused(offset: int, value: int) -> None:
    with pytest.raises(UnsupportedError):
        Bootstrap(patched(1024 + offset, "<B", value))


@pytest.mark.parametrize("layout", [1, 3, 5, 6, 7])
def test_compressed_and_unknown_layouts_are_refused(layout: int) -> None:
    reader = Bootstrap(GOLDEN)
    nid = reader.resolve(b"one piece")
    assert nid is not None
    changed = Bootstrap(patched(META + nid * 32, "<H", 1 | layout << 1))
    with pytest.raises(UnsupportedError):
        changed.inode(nid)


def test_directory_loop_ends_the_walk() -> None:
    root = directory()
    root.children[b"a"] = directory()
    root.children[b"a"].children[b"b"] = directory()
    data = bytearray(write_bootstrap(root, []))
    reader = Bootstrap(bytes(data))
    above, below = reader.resolve(b"a"), reader.resolve(b"a/b")
    assert above is not None
    assert below is not None
    at = data.index(struct.pack("<Q", below), META + above * 32 + 64)  # the entry "b" of a
    struct.pack_into("<Q", data, at + 0, below)
    entries = data.rindex(struct.pack("<Q", below), META + above * 32, META + above * 32 + 128)
    struct.pack_into("<Q", data, entries, above)
    looped = Bootstrap(bytes(data))
    with pytest.raises(FormatError, match="twice"):
        list(looped.walk())
    assert any("second name" in finding for finding in check_bootstrap(bytes(data)))


def test_directories_that_share_their_entries_do_not_multiply_the_work() -> None:
    """Many directory inodes over one block of entries that name them all: squared work, were it not bounded."""
    root = directory()
    for index in range(3000):
        root.children[b"%04d" % index] = directory()
    data = bytearray(write_bootstrap(root, []))
    reader = Bootstrap(bytes(data))
    top = META + reader.root_nid * 32
    size, start = struct.unpack_from("<Q", data, top + 8)[0] & -4096, struct.unpack_from("<I", data, top + 16)[0]
    for _, inode in list(reader.walk())[1:]:
        at = META + inode.nid * 32
        struct.pack_into("<H", data, at, 1)
        struct.pack_into("<QI", data, at + 8, size, start)
    began = time.perf_counter()
    with pytest.raises(FormatError):
        list(Bootstrap(bytes(data)).walk())
    findings = list(check_bootstrap(bytes(data)))
    assert any("overlaps" in finding for finding in findings)
    assert time.perf_counter() - began < 10


def test_huge_chunk_index_count_is_refused_without_reading() -> None:
    root = directory()
    root.children[b"f"] = file(size=1 << 40)
    data = bytearray(write_bootstrap(root, []))
    nid = Bootstrap(bytes(data)).resolve(b"f")
    assert nid is not None
    struct.pack_into("<QI", data, META + nid * 32 + 8, (1 << 63) - 1, 0x20)
    reader = Bootstrap(bytes(data))
    for use in (reader.extents, reader.allocated_bytes):
        with pytest.raises(FormatError):
            use(nid)


def test_inline_tail_across_a_block_is_refused() -> None:
    root = directory()
    root.children[b"f"] = file(inline=b"x" * 4000)
    data = bytearray(write_bootstrap(root, []))
    nid = Bootstrap(bytes(data)).resolve(b"f")
    assert nid is not None
    struct.pack_into("<Q", data, META + nid * 32 + 8, 4090)
    with pytest.raises(FormatError, match="crosses a block"):
        Bootstrap(bytes(data)).inline_data(nid)


@pytest.mark.parametrize("bad", [b"a/c", b"a\0c", b"aaa"])
def test_bad_names_and_order_are_refused(bad: bytes) -> None:
    root = directory()
    for name in (b"aab", b"abc", b"abd"):
        root.children[name] = file()
    data = write_bootstrap(root, []).replace(b"abc", bad)
    with pytest.raises(FormatError):
        list(Bootstrap(data).entries(2))


def test_entry_for_an_inode_outside_is_refused() -> None:
    root = directory()
    root.children[b"f"] = file()
    data = bytearray(write_bootstrap(root, []))
    nid = Bootstrap(bytes(data)).resolve(b"f")
    assert nid is not None
    at = data.index(struct.pack("<QH", nid, 12 * 3 + 3), META)
    struct.pack_into("<Q", data, at, 1 << 63)
    reader = Bootstrap(bytes(data))
    for use in (reader.resolve, lambda _: list(reader.entries(2)), lambda _: list(reader.walk())):
        with pytest.raises(FormatError):
            use(b"f")
