"""erofs-utils as oracle: fsck.erofs and dump.erofs accept what we write, and we read what mkfs.erofs writes."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rafsfs.errors import UnsupportedError
from rafsfs.format.bootstrap import Bootstrap
from rafsfs.format.bootstrap_writer import Extent, Node, SpaceSpec, write_bootstrap

from .erofs_trees import MIB, content, directory, every_kind, file, file_size, golden, paths, pattern, space_id, symlink

pytestmark = pytest.mark.skipif(shutil.which("fsck.erofs") is None, reason="erofs-utils is not installed")


def run(*command: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False)


def fsck(where: Path, root: Node, spaces: list[SpaceSpec], contents: list[bytes], *options: str) -> None:
    """Write the image below `where` and let fsck.erofs pass on it."""
    (where / "bootstrap").write_bytes(write_bootstrap(root, spaces))
    devices = []
    for index, data in enumerate(contents):
        (where / f"space{index}").write_bytes(data)
        devices.append(f"--device={where / f'space{index}'}")
    # fsck.erofs 1.5 recurses into directories, several KiB of stack a level.
    done = run("prlimit", "--stack=unlimited", "fsck.erofs", *devices, *options, where / "bootstrap")
    assert done.returncode == 0, done
    assert "<E>" not in done.stderr, done


def of_one(node: Node) -> Node:
    root = directory()
    root.children[b"it"] = node
    return root


def huge_directory() -> Node:
    root = directory()
    for index in range(30_000):
        root.children[b"name-%d" % index] = file(inline=b"%d" % index)
    return root


def deep() -> Node:
    root = node = directory()
    for _ in range(5000):
        below = node.children[b"d"] = directory()
        node = below
    return root


CASES: dict[str, Callable[[], Node]] = {
    "empty root": directory,
    "empty file": lambda: of_one(file()),
    "inline file": lambda: of_one(file(inline=b"x")),
    "full inline file": lambda: of_one(file(inline=b"x" * 4032)),
    "inline symlink": lambda: of_one(symlink(b"target")),
    "symlink in a block": lambda: of_one(symlink(b"t" * 4095)),
    "xattrs over blocks": lambda: of_one(file(xattrs={b"user.%d" % index: b"v" * 65535 for index in range(3)})),
    "xattrs and inline": lambda: of_one(file(inline=b"x" * 900, xattrs={b"user.a": b"v" * 3000})),
    "devices, fifo, socket": lambda: directory(
        children={
            b"c": Node(stat.S_IFCHR, rdev=os.makedev(4, 300)),
            b"b": Node(stat.S_IFBLK, rdev=os.makedev(4, 300)),
            b"f": Node(stat.S_IFIFO),
            b"s": Node(stat.S_IFSOCK),
        }
    ),
    "hole": lambda: of_one(file(size=(1 << 42) + 1)),
    "huge directory": huge_directory,
    "deep tree": deep,
}


@pytest.mark.parametrize("case", CASES)
def test_fsck_accepts(case: str, tmp_path: Path) -> None:
    fsck(tmp_path, CASES[case](), [], [])


@pytest.mark.parametrize("many", [1, 2, 30])
def test_fsck_accepts_files_through_data_spaces(many: int, tmp_path: Path) -> None:
    contents = [pattern(MIB, index) for index in range(many)]
    extents = [Extent(index * MIB, MIB, index, 0) for index in range(many)]
    root = of_one(file(size=many * MIB, extents=extents))
    fsck(tmp_path, root, [SpaceSpec(space_id(index), MIB) for index in range(many)], contents)


def test_fsck_accepts_every_kind_at_once(tmp_path: Path) -> None:
    fsck(tmp_path, *every_kind())


def test_fsck_accepts_the_golden_bootstrap(tmp_path: Path) -> None:
    root, spaces = golden()
    fsck(tmp_path, root, spaces, [bytes(space.size + -space.size % 4096) for space in spaces])


def test_fsck_extracts_the_same_tree(tmp_path: Path) -> None:
    root, spaces, contents = every_kind()
    for name in (b"sparse", b"hole then data", b"hole", b"huge attributes"):
        del root.children[name]  # fsck.erofs 1.5 leaves holes out of what it extracts: the file gets shorter
    (tmp_path / "out").mkdir()
    fsck(tmp_path, root, spaces, contents, f"--extract={tmp_path / 'out'}", "--overwrite")
    top = os.fsencode(tmp_path / "out")
    seen = 0
    for path, node in paths(root).items():
        where = os.path.join(top, path)
        if stat.S_ISREG(node.mode):
            assert Path(os.fsdecode(where)).read_bytes() == content(node, contents, 0, file_size(node)), path
            seen += 1
        elif node.target is not None:
            assert os.readlink(where) == node.target
    assert seen > 1000


def test_dump_tells_the_superblock_and_files(tmp_path: Path) -> None:
    root, spaces, contents = every_kind()
    data = write_bootstrap(root, spaces)
    image = tmp_path / "bootstrap"
    image.write_bytes(data)
    devices = []
    for index, space in enumerate(contents):
        (tmp_path / f"space{index}").write_bytes(space)
        devices.append(f"--device={tmp_path / f'space{index}'}")
    shown = run("dump.erofs", *devices, "-s", image).stdout
    reader = Bootstrap(data)
    blocks = (len(data) + sum(map(len, contents))) // 4096
    assert re.search(rf"blocks:\s+{blocks}\n", shown)
    assert re.search(rf"root nid:\s+{reader.root_nid}\n", shown)
    assert re.search(rf"inode count:\s+{reader.inode_count}\n", shown)
    for path in (b"small", b"two pieces", b"d", b"d/e", b"link", b"char"):
        shown = run("dump.erofs", *devices, f"--path=/{path.decode()}", image).stdout
        nid = reader.resolve(path)
        assert nid is not None
        inode = reader.inode(nid)
        found = re.search(r"Size: (\d+) .*\nNID: (\d+) +Links: (\d+)", shown)
        assert found is not None, shown
        assert tuple(map(int, found.groups())) == (inode.size, nid, inode.nlink)
        assert f"Access: {inode.mode & 0o777:04o}" in shown


def test_dump_tells_the_extents_of_a_file(tmp_path: Path) -> None:
    root, spaces, contents = every_kind()
    image = tmp_path / "bootstrap"
    image.write_bytes(write_bootstrap(root, spaces))
    devices = []
    for index, space in enumerate(contents):
        (tmp_path / f"space{index}").write_bytes(space)
        devices.append(f"--device={tmp_path / f'space{index}'}")
    shown = run("dump.erofs", *devices, "--path=/two pieces", "-e", image).stdout
    found = re.findall(r"(\d+)\.\. +(\d+) \| +\d+ : +(\d+)\.\. +\d+ \| +\d+ +# device (\d+)", shown)
    assert found == [("0", str(4 * MIB), str(4 * MIB), "1"), (str(4 * MIB), str(5 * MIB), "0", "2")]


@pytest.mark.parametrize("form", ["force-inode-extended", "force-inode-compact"])
def test_reader_reads_what_mkfs_writes(form: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "small").write_bytes(b"hello")
    (source / "blocks").write_bytes(pattern(10 * 4096, 1))
    (source / "blocks and tail").write_bytes(pattern(10 * 4096 + 100, 2))
    (source / "empty").touch()
    (source / "dir").mkdir()
    for index in range(300):
        (source / "dir" / f"name {index} {'n' * (index % 50)}").symlink_to(f"target {index}")
    os.link(source / "small", source / "dir" / "hard")
    os.mkfifo(source / "fifo")
    assert run("mkfs.erofs", "-x-1", "-T1700000000", f"-E{form}", tmp_path / "image", source).returncode == 0
    reader = Bootstrap((tmp_path / "image").read_bytes())
    found = dict(reader.walk())
    expected = [b""]
    for top, directories, files in os.walk(os.fsencode(source)):
        expected += [os.path.relpath(os.path.join(top, name), os.fsencode(source)) for name in directories + files]
    assert sorted(found) == sorted(expected)
    for path, inode in found.items():
        stated = os.lstat(os.path.join(os.fsencode(source), path))
        assert (inode.mode, inode.nlink) == (stated.st_mode, stated.st_nlink), path
        assert (inode.uid, inode.gid) == (stated.st_uid, stated.st_gid), path
        assert inode.mtime_ns // 10**9 == 1_700_000_000, path
        assert reader.resolve(path) == inode.nid
        if stat.S_ISLNK(inode.mode):
            assert reader.readlink(inode.nid) == os.readlink(os.path.join(os.fsencode(source), path))
        elif stat.S_ISREG(inode.mode):
            data = reader.inline_data(inode.nid)
            assert data is not None
            assert data == Path(os.fsdecode(os.path.join(os.fsencode(source), path))).read_bytes()


def test_reader_refuses_compressed_images_by_name(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "zeros").write_bytes(bytes(1 << 20))
    assert run("mkfs.erofs", "-zlz4", tmp_path / "image", tmp_path / "source").returncode == 0
    with pytest.raises(UnsupportedError, match="LZ4_0PADDING"):
        Bootstrap((tmp_path / "image").read_bytes())
