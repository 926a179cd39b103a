"""A repository of a registry as an image store (OCI distribution-spec 1.1).

Decided here: what is asked of the registry for each operation and what is believed: a manifest or whole blob is hashed
here before it is returned. Referrers: the API where the registry has it, else the tag schema, for reading and writing.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Final

import trio

from ..errors import (
    AccessDeniedError,
    FormatError,
    IntegrityError,
    NotFoundError,
    RemoteError,
    UnavailableError,
    UsageError,
)
from ..net.http_head import Headers
from ..net.origin import Target
from ..types import Descriptor, Digest
from .answer import Answer, refusal
from .blob_range import BlobRanges, RangeStream
from .manifests import (
    ACCEPT,
    INDEX_MEDIA_TYPE,
    MAX_DOCUMENT,
    Document,
    describe_manifest,
    encode_index,
    entry_of,
    media_type_inside,
    new_index,
    parse_index,
    referrers_tag,
    valid_descriptors,
    with_entry,
)
from .options import RegistryOptions
from .reference import Reference, is_repository, is_tag, parse_digest_or_tag
from .remote import Remote
from .upload import RegistryUpload, begin_upload, check_announced, has_blob

MAX_WHOLE_BLOB: Final = 1 << 31
"""Longest blob returned whole, bytes; larger ones are read by range."""
_READ_PIECE: Final = 4 << 20
"""A whole blob is taken in pieces, so that memory grows with what has come and not with what was promised."""
_HASH_INLINE: Final = 1 << 20
"""More than this is hashed in a thread: 1 MiB of SHA-256 holds the loop for 0.6 ms."""
_MAX_PAGES: Final = 1000
_INDEX_ROUNDS: Final = 4
_NO_REFERRERS_API: Final = frozenset({400, 404, 405, 501})
_NEXT: Final = re.compile(r"<([^>]*)>\s*;[^,]*\brel=\"?next\"?", re.IGNORECASE)


class RegistryStore:
    """An ImageStore on one repository of a registry. Use `open_store`."""

    def __init__(self, reference: Reference, options: RegistryOptions) -> None:
        self._remote = Remote(reference.registry, reference.repository, options)
        self._ranges = BlobRanges(self._remote)

    @property
    def name(self) -> str:
        """`host:port/repository`."""
        return self._remote.name

    async def resolve(self, reference: str) -> Descriptor:
        """Return the manifest descriptor of a tag or digest text. Raises NotFoundError."""
        wanted = parse_digest_or_tag(reference)
        answer = await self._remote.call(
            "HEAD",
            self._remote.target(f"manifests/{reference}"),
            what=f"manifest {reference}",
            scope=self._remote.scope("pull"),
            headers={"Accept": ACCEPT},
        )
        if answer.status == 404:
            raise NotFoundError(f"{self.name} has no manifest {reference}; check repository and tag")
        announced, length = answer.headers.get("docker-content-digest"), answer.headers.get("content-length") or ""
        if answer.status != 200 or announced is None or not re.fullmatch(r"[0-9]{1,10}", length):
            return (await self.get_manifest(reference))[0]  # HEAD is not everybody's strength
        if isinstance(wanted, Digest) and announced != wanted.text:
            raise IntegrityError(f"{self.name}: asked for manifest {wanted}, got {announced[:80]!r}")
        try:
            return Descriptor(answer.media_type, Digest(announced), int(length))
        except FormatError as error:
            raise RemoteError(f"{self.name}: manifest {reference}: {error}") from None

    async def get_manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        """Return descriptor and exact bytes of a manifest, hashed here. Raises NotFoundError, IntegrityError."""
        wanted = parse_digest_or_tag(reference)
        answer = await self._remote.call(
            "GET",
            self._remote.target(f"manifests/{reference}"),
            what=f"manifest {reference}",
            scope=self._remote.scope("pull"),
            headers={"Accept": ACCEPT},
            limit=MAX_DOCUMENT,
        )
        if answer.status == 404:
            raise NotFoundError(f"{self.name} has no manifest {reference}; check repository and tag")
        if answer.status != 200:
            raise refusal(self.name, f"manifest {reference}", answer)
        digest = await digest_of(answer.body)
        if isinstance(wanted, Digest) and digest != wanted:
            raise IntegrityError(f"{self.name}: manifest {wanted} holds other bytes, which hash to {digest}")
        announced = answer.headers.get("docker-content-digest")
        if announced is not None and announced.startswith("sha256:") and announced != digest.text:
            raise IntegrityError(
                f"{self.name}: manifest {reference} hashes to {digest}, but the registry calls it {announced[:80]!r}"
            )
        media_type = answer.media_type or media_type_inside(answer.body)
        return Descriptor(media_type, digest, len(answer.body)), answer.body

    async def put_manifest(
        self, data: bytes, media_type: str, *, tag: str | None = None, subject: Descriptor | None = None
    ) -> Descriptor:
        """Store a manifest; with a subject and no referrers API, list it in the subject's fallback index, too."""
        if tag is not None and not is_tag(tag):
            raise UsageError(f"{tag[:150]!r} cannot be a tag")
        if len(data) > MAX_DOCUMENT:
            raise RemoteError(f"manifest of {len(data)} bytes is larger than {MAX_DOCUMENT}, the bound of registries")
        digest = await digest_of(data)
        headers = await self._put(data, media_type, tag or digest.text, digest)
        if subject is not None and headers.get("oci-subject") is None:
            await self._list_referrer(subject.digest, describe_manifest(data, media_type))
        return Descriptor(media_type, digest, len(data))

    async def has_blob(self, digest: Digest) -> bool:
        """Tell whether the repository has the blob."""
        return await has_blob(self._remote, digest)

    async def get_blob(self, digest: Digest, *, size: int) -> bytes:
        """Return a whole blob of exactly `size` bytes, hashed here. Broken bodies are continued where they broke.

        Raises IntegrityError, NotFoundError, UnavailableError.
        """
        if not 0 <= size <= MAX_WHOLE_BLOB:
            raise RemoteError(f"blob {digest} of {size} bytes is too large to be read whole (bound {MAX_WHOLE_BLOB})")
        data = bytearray()
        if size == 0:
            await self._expect_empty(digest)
        pace = self._remote.pace()
        while len(data) < size:
            before = len(data)
            try:
                async with self._ranges.open(digest, before, size - before) as stream:
                    await self._read_rest(stream, data, digest, size)
            except UnavailableError as error:
                if len(data) > before:
                    pace = self._remote.pace()  # it moves: only tries in vain are counted
                await pace.again(error)
        found = await digest_of(data)
        if found != digest:
            raise IntegrityError(f"{self.name}: blob {digest} holds other bytes, which hash to {found}")
        return bytes(data)

    def open_range(self, digest: Digest, offset: int, length: int) -> AbstractAsyncContextManager[RangeStream]:
        """Open bytes [offset, offset+length) of a blob; see blob_range.py."""
        return self._ranges.open(digest, offset, length)

    async def begin_upload(self, resume_token: str | None = None) -> RegistryUpload:
        """Start a blob upload or continue one; see upload.py."""
        return await begin_upload(self._remote, resume_token)

    async def put_blob(self, data: bytes | bytearray | memoryview) -> Digest:
        """Store a whole small blob unless the repository has it; return its digest."""
        digest = await digest_of(data)
        if not await self.has_blob(digest):
            upload = await self.begin_upload()
            await upload.write(data)
            await upload.commit(digest)
        return digest

    async def mount_blob(self, digest: Digest, from_repository: str) -> bool:
        """Have the registry take a blob over from another of its repositories; False if it does not (or may not)."""
        if not is_repository(from_repository):
            raise UsageError(f"{from_repository[:150]!r} cannot be a repository")
        target = self._remote.target("blobs/uploads/").with_query([("mount", digest.text), ("from", from_repository)])
        scope = self._remote.scope("pull,push", also_pull=from_repository)
        try:
            answer = await self._remote.call("POST", target, what=f"blob {digest}", scope=scope, body=b"")
        except AccessDeniedError:
            return False  # it is the other repository that may be closed to us; if it is ours, the upload will say so
        if answer.status == 202 and answer.location is not None:
            await self._cancel_session(answer)
        elif answer.status == 201:
            check_announced(self.name, answer, digest)
        return answer.status == 201

    async def referrers(self, digest: Digest, artifact_type: str | None = None) -> AsyncIterator[Descriptor]:
        """Yield the manifests whose subject is `digest`, of one artifact type if given."""
        seen: set[Digest] = set()
        async with aclosing(self._referrer_pages(digest)) as pages:
            async for index in pages:
                for found in valid_descriptors(index):
                    # A registry may leave the filter to us; the fallback always does.
                    if found.digest not in seen and artifact_type in {None, found.artifact_type}:
                        seen.add(found.digest)
                        yield found

    async def aclose(self) -> None:
        """Close connections. Idempotent."""
        await self._remote.aclose()

    async def _put(self, data: bytes, media_type: str, reference: str, digest: Digest) -> Headers:
        answer = await self._remote.call(
            "PUT",
            self._remote.target(f"manifests/{reference}"),
            what=f"manifest {reference}",
            scope=self._remote.scope("pull,push"),
            headers={"Content-Type": media_type},
            body=data,
        )
        if answer.status not in {200, 201, 202, 204}:
            raise refusal(self.name, f"manifest {reference}", answer)
        check_announced(self.name, answer, digest)
        return answer.headers

    async def _read_rest(self, stream: RangeStream, data: bytearray, digest: Digest, size: int) -> None:
        if stream.total is not None and stream.total != size:
            raise IntegrityError(f"{self.name}: blob {digest} is {stream.total} bytes, expected {size}")
        while len(data) < size:
            piece = bytearray(min(_READ_PIECE, size - len(data)))
            await stream.readinto(memoryview(piece))
            data += piece

    async def _expect_empty(self, digest: Digest) -> None:
        if not await self.has_blob(digest):
            raise NotFoundError(f"{self.name} has no blob {digest}")

    async def _cancel_session(self, answer: Answer) -> None:
        """Give back a session that the registry opened because it could not mount. Best effort: they expire anyway."""
        target = self._remote.redirected(answer.target, answer.location, "upload")
        try:
            await self._remote.call("DELETE", target, what="upload", scope=self._remote.scope("pull,push"), retry=False)
        except RemoteError:
            return

    async def _referrer_pages(self, digest: Digest) -> AsyncGenerator[Document, None]:
        target: Target | None = self._remote.target(f"referrers/{digest}")
        for page in range(_MAX_PAGES):
            if target is None:
                return
            answer = await self._remote.call(
                "GET",
                target,
                what=f"list of referrers of {digest}",
                scope=self._remote.scope("pull"),
                headers={"Accept": INDEX_MEDIA_TYPE},
                limit=MAX_DOCUMENT,
            )
            if page == 0 and (answer.status in _NO_REFERRERS_API or answer.media_type == "text/html"):
                fallback = await self._fallback_index(digest)
                if fallback is not None:
                    yield fallback
                return
            if answer.status != 200:
                raise refusal(self.name, f"list of referrers of {digest}", answer)
            yield self._index_in(answer.body, f"list of referrers of {digest}")
            target = self._next_page(answer)

    def _next_page(self, answer: Answer) -> Target | None:
        match = _NEXT.search(answer.headers.get("link") or "")
        return self._remote.redirected(answer.target, match[1], "list of referrers") if match is not None else None

    async def _fallback_index(self, subject: Digest) -> Document | None:
        tag = referrers_tag(subject)
        try:
            _, data = await self.get_manifest(tag)
        except NotFoundError:
            return None
        return self._index_in(data, f"manifest {tag}")

    def _index_in(self, data: bytes, what: str) -> Document:
        try:
            return parse_index(data)
        except FormatError as error:
            raise RemoteError(f"{self.name}: {what}: {error}") from None

    async def _list_referrer(self, subject: Digest, listed: Descriptor) -> None:
        """Add to the fallback index. Two writers may overwrite each other (the spec has no lock), so look again after."""
        tag = referrers_tag(subject)
        for _ in range(_INDEX_ROUNDS):
            index = await self._fallback_index(subject) or new_index()
            if any(entry.get("digest") == listed.digest.text for entry in index["manifests"]):
                return
            data = encode_index(with_entry(index, entry_of(listed)))
            await self._put(data, INDEX_MEDIA_TYPE, tag, await digest_of(data))
        raise UnavailableError(f"{self.name}: others keep overwriting the referrers tag {tag}; try again")


async def digest_of(data: bytes | bytearray | memoryview) -> Digest:
    """Return the digest of `data` without holding the event loop."""
    if len(data) <= _HASH_INLINE:
        return Digest.of(data)
    return await trio.to_thread.run_sync(Digest.of, data)
