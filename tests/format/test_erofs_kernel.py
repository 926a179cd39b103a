"""The kernel's EROFS driver as oracle: it mounts what we write and shows the same tree, metadata and bytes."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest

from rafsfs.format.bootstrap import Bootstrap
from rafsfs.format.bootstrap_writer import Node, SpaceSpec, plan_data_ranges, write_bootstrap
from tests.support.kernel_erofs import KernelRefusedError, kernel_mount, why_no_kernel_mount

from .erofs_trees import (
    MIB,
    Extent,
    content,
    directory,
    every_kind,
    file,
    file_size,
    link_counts,
    paths,
    pattern,
    space_id,
)

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(why_no_kernel_mount() is not None, reason=str(why_no_kernel_mount())),
]


class Image:
    """A bootstrap and its data files on disk."""

    def __init__(self, where: Path, root: Node, spaces: Sequence[SpaceSpec], contents: Sequence[bytes]) -> None:
        self.data = write_bootstrap(root, spaces)
        self.bootstrap = str(where / "bootstrap")
        Path(self.bootstrap).write_bytes(self.data)
        self.devices = []
        for index, space in enumerate(contents):
            path = where / f"space{index}"
            path.write_bytes(space.ljust((len(space) + 4095) // 4096 * 4096, b"\0"))
            self.devices.append(str(path))
        self.mountpoint = where / "mnt"
        self.mountpoint.mkdir()

    def mount(self):
        return kernel_mount(self.bootstrap, self.devices, str(self.mountpoint))


def show(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, 64 * MIB, 0)
    finally:
        os.close(fd)


def test_kernel_shows_the_metadata_that_was_written(tmp_path: Path) -> None:
    root, spaces, contents = every_kind()
    image = Image(tmp_path, root, spaces, contents)
    links = link_counts(root)
    reader = Bootstrap(image.data)
    with image.mount() as top:
        for path, node in paths(root).items():
            where = os.path.join(os.fsencode(top), path)
            got = os.lstat(where)
            assert got.st_mode == node.mode, path
            assert (got.st_uid, got.st_gid) == (node.uid, node.gid), path
            assert got.st_mtime_ns == node.mtime_ns, path
            assert got.st_nlink == links[id(node)], path
            assert got.st_ino == reader.resolve(path), path
            if stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode):
                assert got.st_rdev == node.rdev, path
            if not stat.S_ISDIR(node.mode):
                assert got.st_size == file_size(node), path
            if node.target is not None:
                assert os.readlink(where) == node.target
            names = [name.encode() for name in os.listxattr(where, follow_symlinks=False)]
            assert sorted(names) == sorted(node.xattrs), path
            for name, value in node.xattrs.items():
                assert os.getxattr(where, name, follow_symlinks=False) == value, (path, name)


def test_kernel_lists_exactly_the_names_and_finds_each(tmp_path: Path) -> None:
    root, spaces, contents = every_kind()
    with Image(tmp_path, root, spaces, contents).mount() as top:
        for path, node in paths(root).items():
            if stat.S_ISDIR(node.mode):
                where = os.path.join(os.fsencode(top), path)
                assert sorted(os.listdir(where)) == sorted(node.children), path
            assert not os.path.lexists(os.path.join(os.fsencode(top), path, b"no such name"))


def test_kernel_reads_the_bytes_of_every_file(tmp_path: Path) -> None:
    root, spaces, contents = every_kind()
    with Image(tmp_path, root, spaces, contents).mount() as top:
        for path, node in paths(root).items():
            if not stat.S_ISREG(node.mode):
                continue
            where = os.fsdecode(os.path.join(os.fsencode(top), path))
            if node.size < 1 << 30:
                assert show(where) == content(node, contents, 0, file_size(node)), path
                continue
            fd = os.open(where, os.O_RDONLY)
            try:
                for extent in node.extents:
                    first, stop = extent.file_offset - MIB, extent.file_offset + extent.length + MIB
                    assert os.pread(fd, stop - first, first) == content(node, contents, first, stop), path
                assert os.pread(fd, 100, node.size - 50) == bytes(50)
            finally:
                os.close(fd)


def test_kernel_reads_a_sparse_file_of_more_than_a_tebibyte(tmp_path: Path) -> None:
    size, data_at = (3 << 40) + 4097, (2 << 40) + 123_456
    (planned,) = plan_data_ranges(size, [(data_at, 10)], 4 << 30)
    contents = [bytearray(planned[1])]
    contents[0][data_at - planned[0] : data_at - planned[0] + 10] = b"0123456789"
    root = directory()
    root.children[b"sparse"] = file(size=size, extents=[Extent(planned[0], planned[1], 0, 0)])
    image = Image(tmp_path, root, [SpaceSpec(space_id(0), planned[1])], contents)
    assert len(image.data) < 1 << 20
    with image.mount() as top:
        fd = os.open(f"{top}/sparse", os.O_RDONLY)
        try:
            assert os.fstat(fd).st_size == size
            assert os.pread(fd, 30, data_at - 10) == bytes(10) + b"0123456789" + bytes(10)
            for offset in (0, 1 << 40, planned[0] - 100, sum(planned) - 50, size - 100):
                assert os.pread(fd, 100, offset) == bytes(100)
        finally:
            os.close(fd)


def test_kernel_mounts_a_bootstrap_without_data_spaces(tmp_path: Path) -> None:
    root = directory()
    root.children[b"config.json"] = file(inline=b"{}")
    with Image(tmp_path, root, [], []).mount() as top:
        assert show(f"{top}/config.json") == b"{}"


def test_kernel_reads_a_file_through_many_spaces(tmp_path: Path) -> None:
    contents = [pattern(MIB, index) for index in range(40)]
    contents[-1] = contents[-1][:100_001]
    spaces = [SpaceSpec(space_id(index), len(space)) for index, space in enumerate(contents)]
    extents = [Extent(index * MIB, len(space), index, 0) for index, space in enumerate(contents)]
    root = directory()
    root.children[b"big"] = file(size=sum(map(len, contents)), extents=extents)
    with Image(tmp_path, root, spaces, contents).mount() as top:
        assert show(f"{top}/big") == b"".join(contents)


def test_kernel_mounts_bootstrap_and_spaces_strung_together(tmp_path: Path) -> None:
    root, spaces, contents = every_kind()
    image = Image(tmp_path, root, spaces, contents)
    Path(image.bootstrap).write_bytes(image.data + b"".join(contents))
    image.devices.clear()
    with image.mount() as top:
        assert show(f"{top}/two pieces") == content(root.children[b"two pieces"], contents, 0, 5 * MIB)


def test_bootstrap_without_its_devices_gives_no_wrong_byte(tmp_path: Path) -> None:
    root, spaces, contents = every_kind()
    image = Image(tmp_path, root, spaces, contents)
    image.devices.clear()
    with image.mount() as top:
        assert show(f"{top}/small") == b"hello"
        with pytest.raises(OSError, match="Input/output error"):
            show(f"{top}/one piece")


def test_kernel_finds_every_name_of_a_huge_directory(tmp_path: Path) -> None:
    root = directory()
    big = root.children[b"big"] = directory()
    for index in range(20_000):
        big.children[b"file-%d.json" % index] = file()
    with Image(tmp_path, root, [], []).mount() as top:
        assert len(os.listdir(f"{top}/big")) == 20_000
        for index in range(0, 20_000, 37):
            assert os.path.exists(f"{top}/big/file-{index}.json")
        assert not os.path.exists(f"{top}/big/file-20000.json")


def test_kernel_descends_a_deep_tree(tmp_path: Path) -> None:
    root = node = directory()
    for _ in range(5000):
        below = node.children[b"d"] = directory()
        node = below
    node.children[b"bottom"] = file(inline=b"here")
    with Image(tmp_path, root, [], []).mount() as top:
        fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for _ in range(10):
                below_fd = os.open("/".join("d" * 500), os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below_fd
            assert os.listdir(fd) == ["bottom"]
        finally:
            os.close(fd)


def test_kernel_refuses_the_wrong_number_of_devices(tmp_path: Path) -> None:
    root, spaces, contents = every_kind()
    image = Image(tmp_path, root, spaces, contents)
    image.devices.pop()
    with pytest.raises(KernelRefusedError), image.mount():
        pass
