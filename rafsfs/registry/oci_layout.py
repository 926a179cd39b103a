"""An OCI image layout directory as an image store (image-spec 1.1, image-layout.md).

Decided here: what is written when. A blob is written under `.uploads/`, hashed on the way, synced, and renamed to
`blobs/sha256/<hex>` when its digest is right; index.json is replaced whole by rename, under a flock on `oci-layout`, so
that several processes may write one layout. Rule: what stands under blobs/ is complete and was verified by its writer.
A layout that does not exist is made by the first write. All file work runs in threads; a cancelled call waits for the
piece of work in its thread (bounded: a few MiB, or one sync).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import trio

from ..errors import FormatError, IntegrityError, NotFoundError, RemoteError, UnavailableError, UsageError
from ..interfaces import BlockingRead
from ..types import Descriptor, Digest
from .disk import in_thread, remote_error, write_synced
from .layout_upload import LayoutUpload, open_upload, uploads_directory
from .manifests import (
    MAX_DOCUMENT,
    Document,
    describe_manifest,
    descriptor_of,
    encode_index,
    entry_of,
    media_type_inside,
    new_index,
    parse_document,
    parse_index,
    referrers_tag,
    subject_of,
    valid_descriptors,
    with_entry,
    without,
)
from .reference import parse_digest_or_tag

LAYOUT_FILE: Final = "oci-layout"
LAYOUT_BYTES: Final = b'{"imageLayoutVersion":"1.0.0"}'
REF_NAME: Final = "org.opencontainers.image.ref.name"
READ_PIECE: Final = 4 << 20
"""Longest read in one thread hop, bytes: bounds what a cancellation waits for."""
MAX_WHOLE_BLOB: Final = 1 << 31
"""Longest blob returned whole, bytes; larger ones are read by range."""


class OciLayout:
    """An ImageStore in a directory. Use `open_store`."""

    def __init__(self, path: str, *, lock_timeout_s: float = 30.0) -> None:
        self._path = os.path.abspath(path)
        self._blobs = os.path.join(self._path, "blobs", "sha256")
        self._lock_timeout_s = lock_timeout_s

    @property
    def name(self) -> str:
        """`oci:DIR`."""
        return f"oci:{self._path}"

    async def resolve(self, reference: str) -> Descriptor:
        """Return the manifest descriptor of a tag or digest text. Raises NotFoundError."""
        descriptor, _ = await self.get_manifest(reference)
        return descriptor

    async def get_manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        """Return descriptor and bytes of a manifest, verified. Raises NotFoundError, IntegrityError, RemoteError."""
        return await in_thread(lambda: self._read_manifest(reference))

    async def put_manifest(
        self, data: bytes, media_type: str, *, tag: str | None = None, subject: Descriptor | None = None
    ) -> Descriptor:
        """Store a manifest and list it in index.json, under `tag` if given."""
        if tag is not None and isinstance(parse_digest_or_tag(tag), Digest):
            raise UsageError(f"{tag!r} is a digest, expected a tag")
        if len(data) > MAX_DOCUMENT:
            raise RemoteError(f"manifest of {len(data)} bytes is larger than {MAX_DOCUMENT}, the bound of registries")
        full = describe_manifest(data, media_type)
        await self.put_blob(data)
        async with self._locked():
            await in_thread(lambda: self._list_manifest(full, tag, subject is not None))
        return Descriptor(media_type, full.digest, full.size)

    async def has_blob(self, digest: Digest) -> bool:
        """Tell whether the layout has the blob."""
        return await in_thread(lambda: os.path.isfile(self._blob_path(digest)))

    async def get_blob(self, digest: Digest, *, size: int) -> bytes:
        """Return a whole blob of exactly `size` bytes, verified. Raises IntegrityError, NotFoundError."""
        if size > MAX_WHOLE_BLOB:
            raise RemoteError(f"blob {digest} of {size} bytes is too large to be read whole (bound {MAX_WHOLE_BLOB})")
        return await in_thread(lambda: self._read_verified(digest, size))

    @asynccontextmanager
    async def open_range(self, digest: Digest, offset: int, length: int) -> AsyncIterator[FileRange]:
        """Open bytes [offset, offset+length) of a blob. Raises NotFoundError, RemoteError if the blob is shorter."""
        if offset < 0 or length <= 0:
            raise ValueError(f"range of {length} bytes at {offset}")
        fd = await in_thread(lambda: self._open_blob(digest))
        try:
            size = os.fstat(fd).st_size
            if offset + length > size:
                raise RemoteError(
                    f"blob {digest} in {self.name} is {size} bytes, expected at least {offset + length}; the layout is damaged"
                )
            yield FileRange(fd, offset, length, f"blob {digest} in {self.name}")
        finally:
            os.close(fd)

    async def begin_upload(self, resume_token: str | None = None) -> LayoutUpload:
        """Start a blob upload or continue one; what a token no longer finds starts anew at 0."""
        await in_thread(self._create)
        return await open_upload(self._path, self._blobs, resume_token)

    async def put_blob(self, data: bytes | bytearray | memoryview) -> Digest:
        """Store a whole small blob unless the layout has it; return its digest."""
        return await in_thread(lambda: self._write_blob(data))

    async def mount_blob(self, digest: Digest, from_repository: str) -> bool:
        """A layout is one repository: True only if the blob is here already."""
        return await self.has_blob(digest)

    async def referrers(self, digest: Digest, artifact_type: str | None = None) -> AsyncIterator[Descriptor]:
        """Yield the manifests of index.json whose subject is `digest`, and those its fallback tag lists."""
        for found in await in_thread(lambda: self._find_referrers(digest)):
            if artifact_type is None or found.artifact_type == artifact_type:
                yield found

    async def aclose(self) -> None:
        """Nothing is held open between calls."""

    # -- below: blocking, run in threads --

    def _blob_path(self, digest: Digest) -> str:
        return os.path.join(self._blobs, digest.hex)

    def _open_blob(self, digest: Digest) -> int:
        try:
            return os.open(self._blob_path(digest), os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            self._check_layout()
            raise NotFoundError(f"{self.name} has no blob {digest}") from None

    def _read_verified(self, digest: Digest, size: int | None, limit: int = MAX_WHOLE_BLOB) -> bytes:
        fd = self._open_blob(digest)
        with open(fd, "rb") as file:
            actual = os.fstat(fd).st_size
            if size is not None and actual != size:
                raise IntegrityError(f"blob {digest} in {self.name} is {actual} bytes, expected {size}")
            if actual > limit:
                raise RemoteError(f"{digest} in {self.name} is {actual} bytes, expected at most {limit}")
            data = file.read(actual)
        if Digest.of(data) != digest:
            raise IntegrityError(f"{digest} in {self.name} holds other bytes (they hash to {Digest.of(data)})")
        return data

    def _read_index(self) -> Document:
        path = os.path.join(self._path, "index.json")
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_DOCUMENT + 1)
        except (FileNotFoundError, NotADirectoryError):
            self._check_layout()
            return new_index()
        try:
            return parse_index(data)
        except FormatError as error:
            raise RemoteError(f"{path} cannot be used: {error}") from None

    def _check_layout(self) -> None:
        """Raise NotFoundError unless the directory is a layout."""
        if not os.path.isfile(os.path.join(self._path, LAYOUT_FILE)):
            raise NotFoundError(f"{self.name} is not an OCI image layout: there is no file {self._path}/{LAYOUT_FILE}")

    def _read_manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        wanted = parse_digest_or_tag(reference)
        index = self._read_index()
        if isinstance(wanted, Digest):
            entry = next((e for e in index["manifests"] if e.get("digest") == wanted.text), None)
        else:
            entry = next((e for e in index["manifests"] if _tag_of(e) == wanted), None)
            if entry is None:
                raise NotFoundError(f"{self.name} has no tag {wanted}{_known_tags(index)}")
        try:
            digest = wanted if isinstance(wanted, Digest) else descriptor_of(entry or {}).digest
        except FormatError as error:
            raise RemoteError(f"index.json of {self.name} has a malformed entry for {reference}: {error}") from None
        try:
            data = self._read_verified(digest, None, MAX_DOCUMENT)
        except NotFoundError:
            raise NotFoundError(f"{self.name} has no manifest {digest}") from None
        media_type = entry.get("mediaType") if entry is not None else media_type_inside(data)
        return Descriptor(media_type if isinstance(media_type, str) else "", digest, len(data)), data

    def _list_manifest(self, descriptor: Descriptor, tag: str | None, has_subject: bool) -> None:
        index = self._read_index()
        if tag is None:
            if any(entry.get("digest") == descriptor.digest.text for entry in index["manifests"]):
                return
        else:
            index = self._untag(index, tag)
            # An entry of the same manifest without a tag was only there to be found; this one does that as well.
            index = without(index, lambda e: e.get("digest") == descriptor.digest.text and _tag_of(e) is None)
        entry = entry_of(Descriptor(descriptor.media_type, descriptor.digest, descriptor.size))
        if has_subject and descriptor.artifact_type is not None:
            entry["artifactType"] = descriptor.artifact_type
        if tag is not None:
            entry["annotations"] = {REF_NAME: tag}
        data = encode_index(with_entry(index, entry))
        if len(data) > MAX_DOCUMENT:
            raise RemoteError(f"index.json of {self.name} would grow over {MAX_DOCUMENT} bytes; remove old entries")
        write_synced(self._path, "index.json", data)

    def _untag(self, index: Document, tag: str) -> Document:
        """Take `tag` off its manifest; one that is a referrer stays listed, or nobody would find it again."""
        kept = without(index, lambda e: _tag_of(e) == tag)
        for entry in index["manifests"]:
            if _tag_of(entry) != tag or any(e.get("digest") == entry.get("digest") for e in kept["manifests"]):
                continue
            with contextlib.suppress(FormatError, RemoteError, IntegrityError):
                digest = descriptor_of(entry).digest
                if subject_of(parse_document(self._read_verified(digest, None, MAX_DOCUMENT))) is not None:
                    kept = with_entry(kept, {k: v for k, v in entry.items() if k != "annotations"})
        return kept

    def _find_referrers(self, digest: Digest) -> list[Descriptor]:
        index = self._read_index()
        found: dict[str, Descriptor] = {}
        fallback = referrers_tag(digest)
        for listed in valid_descriptors(index):
            try:
                data = self._read_verified(listed.digest, None, MAX_DOCUMENT)
                document = parse_document(data)
            except (NotFoundError, FormatError, RemoteError, IntegrityError):
                continue  # one damaged manifest must not hide the others
            if subject_of(document) == digest.text:
                found.setdefault(listed.digest.text, describe_manifest(data, listed.media_type))
            if listed.annotations.get(REF_NAME) == fallback:
                with contextlib.suppress(FormatError):
                    for descriptor in valid_descriptors(parse_index(data)):
                        found.setdefault(descriptor.digest.text, descriptor)
        return list(found.values())

    def _write_blob(self, data: bytes | bytearray | memoryview) -> Digest:
        self._create()
        digest = Digest.of(data)
        if not os.path.isfile(self._blob_path(digest)):
            write_synced(self._blobs, digest.hex, data, staging=uploads_directory(self._path))
        return digest

    def _create(self) -> None:
        """Make the layout unless it is there. Raises UsageError for a directory that is something else."""
        marker = os.path.join(self._path, LAYOUT_FILE)
        if os.path.isfile(marker):
            return
        try:
            os.makedirs(self._path, exist_ok=True)
            foreign = [name for name in os.listdir(self._path) if name not in {"blobs", ".uploads", "index.json"}]
            if foreign and not os.path.isfile(marker) and not all(n.startswith(".tmp-") for n in foreign):
                raise UsageError(
                    f"{self._path} is neither an OCI image layout nor empty (it holds {foreign[0]!r}); name a new directory"
                )
            os.makedirs(self._blobs, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UsageError(
                f"{self._path} is not a directory; name a new directory for the OCI image layout"
            ) from None
        if not os.path.exists(os.path.join(self._path, "index.json")):
            write_synced(self._path, "index.json", encode_index(new_index()), replace=False)
        write_synced(self._path, LAYOUT_FILE, LAYOUT_BYTES, replace=False)

    @asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        """Hold the layout's flock: between processes and between tasks, since each call opens the file anew."""
        fd = os.open(os.path.join(self._path, LAYOUT_FILE), os.O_RDWR | os.O_CLOEXEC)
        try:
            with trio.move_on_after(self._lock_timeout_s) as scope:
                while not _try_lock(fd):  # noqa: ASYNC110 - the holder may be another process: there is no event to wait for
                    await trio.sleep(0.02)
            if scope.cancelled_caught:
                raise UnavailableError(
                    f"{self.name} stayed locked by another process for {self._lock_timeout_s:g} s; is a build hanging?"
                )
            yield
        finally:
            os.close(fd)


