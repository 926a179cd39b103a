"""What every image store promises, asked of all of them: docker-registry open, with TLS, with tokens; OCI layouts.

A test here knows the protocol in rafsfs/interfaces.py and nothing else.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

import pytest
import trio

from rafsfs.errors import IntegrityError, NotFoundError, RemoteError, UsageError
from rafsfs.interfaces import ImageStore, ThreadedStream
from rafsfs.registry.reference import parse_reference
from rafsfs.registry.store import RegistryOptions, open_store
from rafsfs.types import Descriptor, Digest
from tests.support.registry import running_registry, running_token_registry

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
EMPTY = Digest.of(b"")
KINDS = ("open", "tls", "token", "oci")

Opener = Callable[[str], AbstractAsyncContextManager[ImageStore]]


@pytest.fixture(scope="module", params=KINDS)
def opener(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opener]:
    """Open stores of one kind by repository name; the same name is the same store."""
    top = tmp_path_factory.mktemp(request.param)
    if request.param == "oci":
        yield lambda name: open_store(parse_reference(f"oci:{top / name}"), RegistryOptions())
    elif request.param == "open":
        with running_registry(top) as registry:
            yield lambda name: open_store(parse_reference(f"{registry.address}/{name}"), RegistryOptions())
    elif request.param == "tls":
        with running_registry(top, tls=True, client_certificate=True) as registry:
            options = RegistryOptions(ca_file=str(registry.ca_file), client_cert=str(registry.client_cert))
            yield lambda name: open_store(parse_reference(f"{registry.address}/{name}"), options)
    else:
        with running_token_registry(top) as registry:
            auth = base64.b64encode(f"{registry.username}:{registry.password}".encode()).decode()
            (top / "config.json").write_text(json.dumps({"auths": {registry.address: {"auth": auth}}}))
            options = RegistryOptions(docker_config=str(top))
            yield lambda name: open_store(parse_reference(f"{registry.address}/{name}"), options)


@pytest.fixture
async def store(opener: Opener, request: pytest.FixtureRequest) -> AsyncIterator[ImageStore]:
    """A store of its own for each test."""
    name = request.node.originalname.removeprefix("test_")[:60]
    async with opener(f"tests/{name}") as store:
        yield store


pytestmark = pytest.mark.io


def noise(size: int, seed: int = 1) -> bytes:
    """Bytes of which no two ranges are alike."""
    return random.Random(seed).randbytes(size)


async def put_image(
    store: ImageStore, text: str, *, tag: str | None = None, subject: Descriptor | None = None, kind: str = "x/config"
) -> tuple[Descriptor, bytes]:
    """Store a small, valid manifest."""
    config = text.encode()
    digest = await store.put_blob(config)
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": kind,
        "config": {"mediaType": kind, "digest": digest.text, "size": len(config)},
        "layers": [{"mediaType": kind, "digest": digest.text, "size": len(config)}],
        "annotations": {"text": text},
    }
    if subject is not None:
        document["subject"] = {
            "mediaType": subject.media_type,
            "digest": subject.digest.text,
            "size": subject.size,
        }
    data = json.dumps(document).encode()
    return await store.put_manifest(data, MANIFEST, tag=tag, subject=subject), data


async def upload(store: ImageStore, data: bytes, step: int) -> Digest:
    """Store a blob by an upload in writes of `step` bytes."""
    upload = await store.begin_upload()
    for start in range(0, len(data), step):
        await upload.write(memoryview(data)[start : start + step])
        assert upload.offset == min(start + step, len(data))
    digest = Digest.of(data)
    await upload.commit(digest)
    return digest


async def read_range(store: ImageStore, digest: Digest, offset: int, length: int, step: int) -> bytes:
    """Read a range in pieces."""
    out = bytearray(length)
    view = memoryview(out)
    async with store.open_range(digest, offset, length) as stream:
        for start in range(0, length, step):
            await stream.readinto(view[start : start + step])
    return bytes(out)


async def referrers(store: ImageStore, digest: Digest, kind: str | None = None) -> list[Descriptor]:
    """Return all referrers."""
    async with aclosing(store.referrers(digest, kind)) as found:  # type: ignore[type-var]
        return [descriptor async for descriptor in found]


async def test_a_small_blob_comes_back_as_it_was(store: ImageStore) -> None:
    data = noise(70_000)
    assert not await store.has_blob(Digest.of(data))
    digest = await store.put_blob(data)
    assert digest == Digest.of(data)
    assert await store.has_blob(digest)
    assert await store.get_blob(digest, size=len(data)) == data
    assert await store.put_blob(memoryview(data)) == digest, "storing it again changes nothing"


async def test_the_empty_blob_is_a_blob(store: ImageStore) -> None:
    with pytest.raises(NotFoundError):
        await store.get_blob(Digest.of(b"not there"), size=0)
    assert await store.put_blob(b"") == EMPTY
    assert await store.get_blob(EMPTY, size=0) == b""


async def test_ranges_are_exactly_what_was_asked_for(store: ImageStore) -> None:
    data = noise(3_000_001)
    digest = await upload(store, data, 700_000)
    for offset, length, step in ((0, 1, 1), (0, len(data), 1 << 20), (1_234_567, 1_000_003, 77_777), (3_000_000, 1, 1)):
        assert await read_range(store, digest, offset, length, step) == data[offset : offset + length]


async def test_many_ranges_at_once(store: ImageStore) -> None:
    data = noise(4 << 20)
    digest = await store.put_blob(data)
    results: dict[int, bytes] = {}

    async def read(offset: int) -> None:
        results[offset] = await read_range(store, digest, offset, 100_000, 30_000)

    async with trio.open_nursery() as nursery:
        for offset in range(0, 4_000_000, 100_000):
            nursery.start_soon(read, offset)
    assert all(results[offset] == data[offset : offset + 100_000] for offset in results)
    assert len(results) == 40


async def test_a_thread_reads_the_same_bytes_and_no_more_than_the_range(
    store: ImageStore, request: pytest.FixtureRequest
) -> None:
    data = noise(3_000_001)
    digest = await store.put_blob(data)
    async with store.open_range(digest, 5, 2_000_000) as stream:
        assert isinstance(stream, ThreadedStream)
        read_into = stream.blocking()
        assert (read_into is None) == (request.node.callspec.params["opener"] == "tls")
        if read_into is None:
            return
        out = bytearray(2_000_000)
        for start in range(0, len(out), 333_333):
            await trio.to_thread.run_sync(read_into, memoryview(out)[start : start + 333_333])
        assert out == data[5:2_000_005]
        with pytest.raises(ValueError):
            await trio.to_thread.run_sync(read_into, memoryview(bytearray(1)))
    assert await read_range(store, digest, 5, 5000, 999) == data[5:5005], "and its connection is good for the next"


async def test_more_than_the_range_cannot_be_read(store: ImageStore) -> None:
    digest = await store.put_blob(noise(1000))
    async with store.open_range(digest, 10, 20) as stream:
        await stream.readinto(memoryview(bytearray(15)))
        with pytest.raises(ValueError):
            await stream.readinto(memoryview(bytearray(6)))
        await stream.readinto(memoryview(bytearray(5)))


async def test_a_range_past_the_end_is_refused(store: ImageStore) -> None:
    digest = await store.put_blob(noise(1000))
    with pytest.raises(RemoteError):
        async with store.open_range(digest, 900, 200) as stream:
            await stream.readinto(memoryview(bytearray(200)))
    assert await read_range(store, digest, 900, 100, 100) == noise(1000)[900:], "and the store is none the worse"


async def test_a_cancelled_read_leaves_the_store_usable(store: ImageStore) -> None:
    data = noise(2 << 20)
    digest = await store.put_blob(data)
    async with store.open_range(digest, 0, len(data)) as stream:
        await stream.readinto(memoryview(bytearray(1000)))
        with trio.CancelScope() as scope:
            scope.cancel()
            await stream.readinto(memoryview(bytearray(1 << 20)))
    assert await read_range(store, digest, 5, 5000, 999) == data[5:5005]


async def test_what_is_not_there_is_not_found(store: ImageStore) -> None:
    digest = Digest.of(b"nobody stored this")
    await put_image(store, "the store itself exists")
    assert not await store.has_blob(digest)
    with pytest.raises(NotFoundError):
        await store.get_blob(digest, size=18)
    with pytest.raises(NotFoundError):
        async with store.open_range(digest, 0, 1):
            pass
    for reference in ("v1", digest.text):
        with pytest.raises(NotFoundError):
            await store.resolve(reference)
        with pytest.raises(NotFoundError):
            await store.get_manifest(reference)


async def test_an_empty_store_has_nothing(store: ImageStore) -> None:
    with pytest.raises(NotFoundError):
        await store.resolve("latest")
    assert not await store.has_blob(EMPTY)


async def test_a_blob_of_another_size_than_promised_is_refused(store: ImageStore) -> None:
    digest = await store.put_blob(noise(1000))
    for size in (999, 1001):
        with pytest.raises((IntegrityError, RemoteError)):
            await store.get_blob(digest, size=size)


async def test_uploads_of_any_step_make_the_same_blob(store: ImageStore) -> None:
    for size, step in ((10, 3), (9 << 20, 1 << 20), ((16 << 20) + 5, 5 << 20), (17 << 20, 17 << 20)):
        data = noise(size, seed=size)
        digest = await upload(store, data, step)
        assert await store.get_blob(digest, size=size) == data


async def test_an_upload_is_invisible_until_it_is_committed(store: ImageStore) -> None:
    data = noise(9 << 20)
    upload = await store.begin_upload()
    await upload.write(data)
    assert not await store.has_blob(Digest.of(data))
    await upload.commit(Digest.of(data))
    assert await store.has_blob(Digest.of(data))


async def test_an_upload_of_other_bytes_than_its_digest_is_refused(store: ImageStore) -> None:
    for size in (1000, 9 << 20):
        data = noise(size)
        upload = await store.begin_upload()
        await upload.write(data)
        with pytest.raises(IntegrityError):
            await upload.commit(Digest.of(data + b"!"))
        assert not await store.has_blob(Digest.of(data + b"!"))


async def test_an_abandoned_upload_is_continued(opener: Opener) -> None:
    data = noise(20 << 20)
    async with opener("tests/continued") as store:
        upload = await store.begin_upload()
        assert upload.offset == 0
        await upload.write(memoryview(data)[: 17 << 20])
        token = upload.resume_token
        await upload.abandon()
    assert token is not None
    async with opener("tests/continued") as store:
        upload = await store.begin_upload(token)
        assert 8 << 20 <= upload.offset <= 17 << 20
        await upload.write(memoryview(data)[upload.offset :])
        await upload.commit(Digest.of(data))
        assert await store.get_blob(Digest.of(data), size=len(data)) == data


async def test_a_token_that_means_nothing_starts_anew(store: ImageStore) -> None:
    data = noise(1000)
    upload = await store.begin_upload()
    await upload.write(data)
    spent = upload.resume_token
    await upload.commit(Digest.of(data))
    for token in (spent, "", "nonsense", "upload1:e30=", "layout1:../../../etc/passwd", "upload1:" + "A" * 9999):
        again = await store.begin_upload(token)
        assert again.offset == 0
        await again.write(data)
        await again.commit(Digest.of(data))


async def test_two_uploads_of_the_same_blob_do_not_disturb_each_other(store: ImageStore) -> None:
    data = noise(1 << 20)
    one, two = await store.begin_upload(), await store.begin_upload()
    for start in range(0, len(data), 1 << 18):
        await one.write(data[start : start + (1 << 18)])
        await two.write(data[start : start + (1 << 18)])
    await one.commit(Digest.of(data))
    await two.commit(Digest.of(data))
    assert await store.get_blob(Digest.of(data), size=len(data)) == data


async def test_a_manifest_is_found_by_tag_and_by_digest(store: ImageStore) -> None:
    descriptor, data = await put_image(store, "tagged", tag="v1")
    assert descriptor == Descriptor(MANIFEST, Digest.of(data), len(data))
    for reference in ("v1", descriptor.digest.text):
        assert await store.resolve(reference) == descriptor
        assert await store.get_manifest(reference) == (descriptor, data)


async def test_a_tag_moves_and_the_old_manifest_stays(store: ImageStore) -> None:
    first, first_data = await put_image(store, "first", tag="v1")
    second, _ = await put_image(store, "second", tag="v1")
    assert await store.resolve("v1") == second
    assert await store.get_manifest(first.digest.text) == (first, first_data)
    await put_image(store, "first", tag="v2")
    assert await store.resolve("v2") == first


async def test_a_manifest_without_a_tag_is_found_by_digest_only(store: ImageStore) -> None:
    descriptor, data = await put_image(store, "untagged")
    assert (await store.get_manifest(descriptor.digest.text))[1] == data
    with pytest.raises(NotFoundError):
        await store.resolve("latest")


async def test_references_that_are_none_are_usage_errors(store: ImageStore) -> None:
    for reference in ("", "a/b", "..", "sha256:short", "v 1"):
        with pytest.raises(UsageError):
            await store.resolve(reference)
    with pytest.raises(UsageError):
        await store.put_manifest(b"{}", MANIFEST, tag="../up")


async def test_referrers_are_found_by_subject(store: ImageStore) -> None:
    subject, _ = await put_image(store, "subject", tag="v1")
    assert await referrers(store, subject.digest) == []
    one, _ = await put_image(store, "one", subject=subject, kind="x/trace")
    two, _ = await put_image(store, "two", subject=subject, kind="x/signature")
    await put_image(store, "one", subject=subject, kind="x/trace")
    found = await referrers(store, subject.digest)
    assert sorted(d.digest for d in found) == sorted([one.digest, two.digest])
    assert {d.artifact_type for d in found} == {"x/trace", "x/signature"}
    assert [d.digest for d in await referrers(store, subject.digest, "x/trace")] == [one.digest]
    assert (await referrers(store, subject.digest, "x/trace"))[0].annotations["text"] == "one"
    assert await referrers(store, one.digest) == []


async def test_a_tagged_referrer_is_found_also_when_its_tag_has_moved(store: ImageStore) -> None:
    subject, _ = await put_image(store, "subject", tag="v1")
    old, _ = await put_image(store, "old", tag="trace", subject=subject, kind="x/trace")
    new, _ = await put_image(store, "new", tag="trace", subject=subject, kind="x/trace")
    found = await referrers(store, subject.digest)
    assert sorted(d.digest for d in found) == sorted([old.digest, new.digest])


async def test_mounting_what_is_nowhere_is_refused(store: ImageStore) -> None:
    await store.put_blob(b"the store exists")
    assert not await store.mount_blob(Digest.of(b"nowhere"), "tests/other")


async def test_many_writers_tag_side_by_side(store: ImageStore) -> None:
    async def tag(number: int) -> None:
        await put_image(store, f"image {number}", tag=f"v{number}")

    async with trio.open_nursery() as nursery:
        for number in range(12):
            nursery.start_soon(tag, number)
    found = {(await store.resolve(f"v{number}")).digest for number in range(12)}
    assert len(found) == 12


async def test_closing_twice_is_closing(store: ImageStore) -> None:
    await store.put_blob(b"something was open")
    await store.aclose()
    await store.aclose()
