"""The registry client against servers that cut, lie, stall, redirect and refuse: an error in time, never a wrong byte."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from rafsfs.errors import AccessDeniedError, IntegrityError, NotFoundError, RemoteError, UnavailableError
from rafsfs.interfaces import ImageStore
from rafsfs.registry.client import RegistryStore
from rafsfs.registry.reference import parse_reference
from rafsfs.registry.store import RegistryOptions, open_store
from rafsfs.types import Descriptor, Digest
from tests.support.misbehaving import Cut, Handler, MisbehavingServer, Request, misbehaving

from .test_conformance import MANIFEST, noise, read_range, referrers

pytestmark = pytest.mark.io

BLOB = noise(300_000)
DIGEST = Digest.of(BLOB)
INDEX = "application/vnd.oci.image.index.v1+json"
FAST = RegistryOptions(timeout_s=0.5, retries=2, docker_config="/nonexistent")

Step = Callable[[Request], Awaitable[None]]


@asynccontextmanager
async def talking(
    handler: Handler, options: RegistryOptions = FAST
) -> AsyncIterator[tuple[ImageStore, MisbehavingServer]]:
    """A store on a server that does what `handler` does."""
    async with misbehaving(handler) as server, open_store(parse_reference(f"{server.address}/a/b"), options) as store:
        yield store, server


def steps(*some: Step) -> Handler:
    """Do one thing after the other; the last one for ever."""
    left = list(some)

    async def handler(request: Request) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(request)

    return handler


def answering(status: int, body: bytes = b"", **headers: str) -> Step:
    """Always the same answer."""

    async def step(request: Request) -> None:
        await request.answer(status, body, {name.replace("_", "-"): value for name, value in headers.items()})

    return step


async def cut(_: Request) -> None:
    raise Cut


async def silence(_: Request) -> None:
    await trio.sleep_forever()


async def right(request: Request) -> None:
    await request.partial(BLOB)


def cutting(after: int) -> Step:
    async def step(request: Request) -> None:
        await request.partial(BLOB, cut_after=after)

    return step


async def get(store: ImageStore) -> bytes:
    return await store.get_blob(DIGEST, size=len(BLOB))


# ---- bodies ----------------------------------------------------------------------------------------------------------


async def test_opening_is_tried_again_after_cuts_and_5xx() -> None:
    async with talking(steps(cut, answering(503), right)) as (store, server):
        assert await read_range(store, DIGEST, 1000, 5000, 999) == BLOB[1000:6000]
        assert len(server.requests) == 3


async def test_tries_come_to_an_end() -> None:
    for fault in (cut, answering(500), answering(502, b"<html>bad gateway</html>")):
        async with talking(fault) as (store, server):
            with pytest.raises(UnavailableError, match=str(DIGEST)):
                await read_range(store, DIGEST, 0, 10, 10)
            assert len(server.requests) == 1 + FAST.retries
            with pytest.raises(UnavailableError):
                await store.resolve("v1")
            assert len(server.requests) == 2 + 2 * FAST.retries


async def test_a_body_that_breaks_is_reported_and_not_read_again_by_the_stream() -> None:
    async with talking(cutting(5000)) as (store, server):
        buffer = memoryview(bytearray(len(BLOB)))
        with pytest.raises(UnavailableError, match=str(DIGEST)):
            async with store.open_range(DIGEST, 0, len(BLOB)) as stream:
                await stream.readinto(buffer)
        assert bytes(buffer[:5000]) == BLOB[:5000]
        assert len(server.requests) == 1


async def test_a_whole_blob_is_continued_where_its_body_broke() -> None:
    # The first 4 MiB piece is what gets lost with a cut, so the blob has several.
    blob = noise(9 << 20)

    async def handler(request: Request) -> None:
        start, stop = request.range
        await request.partial(blob, cut_after=5 << 20 if stop - start > 5 << 20 else None)

    async with talking(handler) as (store, server):
        assert await store.get_blob(Digest.of(blob), size=len(blob)) == blob
        assert [request.range[0] for request in server.requests] == [0, 4 << 20]


async def test_wrong_bytes_of_a_whole_blob_are_an_integrity_error() -> None:
    async def handler(request: Request) -> None:
        await request.partial(bytes([BLOB[0] ^ 1]) + BLOB[1:])

    async with talking(handler) as (store, _):
        with pytest.raises(IntegrityError, match=str(DIGEST)):
            await get(store)


async def test_a_blob_of_another_size_is_an_integrity_error() -> None:
    async def handler(request: Request) -> None:
        await request.partial(BLOB + b"more")

    async with talking(handler) as (store, _):
        with pytest.raises(IntegrityError, match="300004 bytes, expected 300000"):
            await get(store)


async def test_a_server_that_ignores_range_is_read_up_to_the_offset() -> None:
    async with talking(answering(200, BLOB)) as (store, server):
        assert await read_range(store, DIGEST, 100_001, 50_000, 7777) == BLOB[100_001:150_001]
        assert await read_range(store, DIGEST, 299_999, 1, 1) == BLOB[-1:]
        assert len(server.requests) == 2


async def test_a_server_that_ignores_range_far_into_a_blob_fails_clearly() -> None:
    async def handler(request: Request) -> None:
        await request.answer(200, BLOB, length=64 << 20)

    async with talking(handler) as (store, server):
        with pytest.raises(RemoteError, match="ignores Range") as caught:
            await read_range(store, DIGEST, 32 << 20, 1000, 1000)
        assert not isinstance(caught.value, UnavailableError)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "content_range",
    [None, "bytes 0-999/300000", "bytes 1001-2000/300000", "bytes 1000-1998/300000", "bytes */300000", "x"],
)
async def test_another_range_than_asked_is_never_delivered(content_range: str | None) -> None:
    async def handler(request: Request) -> None:
        await request.answer(206, BLOB[:1000], {"Content-Range": content_range} if content_range else {})

    async with talking(handler) as (store, _):
        with pytest.raises(RemoteError, match=str(DIGEST)):
            await read_range(store, DIGEST, 1000, 1000, 1000)


async def test_multipart_ranges_and_encodings_are_refused() -> None:
    async def multipart(request: Request) -> None:
        await request.answer(206, BLOB, {"Content-Type": "multipart/byteranges; boundary=x"})

    async def gzip(request: Request) -> None:
        await request.answer(200, BLOB, {"Content-Encoding": "gzip"})

    for handler in (multipart, gzip):
        async with talking(handler) as (store, _):
            with pytest.raises(RemoteError):
                await read_range(store, DIGEST, 0, 1000, 1000)


async def test_a_range_past_the_end_does_not_wait_for_the_body_that_416_promises() -> None:
    async def handler(request: Request) -> None:
        if request.range[1] > len(BLOB):
            # As docker-registry does: the length of the blob, and a short body of another kind.
            await request.answer(416, b'{"errors":[]}', length=len(BLOB))
        else:
            await request.partial(BLOB)

    async with talking(handler, RegistryOptions(timeout_s=20, retries=2)) as (store, server):
        with trio.fail_after(2), pytest.raises(RemoteError, match="ends before byte 300010"):
            await read_range(store, DIGEST, 299_000, 1010, 1010)
        with trio.fail_after(2):
            assert await read_range(store, DIGEST, 299_000, 1000, 1000) == BLOB[299_000:]
        assert server.connections == 2


async def test_silence_ends_within_the_timeouts() -> None:
    options = RegistryOptions(timeout_s=0.2, retries=1, docker_config="/nonexistent")
    async with talking(silence, options) as (store, server):
        with trio.fail_after(3):
            with pytest.raises(UnavailableError, match=r"0\.2 s"):
                await read_range(store, DIGEST, 0, 10, 10)
            with pytest.raises(UnavailableError, match=r"0\.2 s"):
                await store.get_manifest("v1")
        assert len(server.requests) == 4


async def test_a_registry_that_is_not_there_is_unavailable() -> None:
    async with misbehaving(cut) as server:
        address = server.address
    async with open_store(parse_reference(f"{address}/a/b"), FAST) as store:
        for ask in (store.resolve("v1"), get(store), store.has_blob(DIGEST), store.begin_upload()):
            with pytest.raises(UnavailableError, match=f"cannot connect to {address}: .*refused"):
                await ask


# ---- being told to wait ----------------------------------------------------------------------------------------------


async def test_retry_after_is_honoured() -> None:
    async with talking(steps(answering(429, Retry_After="1"), right)) as (store, _):
        begin = time.monotonic()
        await read_range(store, DIGEST, 0, 10, 10)
        assert time.monotonic() - begin >= 1.0


async def test_a_retry_after_beyond_patience_or_deadline_fails_at_once() -> None:
    async with talking(answering(429, Retry_After="3600")) as (store, server):
        with trio.fail_after(1), pytest.raises(UnavailableError, match="asks to wait 3600 s"):
            await store.resolve("v1")
        assert len(server.requests) == 1
    async with talking(answering(503, Retry_After="1"), RegistryOptions(timeout_s=30)) as (store, server):
        with trio.fail_after(0.9), pytest.raises(UnavailableError, match="asks to wait 1 s"):
            await read_range(store, DIGEST, 0, 10, 10)
        assert len(server.requests) == 1


# ---- redirects -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def guarded_with_storage(
    tmp_path: Path, storage: Handler, *, location: str = "/store/blob?X-Signature=s3cret"
) -> AsyncIterator[tuple[ImageStore, MisbehavingServer, MisbehavingServer]]:
    """A registry that wants Basic credentials and redirects blobs to another origin."""
    auth = base64.b64encode(b"ada:open-sesame").decode()
    async with misbehaving(storage) as elsewhere:

        async def registry(request: Request) -> None:
            if request.headers.get("authorization") != f"Basic {auth}":
                await request.answer(401, headers={"WWW-Authenticate": 'Basic realm="x"'})
            else:
                await request.answer(307, headers={"Location": f"http://127.0.0.1:{elsewhere.port}{location}"})

        async with misbehaving(registry) as server:
            (tmp_path / "config.json").write_text(json.dumps({"auths": {server.address: {"auth": auth}}}))
            options = RegistryOptions(timeout_s=1, retries=2, docker_config=str(tmp_path))
            async with open_store(parse_reference(f"{server.address}/a/b"), options) as store:
                yield store, server, elsewhere


async def test_storage_never_sees_the_authorization_and_is_remembered(tmp_path: Path) -> None:
    async with guarded_with_storage(tmp_path, right) as (store, server, storage):
        for offset in (0, 5000, 10_000):
            assert await read_range(store, DIGEST, offset, 1000, 1000) == BLOB[offset : offset + 1000]
        assert len(storage.requests) == 3
        assert all("authorization" not in request.headers for request in storage.requests)
        assert [request.headers.get("authorization") is not None for request in server.requests] == [False, True]
        assert storage.requests[0].query == {"X-Signature": ["s3cret"]}


async def test_has_blob_believes_the_redirect(tmp_path: Path) -> None:
    async with guarded_with_storage(tmp_path, answering(403)) as (store, _, storage):
        assert await store.has_blob(DIGEST), "signed addresses are for GET: the storage would refuse a HEAD"
        assert storage.requests == []


async def test_an_expired_address_is_asked_for_anew(tmp_path: Path) -> None:
    async with guarded_with_storage(tmp_path, steps(right, answering(403), right)) as (store, server, storage):
        assert await read_range(store, DIGEST, 0, 1000, 1000) == BLOB[:1000]
        assert await read_range(store, DIGEST, 5000, 1000, 1000) == BLOB[5000:6000]
        assert (len(server.requests), len(storage.requests)) == (3, 3)


async def test_storage_that_refuses_for_good_is_unavailable_without_its_signature(tmp_path: Path) -> None:
    async with guarded_with_storage(tmp_path, answering(403, b"<Error>s3cret</Error>")) as (store, _, _storage):
        with pytest.raises(UnavailableError, match="answered 403") as caught:
            await read_range(store, DIGEST, 0, 10, 10)
        assert "s3cret" not in str(caught.value)


async def test_a_blob_missing_in_storage_is_not_found(tmp_path: Path) -> None:
    async with guarded_with_storage(tmp_path, answering(404)) as (store, _, _storage):
        with pytest.raises(NotFoundError, match=r"storage at 127\.0\.0\.1"):
            await read_range(store, DIGEST, 0, 10, 10)


async def test_redirects_in_circles_and_to_nowhere_end() -> None:
    async def circle(request: Request) -> None:
        await request.answer(302, headers={"Location": request.target + "x"})

    for handler in (
        circle,
        answering(307),
        answering(307, Location="ftp://x/"),
        answering(307, Location="http://u:p@h/"),
    ):
        async with talking(handler) as (store, server):
            with trio.fail_after(3):
                with pytest.raises(RemoteError) as caught:
                    await read_range(store, DIGEST, 0, 10, 10)
                assert not isinstance(caught.value, UnavailableError)
                with pytest.raises(RemoteError):
                    await store.get_manifest("v1")
            assert len(server.requests) < 20


async def test_manifests_are_redirected_without_authorization_too(tmp_path: Path) -> None:
    async with guarded_with_storage(tmp_path, answering(200, b"{}")) as (store, _, storage):
        assert (await store.get_manifest("v1"))[1] == b"{}"
        assert "authorization" not in storage.requests[0].headers


# ---- manifests -------------------------------------------------------------------------------------------------------


async def test_a_manifest_that_is_not_what_was_asked_for_is_an_integrity_error() -> None:
    async with talking(answering(200, b'{"a":1}')) as (store, _):
        with pytest.raises(IntegrityError, match="holds other bytes"):
            await store.get_manifest(DIGEST.text)
    async with talking(answering(200, b'{"a":1}', Docker_Content_Digest=DIGEST.text)) as (store, _):
        with pytest.raises(IntegrityError, match="the registry calls it"):
            await store.get_manifest("v1")
        with pytest.raises(IntegrityError):
            await store.resolve(Digest.of(b"another").text)


async def test_a_manifest_over_the_bound_is_refused_without_being_read_to_its_end() -> None:
    async def endless(request: Request) -> None:
        await request.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            await request.raw(b"100000\r\n" + bytes(1 << 20) + b"\r\n")

    async with talking(endless) as (store, _):
        with trio.fail_after(10), pytest.raises(RemoteError, match="larger than 4194304 bytes"):
            await store.get_manifest("v1")


async def test_a_head_without_a_digest_is_answered_by_a_get() -> None:
    body = b'{"mediaType":"x/y"}'
    async with talking(answering(200, body)) as (store, server):
        assert await store.resolve("v1") == Descriptor("x/y", Digest.of(body), len(body))
        assert [request.method for request in server.requests] == ["HEAD", "GET"]


async def test_refusals_say_what_the_registry_said_in_bounds() -> None:
    text = json.dumps({"errors": [{"code": "DENIED", "message": "quota\nexceeded " + "x" * 5000}]}).encode()
    async with talking(answering(403, text)) as (store, _):
        with pytest.raises(AccessDeniedError, match="DENIED: quota exceeded") as caught:
            await store.get_manifest("v1")
        assert len(str(caught.value)) < 700
        assert "\n" not in str(caught.value)
    async with talking(answering(405, b"[" * 10_000)) as (store, _):
        with pytest.raises(RemoteError, match="answered 405"):
            await store.put_manifest(b"{}", MANIFEST, tag="v1")


@pytest.mark.parametrize("challenge", [None, "Negotiate", 'Bearer realm="not a url"', "Bearer", '"'])
async def test_a_401_without_a_way_in_is_one_clear_error(challenge: str | None) -> None:
    headers = {"WWW_Authenticate": challenge} if challenge else {}
    async with talking(answering(401, **headers)) as (store, server):
        for ask in (store.resolve("v1"), read_range(store, DIGEST, 0, 10, 10)):
            with pytest.raises(RemoteError, match="localhost"):
                await ask
        assert len(server.requests) == 2


# ---- uploads ---------------------------------------------------------------------------------------------------------


class Sessions:
    """A registry for uploads as the specification has it, with faults to order."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.blobs: set[str] = set()
        self.state = 0
        self.faults: list[str] = []
        self.stale = 0

    async def __call__(self, request: Request) -> None:
        """Serve one request."""
        fault = self.faults.pop(0) if self.faults and request.method in {"PATCH", "PUT"} else ""
        if request.method == "HEAD":
            await request.answer(200 if request.path.rsplit("/", 1)[1] in self.blobs else 404)
            return
        if request.method == "POST":
            self.data.clear()
            await self._where(request, 202)
            return
        if request.query["state"] != [str(self.state)]:
            self.stale += 1
            await request.answer(404)
            return
        if request.method == "GET":
            await self._where(request, 204)
        elif request.method == "PATCH":
            await self._patch(request, fault)
        else:
            await self._put(request, fault)

    async def _patch(self, request: Request, fault: str) -> None:
        assert request.headers["content-range"] == f"{len(self.data)}-{len(self.data) + len(request.body) - 1}"
        if fault == "before":
            raise Cut
        if fault == "after":
            self.data += request.body
            raise Cut
        if fault == "busy":
            await request.answer(503)
            return
        self.data += request.body[: len(request.body) // 2] if fault in {"half", "half then cut"} else request.body
        if fault == "half then cut":
            raise Cut
        self.state += 1
        await self._where(request, 202)

    async def _put(self, request: Request, fault: str) -> None:
        if fault == "before":
            raise Cut
        self.data += request.body
        digest = Digest.of(self.data).text
        if request.query["digest"] != [digest]:
            await request.answer(400, json.dumps({"errors": [{"code": "DIGEST_INVALID"}]}).encode())
            return
        self.blobs.add(digest)
        self.state += 1
        if fault == "after":
            raise Cut
        await request.answer(201, headers={"Docker-Content-Digest": digest})

    async def _where(self, request: Request, status: int) -> None:
        headers = {"Location": f"/v2/a/b/blobs/uploads/1?state={self.state}"}
        if self.data:
            headers["Range"] = f"0-{len(self.data) - 1}"
        elif request.method == "GET":
            headers["Range"] = "0-0"
        await request.answer(status, headers=headers)


@pytest.mark.parametrize(
    "faults",
    [
        [],
        ["before"],
        ["after"],
        ["", "half"],
        ["", "half then cut", "half", "busy"],
        ["", "", "before", "before"],
        ["", "", "after"],
    ],
)
async def test_an_upload_survives_faults_and_sends_nothing_twice_that_was_acknowledged(faults: list[str]) -> None:
    data = noise(20 << 20)
    sessions = Sessions()
    sessions.faults = list(faults)
    async with talking(sessions, RegistryOptions(timeout_s=5, retries=3)) as (store, server):
        upload = await store.begin_upload()
        for start in range(0, len(data), 3 << 20):
            await upload.write(data[start : start + (3 << 20)])
        await upload.commit(Digest.of(data))
        assert Digest.of(data).text in sessions.blobs
        assert sessions.stale == 0, "only the last Location is used"
        sent = sum(len(request.body) for request in server.requests)
        assert sent <= len(data) + (8 << 20) * sum(fault in {"before", "busy"} for fault in faults) + (4 << 20)


@pytest.mark.parametrize("fault", ["before", "after"])
async def test_a_small_blob_survives_a_cut_at_its_end(fault: str) -> None:
    sessions = Sessions()
    sessions.faults = [fault]
    async with talking(sessions) as (store, server):
        assert await store.put_blob(BLOB) == DIGEST
        assert DIGEST.text in sessions.blobs
        assert len(server.asked("PUT")) == (2 if fault == "before" else 1)


async def test_a_small_blob_starts_anew_when_its_session_is_gone() -> None:
    sessions = Sessions()

    async def handler(request: Request) -> None:
        if (request.method == "PUT" and len(server.asked("POST")) == 1) or request.method == "GET":
            await request.answer(404)
        else:
            await sessions(request)

    async with talking(handler) as (store, server):
        assert await store.put_blob(BLOB) == DIGEST
        assert len(server.asked("POST")) == 2


async def test_other_bytes_than_the_digest_are_an_integrity_error_not_a_retry() -> None:
    sessions = Sessions()
    async with talking(sessions) as (store, server):
        upload = await store.begin_upload()
        await upload.write(BLOB)
        with pytest.raises(IntegrityError):
            await upload.commit(Digest.of(b"other"))
        assert len(server.asked("PUT")) == 1
        assert upload.resume_token is None


async def test_parts_are_as_large_as_the_registry_wants_them() -> None:
    sessions = Sessions()

    async def handler(request: Request) -> None:
        if request.method == "POST":
            await request.answer(
                202, headers={"Location": "/v2/a/b/blobs/uploads/1?state=0", "OCI-Chunk-Min-Length": str(12 << 20)}
            )
        else:
            await sessions(request)

    data = noise(30 << 20)
    async with talking(handler) as (store, server):
        upload = await store.begin_upload()
        await upload.write(data)
        await upload.commit(Digest.of(data))
        assert [len(request.body) >> 20 for request in server.asked("PATCH")] == [12, 12, 6]


async def test_an_upload_at_another_origin_gets_no_authorization_and_no_token(tmp_path: Path) -> None:
    auth = base64.b64encode(b"ada:open-sesame").decode()
    sessions = Sessions()
    async with misbehaving(sessions) as elsewhere:

        async def registry(request: Request) -> None:
            if "authorization" not in request.headers:
                await request.answer(401, headers={"WWW-Authenticate": "Basic"})
            elif request.method == "POST":
                location = f"http://127.0.0.1:{elsewhere.port}/v2/a/b/blobs/uploads/1?state=0&sig=s3cret"
                await request.answer(202, headers={"Location": location})
            else:
                await sessions(request)

        async with misbehaving(registry) as server:
            (tmp_path / "config.json").write_text(json.dumps({"auths": {server.address: {"auth": auth}}}))
            options = RegistryOptions(timeout_s=1, docker_config=str(tmp_path))
            async with open_store(parse_reference(f"{server.address}/a/b"), options) as store:
                upload = await store.begin_upload()
                assert upload.resume_token is None, "its signature is a credential"
                await upload.write(BLOB)
                await upload.commit(DIGEST)
        assert all("authorization" not in request.headers for request in elsewhere.requests)


# ---- referrers -------------------------------------------------------------------------------------------------------


def listed(number: int, kind: str = "x/trace") -> dict[str, object]:
    return {"mediaType": MANIFEST, "digest": Digest.of(b"%d" % number).text, "size": 5, "artifactType": kind}


def index(*entries: object) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": list(entries)}).encode()


async def test_the_referrers_api_is_used_page_by_page_and_filtered_here() -> None:
    async def handler(request: Request) -> None:
        if request.method == "PUT":
            await request.answer(201, headers={"OCI-Subject": DIGEST.text})
            return
        if "page" not in request.query:
            link = f'<{request.path}?page=2>; rel="next"'
            await request.answer(200, index(listed(1), listed(2, "x/other")), {"Content-Type": INDEX, "Link": link})
        else:
            await request.answer(200, index(listed(1), listed(3), {"digest": "junk"}), {"Content-Type": INDEX})

    async with talking(handler) as (store, server):
        assert [d.digest for d in await referrers(store, DIGEST, "x/trace")] == [Digest.of(b"1"), Digest.of(b"3")]
        subject = Descriptor(MANIFEST, DIGEST, 5)
        await store.put_manifest(b"{}", MANIFEST, subject=subject)
        assert len(server.asked("PUT")) == 1, "a registry that answers OCI-Subject keeps the list itself"


async def test_a_page_list_without_end_ends() -> None:
    async def handler(request: Request) -> None:
        await request.answer(200, index(listed(1)), {"Content-Type": INDEX, "Link": f'<{request.path}>; rel="next"'})

    async with talking(handler) as (store, server):
        with trio.fail_after(20):
            assert len(await referrers(store, DIGEST)) == 1
        assert len(server.requests) <= 1000


@pytest.mark.parametrize("status", [404, 405, 400])
async def test_the_fallback_tag_is_read_where_there_is_no_api(status: int) -> None:
    async def handler(request: Request) -> None:
        if request.path.endswith(f"/manifests/sha256-{DIGEST.hex}"):
            await request.answer(200, index(listed(7)), {"Content-Type": INDEX})
        else:
            await request.answer(status)

    async with talking(handler) as (store, _):
        assert [d.digest for d in await referrers(store, DIGEST)] == [Digest.of(b"7")]


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"manifests":5}', b'{"manifests":[5]}', b"[" * 100_000])
async def test_an_index_that_is_none_is_a_remote_error(body: bytes) -> None:
    async with talking(answering(200, body, Content_Type=INDEX)) as (store, _):
        with pytest.raises(RemoteError):
            await referrers(store, DIGEST)


