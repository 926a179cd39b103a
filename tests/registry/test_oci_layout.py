"""What only a layout directory can show: its files, its lock, other writers, damage, full and foreign directories."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from rafsfs.errors import IntegrityError, NotFoundError, RemoteError, UnavailableError, UsageError
from rafsfs.registry.layout_upload import STALE_S
from rafsfs.registry.oci_layout import OciLayout
from rafsfs.types import Digest

from .test_conformance import noise, put_image, read_range, referrers

pytestmark = pytest.mark.io


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """Where the layout will be."""
    return tmp_path / "layout"


@pytest.fixture
def layout(top: Path) -> OciLayout:
    """A layout that does not exist yet."""
    return OciLayout(str(top), lock_timeout_s=0.2)


def files_below(top: Path) -> set[str]:
    return {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()}


async def test_a_layout_is_what_the_specification_says(layout: OciLayout, top: Path) -> None:
    descriptor, data = await put_image(layout, "x", tag="v1")
    assert json.loads((top / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = json.loads((top / "index.json").read_text())["manifests"]
    assert entry["digest"] == descriptor.digest.text
    assert entry["annotations"] == {"org.opencontainers.image.ref.name": "v1"}
    assert (top / "blobs/sha256" / descriptor.digest.hex).read_bytes() == data
    blobs = {f"blobs/sha256/{digest.hex}" for digest in (descriptor.digest, Digest.of(b"x"))}
    assert files_below(top) == {"oci-layout", "index.json", *blobs}, "no temporary file stays"


async def test_reading_makes_nothing(layout: OciLayout, top: Path) -> None:
    with pytest.raises(NotFoundError, match="not an OCI image layout"):
        await layout.resolve("v1")
    assert not await layout.has_blob(Digest.of(b"x"))
    assert not top.exists()


async def test_a_missing_tag_is_told_with_those_there_are(layout: OciLayout) -> None:
    await put_image(layout, "x", tag="v1")
    await put_image(layout, "y", tag="v2")
    with pytest.raises(NotFoundError, match="has no tag latest; it has v1, v2"):
        await layout.resolve("latest")


async def test_a_directory_that_is_something_else_is_left_alone(top: Path) -> None:
    top.mkdir()
    (top / "thesis.tex").write_text("do not touch")
    with pytest.raises(UsageError, match=r"holds 'thesis\.tex'"):
        await OciLayout(str(top)).put_blob(b"x")
    assert files_below(top) == {"thesis.tex"}
    with pytest.raises(UsageError, match="not a directory"):
        await OciLayout(str(top / "thesis.tex")).put_blob(b"x")


async def test_what_others_put_into_an_index_survives(layout: OciLayout, top: Path) -> None:
    await put_image(layout, "x", tag="v1")
    index = json.loads((top / "index.json").read_text())
    foreign = {
        "mediaType": "a/b",
        "digest": "sha512:" + "0" * 128,
        "size": 5,
        "platform": {"os": "linux"},
        "annotations": {"org.opencontainers.image.ref.name": "other", "their": "own"},
    }
    index["manifests"].append(foreign)
    index["annotations"] = {"kept": "yes"}
    (top / "index.json").write_text(json.dumps(index))
    await put_image(layout, "y", tag="v1")
    after = json.loads((top / "index.json").read_text())
    assert foreign in after["manifests"]
    assert after["annotations"] == {"kept": "yes"}
    with pytest.raises(RemoteError, match="malformed entry"):
        await layout.resolve("other")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"manifests": 5}', '{"manifests": [5]}', "[" * 100_000])
async def test_a_damaged_index_is_named(layout: OciLayout, top: Path, text: str) -> None:
    await put_image(layout, "x", tag="v1")
    (top / "index.json").write_text(text)
    with pytest.raises(RemoteError, match=r"index\.json cannot be used"):
        await layout.resolve("v1")


async def test_a_damaged_blob_is_never_returned_whole(layout: OciLayout, top: Path) -> None:
    descriptor, data = await put_image(layout, "x", tag="v1")
    path = top / "blobs/sha256" / descriptor.digest.hex
    path.write_bytes(data[:-1] + b"!")
    with pytest.raises(IntegrityError):
        await layout.get_manifest("v1")
    with pytest.raises(IntegrityError):
        await layout.get_blob(descriptor.digest, size=len(data))
    path.write_bytes(data[:-1])
    with pytest.raises(IntegrityError):
        await layout.get_blob(descriptor.digest, size=len(data))
    with pytest.raises(RemoteError, match="the layout is damaged"):
        await read_range(layout, descriptor.digest, 0, len(data), 10)


async def test_a_blob_that_shrinks_while_it_is_read_is_unavailable(layout: OciLayout, top: Path) -> None:
    digest = await layout.put_blob(noise(100_000))
    async with layout.open_range(digest, 0, 100_000) as stream:
        await stream.readinto(memoryview(bytearray(1000)))
        os.truncate(top / "blobs/sha256" / digest.hex, 2000)
        with pytest.raises(UnavailableError, match="shrank"):
            await stream.readinto(memoryview(bytearray(99_000)))


async def test_one_damaged_manifest_does_not_hide_the_other_referrers(layout: OciLayout, top: Path) -> None:
    subject, _ = await put_image(layout, "subject", tag="v1")
    bad, _ = await put_image(layout, "bad", subject=subject)
    good, _ = await put_image(layout, "good", subject=subject)
    (top / "blobs/sha256" / bad.digest.hex).write_bytes(b"{")
    assert [d.digest for d in await referrers(layout, subject.digest)] == [good.digest]


async def test_referrers_under_the_fallback_tag_are_found_too(layout: OciLayout, top: Path) -> None:
    subject, _ = await put_image(layout, "subject", tag="v1")
    listed = {"mediaType": "a/b", "digest": Digest.of(b"r").text, "size": 1, "artifactType": "x/trace"}
    index = json.dumps({"schemaVersion": 2, "manifests": [listed]}).encode()
    await layout.put_manifest(index, "application/vnd.oci.image.index.v1+json", tag=f"sha256-{subject.digest.hex}")
    assert [d.digest for d in await referrers(layout, subject.digest, "x/trace")] == [Digest.of(b"r")]


async def test_an_abandoned_upload_can_be_continued_and_is_cleaned_up_when_stale(layout: OciLayout, top: Path) -> None:
    data = noise(3 << 20)
    upload = await layout.begin_upload()
    await upload.write(data)
    await upload.abandon()
    await upload.abandon()
    (left,) = (top / ".uploads").iterdir()
    token = upload.resume_token
    again = await layout.begin_upload(token)
    assert again.offset == len(data)
    await again.commit(Digest.of(data))
    assert not (top / ".uploads").exists()

    upload = await layout.begin_upload()
    await upload.write(data)
    await upload.abandon()
    (left,) = (top / ".uploads").iterdir()
    old = left.stat().st_mtime - STALE_S - 60
    os.utime(left, (old, old))
    await (await layout.begin_upload()).abandon()
    assert not left.exists()
    assert files_below(top) == {"oci-layout", "index.json", f"blobs/sha256/{Digest.of(data).hex}"}


async def test_a_crash_in_an_upload_leaves_no_blob_and_its_torn_tail_is_found(layout: OciLayout, top: Path) -> None:
    data = noise(3 << 20)
    upload = await layout.begin_upload()
    await upload.write(data[: 2 << 20])
    token = upload.resume_token
    await upload.abandon()
    (left,) = (top / ".uploads").iterdir()
    with left.open("r+b") as file:  # a power cut: the length is there, the bytes are not
        file.seek(1 << 20)
        file.write(bytes(1 << 20))
    again = await layout.begin_upload(token)
    await again.write(data[again.offset :])
    with pytest.raises(IntegrityError):
        await again.commit(Digest.of(data))
    assert not await layout.has_blob(Digest.of(data))
    assert (await layout.begin_upload(token)).offset == 0, "what cannot be used is not offered again"


async def test_a_full_disk_is_said_and_the_write_can_be_repeated(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        layout = OciLayout(str(small / "layout"))
        with pytest.raises(RemoteError, match="no space left"):
            await layout.put_blob(noise(3 << 20))
        data = noise(3 << 20)
        upload = await layout.begin_upload()
        await upload.write(data[: 1 << 20])
        with pytest.raises(RemoteError, match="no space left"):
            await upload.write(data[1 << 20 :])
        assert upload.offset == 1 << 20
        subprocess.run(["mount", "-o", "remount,size=20m", str(small)], check=True)
        await upload.write(data[1 << 20 :])
        await upload.commit(Digest.of(data))
        assert await layout.get_blob(Digest.of(data), size=len(data)) == data
        assert files_below(small / "layout") == {"oci-layout", "index.json", f"blobs/sha256/{Digest.of(data).hex}"}
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


async def test_a_lock_that_is_never_let_go_ends_in_an_error(layout: OciLayout, top: Path) -> None:
    await put_image(layout, "x", tag="v1")
    with (top / "oci-layout").open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UnavailableError, match="stayed locked by another process"):
            await put_image(layout, "y", tag="v2")
    await put_image(layout, "y", tag="v2")


_WRITER = """
import sys, trio
from rafsfs.registry.oci_layout import OciLayout
async def main():
    layout = OciLayout(sys.argv[1])
    for n in range(10):
        data = b'{"n":"%s-%d"}' % (sys.argv[2].encode(), n)
        await layout.put_manifest(data, "a/b", tag=f"{sys.argv[2]}-{n}")
trio.run(main)
"""


async def test_processes_that_make_and_write_one_layout_lose_nothing(top: Path, layout: OciLayout) -> None:
    async with trio.open_nursery() as nursery:
        for name in ("one", "two", "three"):
            nursery.start_soon(trio.run_process, [sys.executable, "-c", _WRITER, str(top), name])
    for name in ("one", "two", "three"):
        for number in range(10):
            await layout.resolve(f"{name}-{number}")
    assert not [path for path in files_below(top) if "tmp" in path]


async def test_big_writes_do_not_hold_the_event_loop(layout: OciLayout) -> None:
    data = noise(32 << 20)
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        last = trio.current_time()
        while True:
            await trio.sleep(0.001)
            now = trio.current_time()
            longest, last = max(longest, now - last), now

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        upload = await layout.begin_upload()
        await upload.write(data)
        await upload.commit(Digest.of(data))
        await layout.get_blob(Digest.of(data), size=len(data))
        nursery.cancel_scope.cancel()
    # Hashing 32 MiB takes 20 ms and more; the bound leaves room for a busy machine.
    assert longest < 0.25