class FileRange:
    """BlobStream over an open file."""

    def __init__(self, fd: int, offset: int, length: int, what: str) -> None:
        self._fd = fd
        self._offset = offset
        self._left = length
        self._what = what

    async def readinto(self, buffer: memoryview) -> None:
        """Fill `buffer` with the next bytes of the range. Raises UnavailableError, ValueError (see BlobStream)."""
        if len(buffer) > self._left:
            raise ValueError(f"{len(buffer)} bytes asked, {self._left} left in the range")
        done = 0
        while done < len(buffer):
            piece = buffer[done : done + READ_PIECE]
            got = await in_thread(partial(os.preadv, self._fd, [piece], self._offset))
            if got == 0:
                self._left = 0
                raise UnavailableError(f"{self._what} ends at byte {self._offset}; it shrank while it was read")
            done += got
            self._offset += got
            self._left -= got

    def blocking(self) -> BlockingRead:
        """Return what reads the stream in a thread (see ThreadedStream)."""
        return self._readinto_blocking

    def _readinto_blocking(self, buffer: memoryview) -> None:
        if len(buffer) > self._left:
            raise ValueError(f"{len(buffer)} bytes asked, {self._left} left in the range")
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self._fd, [buffer[done:]], self._offset)
            except OSError as error:
                raise remote_error(error) from error
            if got == 0:
                self._left = 0
                raise UnavailableError(f"{self._what} ends at byte {self._offset}; it shrank while it was read")
            done += got
            self._offset += got
            self._left -= got


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EWOULDBLOCK, errno.EINTR}:
            return False
        raise
    return True


def _tag_of(entry: Document) -> str | None:
    annotations = entry.get("annotations")
    tag = annotations.get(REF_NAME) if isinstance(annotations, dict) else None
    return tag if isinstance(tag, str) else None


def _known_tags(index: Document) -> str:
    tags = sorted({tag for tag in map(_tag_of, index["manifests"]) if tag is not None and tag.isprintable()})
    if not tags:
        return "; it has no tags"
    return f"; it has {', '.join(tags[:8])}{' and more' if len(tags) > 8 else ''}"
