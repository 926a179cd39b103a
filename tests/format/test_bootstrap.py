"""The bootstrap reader gives back what the writer was given."""

from __future__ import annotations

import os
import stat
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs.errors import FormatError
from rafsfs.format.bootstrap import Bootstrap, Extent
from rafsfs.format.bootstrap_writer import Node, SpaceSpec, inline_capacity, write_bootstrap
from rafsfs.format.check import check_bootstrap

from .erofs_trees import MIB, directory, every_kind, file, file_size, link_counts, paths, space_id, symlink


def assert_same(data: bytes, root: Node) -> None:
    """Assert that the bootstrap holds exactly the tree, through every method of the reader."""
    reader = Bootstrap(data)
    expected = paths(root)
    links = link_counts(root)
    found = dict(reader.walk())
    assert sorted(found) == sorted(expected)
    nids: dict[int, int] = {}
    for path, inode in found.items():
        node = expected[path]
        assert nids.setdefault(id(node), inode.nid) == inode.nid
        assert (inode.mode, inode.uid, inode.gid, inode.mtime_ns) == (node.mode, node.uid, node.gid, node.mtime_ns)
        assert inode.nlink == links[id(node)]
        assert reader.resolve(path) == inode.nid
        assert reader.xattrs(inode.nid) == node.xattrs
        if stat.S_ISDIR(node.mode):
            names = [entry.name for entry in reader.entries(inode.nid)]
            assert names == sorted([*node.children, b".", b".."])
            assert reader.lookup(inode.nid, b".") == inode.nid
        elif stat.S_ISLNK(node.mode):
            assert reader.readlink(inode.nid) == node.target
        elif stat.S_ISREG(node.mode):
            assert inode.size == file_size(node)
            if node.inline:
                assert reader.inline_data(inode.nid) == node.inline
            else:
                assert_covers(reader.extents(inode.nid), node)
        else:
            assert inode.rdev == node.rdev
    assert len(set(nids.values())) == len(nids) == reader.inode_count
    assert list(check_bootstrap(data)) == []


def assert_covers(extents: list[Extent], node: Node) -> None:
    """Assert that extents cover a file without gap or overlap and hold exactly the node's pieces."""
    position = 0
    for extent in extents:
        assert extent.file_offset == position
        position += extent.length
    assert position == node.size
    stored = [(x.space, x.offset, x.file_offset, x.length) for x in extents if x.space is not None]
    assert stored == [(x.space, x.offset, x.file_offset, x.length) for x in node.extents if x.space is not None]


names = (
    st.binary(min_size=1, max_size=255)
    .filter(lambda name: b"/" not in name and name not in {b".", b".."})
    .map(lambda name: name.replace(b"\0", b"0"))
)
times = st.integers(-(2**40) * 10**9, 2**40 * 10**9)
owners = st.integers(0, 2**32 - 1)
permissions = st.integers(0, 0o7777)
attributes = st.dictionaries(
    st.sampled_from([b"user.a", b"user.b" * 30, b"trusted.t", b"security.s", b"system.posix_acl_access"]),
    st.binary(max_size=600),
    max_size=3,
)


@st.composite
def leaves(draw: st.DrawFn) -> Node:
    kind = draw(st.sampled_from(["inline", "pieces", "link", "device", "fifo", "hole"]))
    node = Node(
        draw(permissions),
        uid=draw(owners),
        gid=draw(owners),
        mtime_ns=draw(times),
        xattrs=draw(attributes),
    )
    if kind == "inline":
        node.mode |= stat.S_IFREG
        node.inline = draw(st.binary(max_size=min(3000, inline_capacity(node.xattrs))))
    elif kind == "pieces":
        node.mode |= stat.S_IFREG
        grain = 4096 << draw(st.integers(0, 6))
        held = draw(st.lists(st.sampled_from([None, 0, 1]), min_size=1, max_size=12))
        node.extents = [
            Extent(index * grain, grain, space, 1 << 22 | 2 * index * grain)
            for index, space in enumerate(held)
            if space is not None
        ]
        cut = draw(st.integers(0, grain - 1))
        node.size = len(held) * grain - cut
        if node.extents and held[-1] is not None and cut:
            last = node.extents[-1]
            node.extents[-1] = Extent(last.file_offset, grain - cut, last.space, last.offset)
    elif kind == "link":
        node.mode |= stat.S_IFLNK
        node.target = draw(st.binary(min_size=1, max_size=4095)).replace(b"\0", b"0")
    elif kind == "device":
        node.mode |= draw(st.sampled_from([stat.S_IFCHR, stat.S_IFBLK]))
        node.rdev = os.makedev(draw(st.integers(0, 0xFFF)), draw(st.integers(0, 0xFFFFF)))
    elif kind == "fifo":
        node.mode |= draw(st.sampled_from([stat.S_IFIFO, stat.S_IFSOCK]))
    else:
        node.mode |= stat.S_IFREG
        node.size = draw(st.integers(0, 2**62))
    return node


