"""The FUSE operations as functions: attributes, reads over holes and data spaces, errors as errno."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pyfuse3
import pytest

from rafsfs.errors import DeadlineError, FormatError, RafsError, UsageError
from rafsfs.format.bootstrap import Bootstrap
from rafsfs.format.bootstrap_writer import Node, SpaceSpec, write_bootstrap
from rafsfs.format.chunk_index import Extent
from rafsfs.format.codec import chunk_digest
from rafsfs.format.space_table import SpaceTable, pack_record
from rafsfs.fuse.errno import errno_of
from rafsfs.fuse.operations import ImageOperations
from rafsfs.store.data_space import DataSpace, create, open_space_directory
from rafsfs.store.space_view import SpaceView

CHUNK = 1 << 16
BOUND = 1 << 20
DATA = [random.Random(seed).randbytes(BOUND) for seed in (1, 2)]
SIZE = BOUND + 300_000
FILE = DATA[0] + DATA[1][:300_000]
SPARSE_SIZE = 3 << 20


def table_of(data: bytes) -> SpaceTable:
    starts = range(0, BOUND, CHUNK)
    records = (pack_record(chunk_digest(data[start : start + CHUNK]), start, CHUNK) for start in starts)
    return SpaceTable(b"".join(records), BOUND)


class Mounted:
    """Operations over two data spaces that fill when they are asked to."""

    def __init__(self, tmp_path: Path) -> None:
        self.spaces: list[DataSpace] = []
        views = []
        tables = [table_of(data) for data in DATA]
        for table in tables:
            directory = str(tmp_path / table.space_id.hex())
            create(directory, table)
            self.spaces.append(open_space_directory(directory)[0])
            views.append(SpaceView(directory))
        self.views = views
        root = Node(stat.S_IFDIR | 0o755, mtime_ns=-1)
        mode = stat.S_IFREG | 0o644
        root.children = {
            b"two-spaces": Node(mode, size=SIZE, extents=[Extent(0, BOUND, 0, 0), Extent(BOUND, SIZE - BOUND, 1, 0)]),
            b"sparse": Node(mode, size=SPARSE_SIZE, extents=[Extent(1 << 20, 1 << 19, 1, 1 << 19)]),
            b"small": Node(mode, inline=b"content", xattrs={b"user.a": b"1", b"trusted.b": b"2"}),
            b"link": Node(stat.S_IFLNK | 0o777, target=b"small"),
            b"device": Node(stat.S_IFCHR | 0o600, rdev=os.makedev(5, 300)),
        }
        specs = [SpaceSpec(table.space_id, BOUND) for table in tables]
        self.bootstrap = Bootstrap(write_bootstrap(root, specs))
        self.operations = ImageOperations(self.bootstrap, views, self.ensure, self.hint)
        self.asked: list[tuple[int, range, range]] = []
        self.hints: list[tuple[int, range, range]] = []
        self.failure: RafsError | None = None

    def hint(self, space: int, chunks: range, own: range) -> None:
        self.hints.append((space, chunks, own))

    async def ensure(self, space: int, chunks: range, own: range) -> None:
        self.asked.append((space, chunks, own))
        if self.failure:
            raise self.failure
        for index in chunks:
            self.spaces[space].store(index, DATA[space][index * CHUNK : (index + 1) * CHUNK])

    async def open(self, name: bytes) -> int:
        entry = await self.operations.lookup(pyfuse3.ROOT_INODE, name)
        return (await self.operations.open(entry.st_ino, os.O_RDONLY, None)).fh  # type: ignore[no-any-return]

    async def read(self, name: bytes, off: int, size: int) -> bytes:
        return bytes(await self.operations.read(await self.open(name), off, size))


@pytest.fixture
async def mounted(tmp_path: Path) -> AsyncIterator[Mounted]:
    found = Mounted(tmp_path)
    yield found
    for view in found.views:
        view.close()
    for space in found.spaces:
        space.close()


async def test_a_read_asks_for_missing_chunks_once_and_counts_what_was_there(mounted: Mounted) -> None:
    assert await mounted.read(b"two-spaces", 10, 1000) == FILE[10:1010]
    assert mounted.asked == [(0, range(1), range(16))]
    assert mounted.operations.cache_bytes == 0
    assert await mounted.read(b"two-spaces", 20, 1000) == FILE[20:1020]
    assert len(mounted.asked) == 1
    assert mounted.operations.cache_bytes == 1000
    assert mounted.hints == [(0, range(1), range(16))]


async def test_the_daemon_is_told_of_a_hit_once_and_only_while_something_is_missing_ahead(mounted: Mounted) -> None:
    await mounted.read(b"two-spaces", 0, 4 * CHUNK)
    for _ in range(3):
        await mounted.read(b"two-spaces", CHUNK, CHUNK)
    assert mounted.hints == [(0, range(1, 2), range(16))]
    await mounted.read(b"two-spaces", 0, BOUND)
    await mounted.read(b"two-spaces", 2 * CHUNK, CHUNK)
    assert len(mounted.hints) == 1


async def test_a_read_over_the_end_of_a_data_space_comes_from_both(mounted: Mounted) -> None:
    assert await mounted.read(b"two-spaces", BOUND - 500, 1000) == FILE[BOUND - 500 : BOUND + 500]
    assert [space for space, _, _ in mounted.asked] == [0, 1]


async def test_reads_end_at_the_end_of_the_file(mounted: Mounted) -> None:
    assert await mounted.read(b"two-spaces", SIZE - 5, 100) == FILE[-5:]
    assert await mounted.read(b"two-spaces", SIZE, 100) == b""
    assert await mounted.read(b"two-spaces", SIZE + 10, 100) == b""
    assert await mounted.read(b"small", 3, 100) == b"tent"


async def test_holes_read_as_zeros_without_asking_anybody(mounted: Mounted) -> None:
    assert await mounted.read(b"sparse", 100, 5000) == bytes(5000)
    assert mounted.asked == []
    around = await mounted.read(b"sparse", (1 << 20) - 100, 200)
    assert around == bytes(100) + DATA[1][1 << 19 : (1 << 19) + 100]


async def test_a_read_larger_than_the_buffer_is_served_whole(mounted: Mounted) -> None:
    assert await mounted.read(b"two-spaces", 0, SIZE) == FILE


@pytest.mark.logs_warnings
async def test_a_failed_read_is_its_errno_and_one_line_and_the_next_one_works(
    mounted: Mounted, logged_warnings: list[str]
) -> None:
    mounted.failure = DeadlineError("chunk 0 of blob sha256:00 did not come")
    for _ in range(3):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await mounted.read(b"two-spaces", 0, 10)
        assert caught.value.errno == errno.EIO
    assert len(logged_warnings) == 1
    assert "sha256:00" in logged_warnings[0]
    mounted.failure = None
    assert await mounted.read(b"two-spaces", 0, 10) == FILE[:10]


async def test_attributes(mounted: Mounted) -> None:
    operations = mounted.operations
    found = await operations.lookup(pyfuse3.ROOT_INODE, b"sparse")
    assert (found.st_size, found.st_blocks, found.st_nlink) == (SPARSE_SIZE, (1 << 19) // 512, 1)
    assert found.st_ino == mounted.bootstrap.resolve(b"sparse")
    root = await operations.getattr(pyfuse3.ROOT_INODE)
    assert (root.st_ino, root.st_mtime_ns, root.st_nlink) == (pyfuse3.ROOT_INODE, -1, 2)
    assert (await operations.lookup(pyfuse3.ROOT_INODE, b"device")).st_rdev == os.makedev(5, 300)
    assert (await operations.lookup(pyfuse3.ROOT_INODE, b"nothing")).st_ino == 0


async def test_links_and_xattrs(mounted: Mounted) -> None:
    operations = mounted.operations
    link = await operations.lookup(pyfuse3.ROOT_INODE, b"link")
    assert await operations.readlink(link.st_ino, None) == b"small"
    small = await operations.lookup(pyfuse3.ROOT_INODE, b"small")
    assert await operations.getxattr(small.st_ino, b"user.a", None) == b"1"
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await operations.getxattr(small.st_ino, b"user.z", None)
    assert caught.value.errno == errno.ENODATA
    assert set(await operations.listxattr(small.st_ino, None)) == {b"user.a", b"trusted.b"}


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC])
async def test_opening_for_writing_is_refused(mounted: Mounted, flags: int) -> None:
    small = await mounted.operations.lookup(pyfuse3.ROOT_INODE, b"small")
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await mounted.operations.open(small.st_ino, flags, None)
    assert caught.value.errno == errno.EROFS


@pytest.mark.logs_warnings
async def test_an_inode_that_does_not_exist_is_an_error_not_a_crash(mounted: Mounted) -> None:
    for number in (0, 1 << 40, (1 << 64) - 1):
        with pytest.raises(pyfuse3.FUSEError):
            await mounted.operations.getattr(number)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FormatError("x"), errno.EIO),
        (UsageError("x"), errno.EINVAL),
        (OSError(errno.ENOSPC, "x"), errno.ENOSPC),
        (MemoryError(), errno.ENOMEM),
        (ZeroDivisionError(), errno.EIO),
    ],
)
def test_errno_of(error: BaseException, code: int) -> None:
    assert errno_of(error) == code
