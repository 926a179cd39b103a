"""Building images into an OCI layout and reading them back."""

from __future__ import annotations

import json
import os
import random
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from builder.build import BuildOptions, BuildResult, build_image
from builder.journal import Journal
from rafsfs.errors import SourceError, UnavailableError, UsageError
from rafsfs.image import Image, ImageReader, load_image
from rafsfs.interfaces import BlobUpload
from rafsfs.registry.oci_layout import OciLayout
from rafsfs.types import Digest

SMALL = BuildOptions(chunk_size=64 << 10, space_bound=1 << 20)


def content(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    top = tmp_path / "source"
    (top / "deep" / "er").mkdir(parents=True)
    (top / "large").write_bytes(content(3_500_000, 1))
    (top / "copy").write_bytes(content(3_500_000, 1))
    (top / "deep" / "medium").write_bytes(content(300_000, 2))
    (top / "deep" / "er" / "repeats").write_bytes(content(64 << 10, 3) * 5)
    (top / "text").write_bytes(b"all work and no play\n" * 20_000)
    (top / "tiny").write_bytes(b"{}")
    (top / "empty").write_bytes(b"")
    (top / "link").symlink_to("tiny")
    os.link(top / "tiny", top / "deep" / "tiny-too")
    os.mkfifo(top / "fifo")
    with (top / "sparse").open("wb") as file:
        file.truncate(2 << 20)
        file.seek(1 << 20)
        file.write(content(10_000, 4))
    return top


async def build(source: Path, where: Path, options: BuildOptions = SMALL, **more: object) -> BuildResult:
    return await build_image(str(source), OciLayout(str(where)), "v1", options, **more)  # type: ignore[arg-type]


async def read_back(where: Path) -> tuple[Image, dict[str, bytes]]:
    store = OciLayout(str(where))
    image = await load_image(store, "v1")
    reader = ImageReader(store, image)
    files = {}
    for path, inode in image.bootstrap.walk():
        if stat.S_ISREG(inode.mode):
            files[os.fsdecode(path)] = b"".join([bytes(part) async for part in reader.read_file(inode.nid)])
    return image, files


def files_of(source: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(source)): path.read_bytes()
        for path in source.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


async def test_what_was_built_reads_back_equal(source: Path, tmp_path: Path) -> None:
    result = await build(source, tmp_path / "layout")
    image, files = await read_back(tmp_path / "layout")
    assert files == files_of(source)
    assert result.files == len(files) - 1  # the hard link is one file
    assert result.digest == str(image.manifest.digest)
    assert result.input_bytes == sum(len(data) for data in files.values()) - len(b"{}")
    assert result.data_bytes == image.chunk_map.data_bytes
    assert result.stored_bytes == sum(blob.size for blob in image.manifest.blobs)
    assert result.new_chunks + result.reused_chunks == image.chunk_map.chunk_count


async def test_identical_files_share_their_bytes_and_repeated_chunks_are_stored_once(
    source: Path, tmp_path: Path
) -> None:
    result = await build(source, tmp_path / "layout")
    image, _ = await read_back(tmp_path / "layout")
    large, copy = (image.bootstrap.resolve(name) for name in (b"large", b"copy"))
    assert large is not None
    assert copy is not None
    assert image.bootstrap.extents(large) == image.bootstrap.extents(copy)
    assert result.reused_chunks >= 4
    assert result.data_bytes < result.input_bytes - 3_500_000


async def test_holes_are_not_stored(source: Path, tmp_path: Path) -> None:
    await build(source, tmp_path / "layout")
    image, _ = await read_back(tmp_path / "layout")
    nid = image.bootstrap.resolve(b"sparse")
    assert nid is not None
    assert sum(extent.length for extent in image.bootstrap.extents(nid) if extent.space is not None) <= 16384


async def test_the_same_input_gives_the_same_digest_whatever_threads_and_directory_order(
    source: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    again.mkdir()
    for name in sorted(os.listdir(source), reverse=True):  # another order in the directory
        subprocess.run(["cp", "-a", "--sparse=auto", source / name, again / name], check=True)
    os.unlink(again / "deep" / "tiny-too")
    os.link(again / "tiny", again / "deep" / "tiny-too")
    for path in [source, *source.rglob("*"), again, *again.rglob("*")]:
        os.utime(path, ns=(0, 1_000_000_007), follow_symlinks=False)
    digests = {
        (
            await build(
                top,
                tmp_path / f"layout-{number}",
                BuildOptions(chunk_size=64 << 10, space_bound=1 << 20, threads=threads),
            )
        ).digest
        for number, (top, threads) in enumerate([(source, 1), (source, 4), (again, 2)])
    }
    assert len(digests) == 1


async def test_a_single_file_becomes_a_directory_of_it(source: Path, tmp_path: Path) -> None:
    await build(source / "large", tmp_path / "layout")
    _, files = await read_back(tmp_path / "layout")
    assert files == {"large": (source / "large").read_bytes()}


async def test_an_empty_directory_is_an_image(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    result = await build(tmp_path / "nothing", tmp_path / "layout")
    image, files = await read_back(tmp_path / "layout")
    assert (files, result.stored_bytes, image.manifest.blobs) == ({}, 0, ())


async def test_a_large_file_of_zeros_fills_equal_data_spaces(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "zeros").write_bytes(bytes(3 << 20))
    await build(tmp_path / "source", tmp_path / "layout")
    image, files = await read_back(tmp_path / "layout")
    assert files == {"zeros": bytes(3 << 20)}
    assert len({slot.tag for slot in image.bootstrap.spaces}) == 1 < len(image.bootstrap.spaces)


async def test_excluded_paths_are_left_out(source: Path, tmp_path: Path) -> None:
    await build(source, tmp_path / "layout", BuildOptions(exclude=("deep/", "*rge", "copy")))
    _, files = await read_back(tmp_path / "layout")
    assert set(files) == {"text", "tiny", "empty", "sparse"}


def while_reading(act: Callable[[], object]) -> Callable[[int, int], None]:
    """Return a progress callback that acts once, when the first bytes have been committed."""
    acted: list[object] = []

    def progress(done: int, total: int) -> None:
        if not acted and done < total:
            acted.append(act())

    return progress


@pytest.mark.parametrize("what", ["changed", "vanished"])
async def test_a_file_that_changes_under_the_reader_ends_the_build_and_leaves_no_tag(tmp_path: Path, what: str) -> None:
    top = tmp_path / "source"
    top.mkdir()
    for number in range(8):
        (top / f"file-{number}").write_bytes(content(16 << 20, number))
    last = top / "file-7"

    def act() -> None:
        if what == "changed":
            with last.open("r+b") as file:
                file.write(b"other")
        else:
            last.unlink()

    with pytest.raises(SourceError, match=f"file-7 {what} while it was read"):
        await build(top, tmp_path / "layout", BuildOptions(threads=1, codec="raw"), progress=while_reading(act))
    index = tmp_path / "layout" / "index.json"
    assert not index.exists() or json.loads(index.read_text())["manifests"] == []  # none if nothing was sent yet


async def test_a_missing_source_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        await build(tmp_path / "nowhere", tmp_path / "layout")


@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(chunk_size=100_000),
        BuildOptions(chunk_size=32 << 20),
        BuildOptions(chunk_size=1 << 20, space_bound=1 << 19),
        BuildOptions(codec="lz4"),
        BuildOptions(threads=0),
    ],
)
async def test_options_out_of_range_are_refused(source: Path, tmp_path: Path, options: BuildOptions) -> None:
    with pytest.raises(UsageError):
        await build(source, tmp_path / "layout", options)


class ResumableLayout(OciLayout):
    """A layout whose uploads can be resumed, and break after a number of bytes: what a registry does."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.sessions: dict[str, bytearray] = {}
        self.taken = 0
        self.breaks_after: int | None = None

    async def begin_upload(self, resume_token: str | None = None) -> BlobUpload:
        token = resume_token if resume_token in self.sessions else f"session-{len(self.sessions)}"
        assert token is not None
        self.sessions.setdefault(token, bytearray())
        return _Session(self, token)


class _Session:
    def __init__(self, store: ResumableLayout, token: str) -> None:
        self._store = store
        self._token = token

    @property
    def offset(self) -> int:
        return len(self._store.sessions[self._token])

    @property
    def resume_token(self) -> str | None:
        return self._token

    async def write(self, *parts: bytes | bytearray | memoryview) -> None:
        for data in parts:
            if self._store.breaks_after is not None and self._store.taken + len(data) > self._store.breaks_after:
                raise UnavailableError("the store went away")
            self._store.taken += len(data)
            self._store.sessions[self._token] += data

    async def commit(self, digest: Digest, *, computed: bool = False) -> None:
        assert await OciLayout.put_blob(self._store, self._store.sessions[self._token]) == digest

    async def abandon(self) -> None:
        pass


@pytest.fixture
def heavy(tmp_path: Path) -> Path:
    top = tmp_path / "heavy"
    top.mkdir()
    for number in range(3):
        (top / f"file-{number}").write_bytes(content(32 << 20, number))
    return top


HEAVY = BuildOptions(codec="raw", threads=2)


async def test_an_interrupted_push_continues_where_the_store_stopped(heavy: Path, tmp_path: Path) -> None:
    store = ResumableLayout(str(tmp_path / "layout"))
    store.breaks_after = 64 << 20
    with pytest.raises(UnavailableError, match="went away"):
        await build_image(str(heavy), store, "v1", HEAVY, journal=Journal(str(tmp_path / "state"), store.name))
    first, store.taken, store.breaks_after = store.taken, 0, None
    result = await build_image(str(heavy), store, "v1", HEAVY, journal=Journal(str(tmp_path / "state"), store.name))
    assert first > 40 << 20
    assert store.taken == result.sent_bytes == result.stored_bytes - first
    _, files = await read_back(tmp_path / "layout")
    assert files == files_of(heavy)


async def test_a_finished_blob_is_not_sent_again(heavy: Path, tmp_path: Path) -> None:
    store = OciLayout(str(tmp_path / "layout"))
    sent = [
        (
            await build_image(str(heavy), store, "v1", HEAVY, journal=Journal(str(tmp_path / "state"), store.name))
        ).sent_bytes
        for _ in range(2)
    ]
    assert sent == [96 << 20, 0]


async def test_a_journal_that_lies_costs_a_longer_push_and_nothing_else(heavy: Path, tmp_path: Path) -> None:
    store = ResumableLayout(str(tmp_path / "layout"))
    journal = Journal(str(tmp_path / "state"), store.name)
    honest = await build_image(str(heavy), store, "v1", HEAVY, journal=journal)
    (state,) = (tmp_path / "state" / "push").iterdir()
    entries = json.loads(state.read_text())
    other = await store.put_blob(b"something else")
    for key in entries["entries"]:
        entries["entries"][key] = {"digest": str(other), "size": 14}
    state.write_text(json.dumps(entries))
    again = await build_image(str(heavy), store, "v2", HEAVY, journal=Journal(str(tmp_path / "state"), store.name))
    assert again.digest == honest.digest
    state.write_text("{ not json")
    assert (
        await build_image(str(heavy), store, "v3", HEAVY, journal=Journal(str(tmp_path / "state"), store.name))
    ).digest == honest.digest