def directories(children: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    return st.builds(
        lambda mode, held, mtime: Node(stat.S_IFDIR | mode, children=held, mtime_ns=mtime),
        permissions,
        st.dictionaries(names, children, max_size=30),
        times,
    )


trees = directories(st.recursive(leaves(), directories, max_leaves=40))
SPACES = [SpaceSpec(space_id(index), 1 << 30) for index in range(2)]


@settings(max_examples=40, deadline=None)
@given(trees, st.randoms(use_true_random=False))
def test_any_tree_is_read_back_whatever_the_order_of_its_dicts(root: Node, random) -> None:
    data = write_bootstrap(root, SPACES)
    assert_same(data, root)
    for node in paths(root).values():
        shuffled = list(node.children.items())
        random.shuffle(shuffled)
        node.children = dict(shuffled)
        node.xattrs = dict(reversed(node.xattrs.items()))
    assert write_bootstrap(root, SPACES) == data


def test_every_kind_is_read_back() -> None:
    root, spaces, _ = every_kind()
    data = write_bootstrap(root, spaces)
    assert_same(data, root)
    assert [slot.space_id for slot in Bootstrap(data).spaces] == [space.space_id for space in spaces]


def test_root_is_nid_2_and_inode_numbers_0_and_1_are_unused() -> None:
    root, spaces, _ = every_kind()
    reader = Bootstrap(write_bootstrap(root, spaces))
    assert min(inode.nid for _, inode in reader.walk()) == reader.root_nid == 2


def test_entries_continue_from_any_position() -> None:
    root = directory()
    for index in range(3000):
        root.children[b"%d" % index] = file()
    reader = Bootstrap(write_bootstrap(root, []))
    whole = list(reader.entries(reader.root_nid))
    for start in range(0, len(whole), 97):
        assert list(reader.entries(reader.root_nid, whole[start].position + 1)) == whole[start + 1 :]
    assert list(reader.entries(reader.root_nid, whole[-1].position + 1)) == []
    assert list(reader.entries(reader.root_nid, 1 << 63)) == []


def test_directory_of_100_000_entries_is_written_and_searched_quickly() -> None:
    root = directory()
    big = root.children[b"big"] = directory()
    for index in range(100_000):
        big.children[b"%08d.json" % index] = file(inline=b"%d" % index)
    began = time.perf_counter()
    data = write_bootstrap(root, [])
    written = time.perf_counter() - began
    reader = Bootstrap(data)
    parent = reader.lookup(reader.root_nid, b"big")
    assert parent is not None
    began = time.perf_counter()
    for index in range(0, 100_000, 100):
        nid = reader.lookup(parent, b"%08d.json" % index)
        assert nid is not None
        assert reader.inline_data(nid) == b"%d" % index
        assert reader.lookup(parent, b"%08d" % index) is None
    searched = (time.perf_counter() - began) / 2000
    assert sum(1 for _ in reader.entries(parent)) == 100_002
    assert written < 10  # 0.7 s on the machine it was made on
    assert searched < 0.001  # 25 us


def test_tree_of_5000_levels_is_written_walked_and_checked() -> None:
    root = node = directory()
    for _ in range(5000):
        below = node.children[b"d"] = directory()
        node = below
    node.children[b"bottom"] = file(inline=b"here")
    data = write_bootstrap(root, [])
    assert list(check_bootstrap(data)) == []
    *_, (path, inode) = Bootstrap(data).walk()
    assert path == b"d/" * 5000 + b"bottom"
    assert Bootstrap(data).resolve(path) == inode.nid


def test_parent_of_a_directory_is_found_and_root_is_its_own() -> None:
    root = directory()
    root.children[b"a"] = directory()
    root.children[b"a"].children[b"b"] = directory()
    reader = Bootstrap(write_bootstrap(root, []))
    below = reader.resolve(b"a/b")
    assert below is not None
    assert reader.parent(below) == reader.resolve(b"a")
    assert reader.parent(reader.root_nid) == reader.root_nid


def test_resolve_does_not_follow_symlinks_nor_look_below_files() -> None:
    root = directory()
    root.children[b"link"] = symlink(b"d")
    root.children[b"d"] = directory()
    root.children[b"d"].children[b"f"] = file()
    reader = Bootstrap(write_bootstrap(root, []))
    assert reader.resolve(b"link/f") is None
    assert reader.resolve(b"d/f/x") is None
    assert reader.resolve(b"/d//f") == reader.resolve(b"d/f") is not None
    assert reader.resolve(b"d/../d/./f") == reader.resolve(b"d/f")


def test_extents_of_a_range_are_clipped_to_it() -> None:
    root = directory()
    root.children[b"f"] = file(size=3 * MIB + 7, extents=[Extent(0, MIB, 0, MIB), Extent(2 * MIB, MIB + 7, 1, 0)])
    reader = Bootstrap(write_bootstrap(root, SPACES))
    nid = reader.resolve(b"f")
    assert nid is not None
    assert reader.extents(nid, MIB - 5, 2 * MIB + 9) == [
        Extent(MIB - 5, 5, 0, 2 * MIB - 5),
        Extent(MIB, MIB, None, 0),
        Extent(2 * MIB, 9, 1, 0),
    ]
    assert reader.extents(nid, 3 * MIB, 1 << 40) == [Extent(3 * MIB, 7, 1, MIB)]
    assert reader.extents(nid, 4 * MIB, 5 * MIB) == []


def test_allocated_bytes_leave_holes_out() -> None:
    root = directory()
    root.children[b"sparse"] = file(size=(1 << 40) + 9, extents=[Extent(1 << 30, 1 << 24, 0, 0)])
    root.children[b"dense"] = file(size=5000, extents=[Extent(0, 5000, 1, 0)])
    root.children[b"hole"] = file(size=1 << 30)
    root.children[b"inline"] = file(inline=b"x")
    root.children[b"empty"] = file()
    reader = Bootstrap(write_bootstrap(root, SPACES))
    found = {path: reader.allocated_bytes(inode.nid) for path, inode in reader.walk()}
    assert found == {b"": 4096, b"sparse": 1 << 24, b"dense": 8192, b"hole": 0, b"inline": 4096, b"empty": 0}


def test_file_in_one_piece_costs_one_index_whatever_its_size() -> None:
    sizes = []
    for size in (4097, 40 << 30):
        root = directory()
        root.children[b"f"] = file(size=size, extents=[Extent(0, size, 0, 0)])
        sizes.append(len(write_bootstrap(root, [SpaceSpec(space_id(0), size)])))
    assert sizes[0] == sizes[1] == 8192


def test_small_files_share_blocks_that_would_stay_half_empty() -> None:
    root = directory()
    for index in range(200):
        root.children[b"%d" % index] = file(inline=b"x" * (2200 if index % 2 else 1500))
    data = write_bootstrap(root, [])
    assert len(data) < 115 * 4096
    assert_same(data, root)


def test_lookup_in_something_that_is_no_directory_is_a_format_error() -> None:
    root = directory()
    root.children[b"f"] = file(inline=b"x")
    reader = Bootstrap(write_bootstrap(root, []))
    nid = reader.resolve(b"f")
    assert nid is not None
    with pytest.raises(FormatError):
        reader.lookup(nid, b"x")
    with pytest.raises(FormatError):
        reader.readlink(nid)
