"""Data spaces on disk: what is marked is verified, whatever happened in between."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rafsfs.errors import CacheBusyError, CacheFullError, FormatError, IntegrityError
from rafsfs.format.codec import chunk_digest
from rafsfs.format.space_table import SpaceTable, pack_record
from rafsfs.store.cache import Cache
from rafsfs.store.data_space import DataSpace, create, open_space_directory
from rafsfs.store.space_view import SpaceView

LENGTH = 50_000


def chunk(number: int) -> bytes:
    return random.Random(number).randbytes(LENGTH)


def make_table(count: int) -> SpaceTable:
    step = (LENGTH + 4095) // 4096 * 4096
    records = b"".join(pack_record(chunk_digest(chunk(i)), i * step, LENGTH) for i in range(count))
    return SpaceTable(records, count * step)


@pytest.fixture
def table() -> SpaceTable:
    return make_table(6)


@pytest.fixture
def directory(tmp_path: Path, table: SpaceTable) -> str:
    path = str(tmp_path / table.space_id.hex())
    create(path, table)
    return path


def marks(directory: str) -> bytes:
    return Path(directory, "present").read_bytes()


def test_a_stored_chunk_is_present_and_reads_back(directory: str) -> None:
    space, trusted = open_space_directory(directory)
    assert trusted
    space.store(2, chunk(2))
    assert space.missing(range(6)) == [0, 1, 3, 4, 5]
    assert (space.present_chunks, space.present_bytes, space.complete) == (1, LENGTH, False)
    assert space.read(2) == chunk(2)
    assert marks(directory) == b"\0\0\1\0\0\0"
    space.close()


def test_wrong_bytes_are_never_written_or_marked(directory: str) -> None:
    space, _ = open_space_directory(directory)
    for bad in (bytes(LENGTH), chunk(1), chunk(0)[:-1], chunk(0) + b"x"):
        with pytest.raises(IntegrityError):
            space.store(0, bad)
    assert marks(directory) == bytes(6)
    assert space.read(0) == bytes(LENGTH)
    space.close()


def test_a_sync_makes_marks_durable_and_tells_which(directory: str) -> None:
    space, _ = open_space_directory(directory)
    space.store(1, chunk(1))
    space.store(4, chunk(4))
    assert space.sync() == [1, 4]
    assert marks(directory) == b"\0\2\0\0\2\0"
    assert space.sync() == []
    space.close()


@pytest.mark.logs_warnings
def test_after_an_unclean_stop_unsynced_chunks_that_do_not_match_are_unmarked(directory: str) -> None:
    space, _ = open_space_directory(directory)
    space.write_record(clean=False)
    space.store(0, chunk(0))
    space.sync()
    space.store(1, chunk(1))
    space.store(2, chunk(2))
    space.close(clean=False)
    with open(os.path.join(directory, "data"), "r+b") as file:  # what a power cut leaves of chunk 2
        file.seek(make_table(6).extent(2)[0])
        file.write(bytes(LENGTH))
    again, trusted = open_space_directory(directory)
    assert not trusted
    assert again.recover() == 1
    assert again.missing(range(6)) == [2, 3, 4, 5]
    again.close()


def test_another_boot_is_an_unclean_stop(directory: str) -> None:
    path = Path(directory, "record")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "boot_id": "another"}))
    space, trusted = open_space_directory(directory)
    assert not trusted
    space.close()


def test_verify_drops_a_chunk_that_has_rotted(directory: str) -> None:
    space, _ = open_space_directory(directory)
    space.store(3, chunk(3))
    assert space.verify(3)
    with open(os.path.join(directory, "data"), "r+b") as file:
        file.seek(make_table(6).extent(3)[0] + 17)
        file.write(b"\xff\x00\xff")
    assert not space.verify(3)
    assert not space.is_present(3)
    assert space.present_bytes == 0
    space.close()


def damage(directory: str, name: str, how: str) -> None:
    path = Path(directory, name)
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(data[:-1])
    else:
        path.write_bytes(b"\xff" + data[1:])


@pytest.mark.parametrize(
    ("name", "how"),
    [(n, h) for n in ("chunks", "present", "data", "record") for h in ("missing", "short")] + [("chunks", "flipped")],
)
def test_a_damaged_directory_is_refused_and_the_cache_makes_it_anew(
    tmp_path: Path, table: SpaceTable, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache.open(str(tmp_path / "cache"))
    cache.open_space(table).store(0, chunk(0))
    directory = cache.space_directory(table.space_id)
    cache.close()
    damage(directory, name, how)
    with pytest.raises(FormatError):
        open_space_directory(directory)
    with caplog.at_level("CRITICAL"):
        cache = Cache.open(str(tmp_path / "cache"))
        space = cache.open_space(table)
        assert space.missing(range(6)) == list(range(6))
        cache.close()


def test_a_view_sees_what_the_daemon_marks(directory: str) -> None:
    space, _ = open_space_directory(directory)
    view = SpaceView(directory)
    assert not view.is_present(0, 1)
    space.store(0, chunk(0))
    space.store(1, chunk(1))
    assert view.is_present(0, 2)
    assert not view.is_present(0, 3)
    offset, _ = space.table.extent(1)
    buffer = bytearray(1000)
    view.read_into(memoryview(buffer), offset + 10)
    assert buffer == chunk(1)[10:1010]
    assert view.covering(offset, 1) == range(1, 2)
    view.close()
    space.close()


def test_one_daemon_per_cache_directory(tmp_path: Path) -> None:
    cache = Cache.open(str(tmp_path))
    with pytest.raises(CacheBusyError, match=f"pid {os.getpid()}"):
        Cache.open(str(tmp_path))
    assert cache.spaces() == []
    cache.close()
    Cache.open(str(tmp_path)).close()


def test_index_finds_durable_chunks_only_and_forgets_removed_spaces(tmp_path: Path, table: SpaceTable) -> None:
    cache = Cache.open(str(tmp_path))
    space = cache.open_space(table)
    space.store(5, chunk(5))
    assert cache.index.find(table.digest(5)) is None
    cache.sync()
    assert cache.index.find(table.digest(5)) == (table.space_id, 5)
    assert cache.remove_space(table.space_id) == LENGTH
    assert cache.index.find(table.digest(5)) is None
    assert cache.spaces() == []
    cache.close()


_WRITER = """
import sys
sys.path.insert(0, {root!r})
from tests.store.test_data_space import chunk, make_table
from rafsfs.store.cache import Cache
cache = Cache.open({path!r})
space = cache.open_space(make_table(200))
print("go", flush=True)
for number in range(200):
    space.store(number, chunk(number))
    if number % 20 == 19:
        cache.sync()
