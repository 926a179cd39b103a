"""A registry repository as an ImageStore: manifests, blobs, uploads, referrers (OCI distribution-spec 1.1)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import httpx
import trio

from ..errors import IntegrityError, NotFoundError, RemoteError, UnavailableError
from ..interfaces import BlobStream, BlobUpload
from ..types import Descriptor, Digest
from .manifests import (
    ACCEPT,
    MANIFEST_LIMIT,
    MEDIA_INDEX,
    descriptor_of_manifest,
    extend_index,
    media_type_of,
    parse_index,
    referrers_tag,
)
from .reference import Reference
from .remote import RegistryOptions, Remote
from .upload import begin, refusal

_HASH_INLINE: Final = 256 << 10
"""Hashing more than this goes to a thread: 256 KiB of SHA-256 hold the loop for 0.15 ms."""

_ReadInto = Callable[[memoryview], Awaitable[None]]


class RegistryStore:
    """One repository of a registry. See interfaces.ImageStore for the contract."""

    def __init__(self, reference: Reference, options: RegistryOptions) -> None:
        self._remote = Remote(reference, options)

    @property
    def name(self) -> str:
        """`host:port/repository`."""
        return self._remote.name

    async def resolve(self, reference: str) -> Descriptor:
        """Return the manifest descriptor of a tag or digest."""
        response = await self._remote.request("HEAD", self._manifest_url(reference), headers={"Accept": ACCEPT})
        if response.status_code == 404:
            raise self._missing(reference)
        digest_text = response.headers.get("docker-content-digest")
        size = response.headers.get("content-length", "")
        if response.status_code == 200 and digest_text and size.isdigit():
            media_type = response.headers.get("content-type", "").split(";")[0]
            return Descriptor(media_type, self._expected(Digest(digest_text), reference), int(size))
        return (await self.get_manifest(reference))[0]

    async def get_manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        """Return descriptor and bytes of a manifest, hash checked against the digest asked for or announced."""
        response = await self._remote.request(
            "GET", self._manifest_url(reference), headers={"Accept": ACCEPT}, limit=MANIFEST_LIMIT
        )
        if response.status_code == 404:
            raise self._missing(reference)
        if response.status_code != 200:
            raise refusal(self._remote, f"manifest {reference}", response.status_code, response.text)
        data = response.content
        digest = Digest.of(data)
        announced = response.headers.get("docker-content-digest")
        if announced and announced != str(digest):
            raise IntegrityError(
                f"{self.name}: manifest {reference} hashes to {digest}, the registry says {announced[:80]}"
            )
        media_type = response.headers.get("content-type", "").split(";")[0] or media_type_of(data)
        return Descriptor(media_type, self._expected(digest, reference), len(data)), data

    async def put_manifest(
        self, data: bytes, media_type: str, *, tag: str | None = None, subject: Descriptor | None = None
    ) -> Descriptor:
        """Store a manifest; where the registry has no referrers API, enter it in the fallback index of its subject."""
        digest = Digest.of(data)
        response = await self._remote.request(
            "PUT",
            self._manifest_url(tag or str(digest)),
            actions="pull,push",
            headers={"Content-Type": media_type},
            content=data,
        )
        if response.status_code not in {200, 201}:
            raise refusal(self._remote, f"manifest {tag or digest}", response.status_code, response.text)
        announced = response.headers.get("docker-content-digest")
        if announced and announced != str(digest):
            raise IntegrityError(f"{self.name}: stored manifest {digest}, the registry says {announced[:80]}")
        if subject and "oci-subject" not in response.headers:
            await self._list_referrer(subject.digest, descriptor_of_manifest(data, media_type))
        return Descriptor(media_type, digest, len(data))

    async def has_blob(self, digest: Digest) -> bool:
        """Tell whether the repository has the blob."""
        response = await self._remote.request("HEAD", self._remote.url(f"blobs/{digest}"))
        if response.status_code in {200, 404}:
            return response.status_code == 200
        raise RemoteError(f"{self.name}: blob {digest} answered {response.status_code}")

    async def get_blob(self, digest: Digest, *, size: int) -> bytes:
        """Return a whole blob of exactly `size` bytes, verified."""
        if size == 0:
            return b""
        data = bytearray(size)
        for attempt in range(3):
            try:
                async with self.open_range(digest, 0, size) as stream:
                    await stream.readinto(memoryview(data))
                break
            except UnavailableError:
                if attempt == 2:
                    raise
        found = await _digest_of(data)
        if found != digest:
            raise IntegrityError(f"{self.name}: blob {digest} hashes to {found}")
        return bytes(data)

    @asynccontextmanager
    async def open_range(self, digest: Digest, offset: int, length: int) -> AsyncIterator[BlobStream]:
        """Open bytes [offset, offset+length) of a blob."""
        async with self._remote.open_blob_range(digest, offset, length) as response:
            yield _RangeStream(response.readinto, length, f"{self.name}: blob {digest}")

    async def begin_upload(self, resume_token: str | None = None) -> BlobUpload:
        """Start or continue an upload."""
        return await begin(self._remote, resume_token)

    async def put_blob(self, data: bytes | bytearray | memoryview) -> Digest:
        """Store a small blob unless it is there."""
        digest = await _digest_of(data)
        if not await self.has_blob(digest):
            upload = await self.begin_upload()
            await upload.write(data)
            await upload.commit(digest)
        return digest

    async def mount_blob(self, digest: Digest, from_repository: str) -> bool:
        """Ask the registry to take the blob from another of its repositories."""
        url = self._remote.url("blobs/uploads/")
        query = str(httpx.QueryParams({"mount": str(digest), "from": from_repository}))
        response = await self._remote.request(
            "POST",
            f"{url}?{query}",
            actions="pull,push",
            content=b"",
            extra_scope=f"repository:{from_repository}:pull",
        )
        if response.status_code == 202 and "location" in response.headers:
            # the registry opened an ordinary upload instead: let it go, sessions expire by themselves
            await self._remote.request("DELETE", response.headers["location"], actions="pull,push", retry=False)
        return response.status_code == 201

    async def referrers(self, digest: Digest, artifact_type: str | None = None) -> AsyncIterator[Descriptor]:
        """Yield the manifests whose subject is `digest`."""
        response = await self._remote.request(
            "GET", self._remote.url(f"referrers/{digest}"), headers={"Accept": MEDIA_INDEX}, limit=MANIFEST_LIMIT
        )
        if response.status_code == 200 and MEDIA_INDEX in response.headers.get("content-type", ""):
            data = response.content
        else:
            try:
                _, data = await self.get_manifest(referrers_tag(digest))
            except NotFoundError:
                return
        for descriptor in parse_index(data, artifact_type):
            yield descriptor

    async def aclose(self) -> None:
        """Close connections."""
        await self._remote.aclose()

    async def _list_referrer(self, subject: Digest, descriptor: Descriptor) -> None:
        tag = referrers_tag(subject)
        try:
            _, existing = await self.get_manifest(tag)
        except NotFoundError:
            existing = None
        await self.put_manifest(extend_index(existing, descriptor), MEDIA_INDEX, tag=tag)

    def _manifest_url(self, reference: str) -> str:
        return self._remote.url(f"manifests/{reference}")

    def _expected(self, digest: Digest, reference: str) -> Digest:
        if reference.startswith("sha256:") and str(digest) != reference:
            raise IntegrityError(f"{self.name}: asked for manifest {reference}, got one that hashes to {digest}")
        return digest

    def _missing(self, reference: str) -> NotFoundError:
        return NotFoundError(f"{self.name}: no manifest {reference}; check repository and tag")


class _RangeStream:
    """The body of a range request, bounded to what was asked for."""

    def __init__(self, readinto: _ReadInto, length: int, what: str) -> None:
        self._readinto = readinto
        self._left = length
        self._what = what

    async def readinto(self, buffer: memoryview) -> None:
        """Fill `buffer` with the next bytes of the range."""
        if len(buffer) > self._left:
            raise ValueError(f"{len(buffer)} bytes asked of a range with {self._left} left")
        try:
            await self._readinto(buffer)
        except UnavailableError as error:
            raise UnavailableError(f"{self._what}: {error}") from error
        self._left -= len(buffer)


async def _digest_of(data: bytes | bytearray | memoryview) -> Digest:
    if len(data) <= _HASH_INLINE:
        return Digest.of(data)
    return await trio.to_thread.run_sync(Digest.of, data)