async def test_others_writing_the_fallback_tag_are_not_overwritten() -> None:
    tags: dict[str, bytes] = {}
    puts = 0

    async def handler(request: Request) -> None:
        nonlocal puts
        name = request.path.rsplit("/", 1)[1]
        if request.method == "PUT":
            tags[name] = request.body
            if name.startswith("sha256-"):
                puts += 1
                if puts == 1:
                    tags[name] = index(listed(99))  # somebody read before we wrote, and wrote after
            await request.answer(201)
        elif name in tags:
            await request.answer(200, tags[name], {"Content-Type": INDEX})
        else:
            await request.answer(404)

    async with talking(handler) as (store, _):
        await store.put_manifest(b'{"artifactType":"x/trace"}', MANIFEST, subject=Descriptor(MANIFEST, DIGEST, 5))
        kept = {entry["digest"] for entry in json.loads(tags[f"sha256-{DIGEST.hex}"])["manifests"]}
        assert kept == {Digest.of(b"99").text, Digest.of(b'{"artifactType":"x/trace"}').text}


# ---- cancellation ----------------------------------------------------------------------------------------------------


async def test_a_store_is_usable_after_any_cancellation() -> None:
    async def handler(request: Request) -> None:
        await trio.sleep(0.01)
        await request.partial(BLOB) if "range" in request.headers else await request.answer(404)

    async with talking(handler, RegistryOptions(timeout_s=5)) as (store, _):
        for delay_s in (0.0, 0.001, 0.005, 0.01, 0.011, 0.012, 0.015, 0.02):
            async with trio.open_nursery() as nursery:
                for _ in range(40):
                    nursery.start_soon(get, store)
                    nursery.start_soon(store.has_blob, DIGEST)
                await trio.sleep(delay_s)
                nursery.cancel_scope.cancel()
        with trio.fail_after(5):
            assert await get(store) == BLOB
        assert isinstance(store, RegistryStore)