"""


@pytest.mark.io
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1])
def test_a_killed_writer_leaves_no_unverified_chunk_marked(tmp_path: Path, delay: float) -> None:
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER.format(root=root, path=str(tmp_path / "cache"))], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
    table = make_table(200)
    cache = Cache.open(str(tmp_path / "cache"))
    space = cache.open_space(table)
    for number in range(200):
        if space.is_present(number):
            assert space.read(number) == chunk(number)
    cache.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> object:
    where = tmp_path / "small"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", where], check=True)
    yield where
    subprocess.run(["umount", "-l", where], check=True)


@pytest.mark.mount
def test_a_full_disk_fails_the_chunk_and_heals_when_there_is_space(small_disk: Path, table: SpaceTable) -> None:
    directory = str(small_disk / table.space_id.hex())
    create(directory, table)
    space, _ = open_space_directory(directory)
    fill(small_disk / "ballast")
    with pytest.raises(CacheFullError):
        space.store(0, chunk(0))
    assert not space.is_present(0)
    (small_disk / "ballast").unlink()
    space.store(0, chunk(0))
    assert space.read(0) == chunk(0)
    space.close()


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return


def test_opening_twice_gives_one_object(tmp_path: Path, table: SpaceTable) -> None:
    cache = Cache.open(str(tmp_path))
    first: DataSpace = cache.open_space(table)
    assert cache.open_space(make_table(6)) is first is cache.opened_space(table.space_id)
    cache.close()


def test_a_view_stops_serving_a_chunk_that_is_found_damaged(directory: str) -> None:
    space, _ = open_space_directory(directory)
    for number in range(6):
        space.store(number, chunk(number))
    view = SpaceView(directory)
    assert view.is_present(0, 6)
    with open(os.path.join(directory, "data"), "r+b") as file:
        file.write(b"rot")
    assert not space.verify(0)
    assert not view.is_present(0, 1)
    view.close()
    space.close()
