"""An OCI image layout directory as an ImageStore (image-spec 1.1, image-layout.md): needs no server.

Decided here: `oci-layout`, `index.json`, `blobs/sha256/HEX`; a tag is the annotation org.opencontainers.image.ref.name. Rules: a
file appears under its digest only complete and hashed, by rename; `index.json` is replaced, never edited, under a lock file, so that
several builders can share a directory. File work of more than a few KiB runs in threads.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import trio

from ..errors import FormatError, IntegrityError, NotFoundError, RemoteError, UnavailableError
from ..interfaces import BlobStream, BlobUpload
from ..types import Descriptor, Digest
from .manifests import (
    MANIFEST_LIMIT,
    MEDIA_INDEX,
    descriptor_json,
    descriptor_of_manifest,
    extend_index,
    media_type_of,
    parse_descriptor,
    parse_index,
    referrers_tag,
)

_REF_NAME: Final = "org.opencontainers.image.ref.name"
_INDEX_LIMIT: Final = 64 << 20
_T = TypeVar("_T")


class OciLayout:
    """One layout directory. It is made when something is first written to it. See interfaces.ImageStore."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._blobs = os.path.join(self._path, "blobs", "sha256")

    @property
    def name(self) -> str:
        """`oci:DIR`."""
        return f"oci:{self._path}"

    async def resolve(self, reference: str) -> Descriptor:
        """Return the manifest descriptor of a tag or digest."""
        return await self._run(self._resolve, reference)

    async def get_manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        """Return descriptor and bytes of a manifest, verified."""
        return await self._run(self._get_manifest, reference)

    async def put_manifest(
        self, data: bytes, media_type: str, *, tag: str | None = None, subject: Descriptor | None = None
    ) -> Descriptor:
        """Store a manifest, under `tag` if given."""
        if len(data) > MANIFEST_LIMIT:
            raise FormatError(f"manifest of {len(data)} bytes, at most {MANIFEST_LIMIT}")
        return await self._run(self._put_manifest, data, media_type, tag, subject)

    async def has_blob(self, digest: Digest) -> bool:
        """Tell whether the layout has the blob."""
        return await self._run(os.path.exists, self._blob_path(digest))

    async def get_blob(self, digest: Digest, *, size: int) -> bytes:
        """Return a whole blob of exactly `size` bytes, verified."""
        return await self._run(self._get_blob, digest, size)

    @asynccontextmanager
    async def open_range(self, digest: Digest, offset: int, length: int) -> AsyncIterator[BlobStream]:
        """Open bytes [offset, offset+length) of a blob."""
        descriptor = await self._run(self._open_blob, digest)
        try:
            yield _FileStream(descriptor, offset, length, f"{self.name}: blob {digest}")
        finally:
            os.close(descriptor)

    async def begin_upload(self, resume_token: str | None = None) -> BlobUpload:
        """Start an upload into a temporary file. Layouts do not resume: writing again costs no network."""
        return await self._run(self._begin_upload)

    async def put_blob(self, data: bytes | bytearray | memoryview) -> Digest:
        """Store a whole blob unless it is there."""
        return await self._run(self._put_blob, data)

    async def mount_blob(self, digest: Digest, from_repository: str) -> bool:
        """A layout has no other repositories: tell whether the blob is here anyway."""
        return await self.has_blob(digest)

    async def referrers(self, digest: Digest, artifact_type: str | None = None) -> AsyncIterator[Descriptor]:
        """Yield the manifests whose subject is `digest`."""
        try:
            _, data = await self.get_manifest(referrers_tag(digest))
        except NotFoundError:
            return
        for descriptor in parse_index(data, artifact_type):
            yield descriptor

    async def aclose(self) -> None:
        """Nothing is held open."""

    async def _run(self, function: Callable[..., _T], *arguments: Any) -> _T:
        def guarded() -> _T:
            try:
                return function(*arguments)
            except OSError as error:
                raise self._file_error(error) from error

        return await trio.to_thread.run_sync(guarded)

    def _file_error(self, error: OSError) -> RemoteError:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return RemoteError(f"{self.name}: no space left; free some and try again")
        return UnavailableError(f"{self.name}: {error.strerror or error} ({error.filename or self._path})")

    def _blob_path(self, digest: Digest) -> str:
        return os.path.join(self._blobs, digest.hex)

    def _read_index(self) -> list[dict[str, Any]]:
        try:
            with open(os.path.join(self._path, "index.json"), "rb") as file:
                data = file.read(_INDEX_LIMIT + 1)
        except FileNotFoundError:
            if not os.path.isdir(self._path):
                raise NotFoundError(f"{self.name}: no such directory") from None
            raise NotFoundError(f"{self.name}: not an OCI image layout (it has no index.json)") from None
        try:
            entries = json.loads(data)["manifests"]
            if not all(isinstance(entry, dict) for entry in entries):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError(f"{self.name}: index.json is not an OCI index") from error
        return list(entries)

    def _resolve(self, reference: str) -> Descriptor:
        if reference.startswith("sha256:"):
            digest = Digest(reference)
            try:
                size = os.path.getsize(self._blob_path(digest))
            except FileNotFoundError:
                raise NotFoundError(f"{self.name}: no manifest {reference}") from None
            return Descriptor("", digest, size)
        for entry in self._read_index():
            annotations = entry.get("annotations")
            if isinstance(annotations, dict) and annotations.get(_REF_NAME) == reference:
                return parse_descriptor(entry)
        raise NotFoundError(f"{self.name}: no tag {reference}")

    def _get_manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        found = self._resolve(reference)
        if found.size > MANIFEST_LIMIT:
            raise FormatError(f"{self.name}: manifest {reference} of {found.size} bytes, at most {MANIFEST_LIMIT}")
        data = self._get_blob(found.digest, found.size)
        return Descriptor(found.media_type or media_type_of(data), found.digest, len(data)), data

    def _get_blob(self, digest: Digest, size: int) -> bytes:
        descriptor = self._open_blob(digest)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(size + 1)
        if len(data) != size or Digest.of(data) != digest:
            raise IntegrityError(f"{self.name}: blob {digest} is not what its digest says, or not {size} bytes")
        return data

    def _open_blob(self, digest: Digest) -> int:
        try:
            return os.open(self._blob_path(digest), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFoundError(f"{self.name}: blob {digest} is not there") from None

    def _put_manifest(self, data: bytes, media_type: str, tag: str | None, subject: Descriptor | None) -> Descriptor:
        self._prepare()
        descriptor = Descriptor(media_type, self._put_blob(data), len(data))
        with self._locked():
            if subject:
                self._list_referrer(subject.digest, descriptor_of_manifest(data, media_type))
            if tag:
                self._tag(descriptor, tag)
        return descriptor

    def _list_referrer(self, subject: Digest, descriptor: Descriptor) -> None:
        tag = referrers_tag(subject)
        try:
            existing: bytes | None = self._get_manifest(tag)[1]
        except NotFoundError:
            existing = None
        data = extend_index(existing, descriptor)
        self._tag(Descriptor(MEDIA_INDEX, self._put_blob(data), len(data)), tag)

    def _tag(self, descriptor: Descriptor, tag: str) -> None:
        kept = [entry for entry in self._read_index() if (entry.get("annotations") or {}).get(_REF_NAME) != tag]
        named = Descriptor(descriptor.media_type, descriptor.digest, descriptor.size, {_REF_NAME: tag})
        index = {"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": [*kept, descriptor_json(named)]}
        self._replace("index.json", json.dumps(index, indent=1).encode())

    def _prepare(self) -> None:
        os.makedirs(self._blobs, exist_ok=True)
        if not os.path.exists(os.path.join(self._path, "oci-layout")):
            self._replace("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        with self._locked():
            if not os.path.exists(os.path.join(self._path, "index.json")):
                index = {"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": []}
                self._replace("index.json", json.dumps(index).encode())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(os.path.join(self._path, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _replace(self, name: str, data: bytes) -> None:
        descriptor, temporary = tempfile.mkstemp(prefix=".new-", dir=self._path)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            os.rename(temporary, os.path.join(self._path, name))
        except BaseException:
            os.unlink(temporary)
            raise

    def _put_blob(self, data: bytes | bytearray | memoryview) -> Digest:
        digest = Digest.of(data)
        if not os.path.exists(self._blob_path(digest)):
            upload = self._begin_upload()
            try:
                upload.append(data)
                upload.finish(digest)
            finally:
                upload.discard()
        return digest

    def _begin_upload(self) -> _FileUpload:
        self._prepare()
        descriptor, temporary = tempfile.mkstemp(prefix=".upload-", dir=self._blobs)
        return _FileUpload(self, descriptor, temporary)


class _FileUpload:
    """A blob being written to a temporary file and hashed on the way."""

    def __init__(self, layout: OciLayout, descriptor: int, temporary: str) -> None:
        self._layout = layout
        self._descriptor = descriptor
        self._temporary = temporary
        self._hash = hashlib.sha256()
        self._size = 0

    @property
    def offset(self) -> int:
        return self._size

    @property
    def resume_token(self) -> str | None:
        return None

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`."""
        await self._layout._run(self.append, data)

    async def commit(self, digest: Digest) -> None:
        """Rename the file to its digest."""
        await self._layout._run(self.finish, digest)

    async def abandon(self) -> None:
        """Delete the temporary file."""
        self.discard()

    def append(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        self._hash.update(view)
        self._size += len(view)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def finish(self, digest: Digest) -> None:
        if self._hash.hexdigest() != digest.hex:
            raise IntegrityError(
                f"{self._layout.name}: wrote bytes that hash to sha256:{self._hash.hexdigest()}, not {digest}"
            )
        os.fchmod(self._descriptor, 0o644)
        os.fsync(self._descriptor)
        os.rename(self._temporary, self._layout._blob_path(digest))
        self._temporary = ""
        self.discard()

    def discard(self) -> None:
        if self._temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)
            self._temporary = ""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.discard()


class _FileStream:
    """A range of a blob file."""

    def __init__(self, descriptor: int, offset: int, length: int, what: str) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._left = length
        self._what = what

    async def readinto(self, buffer: memoryview) -> None:
        """Fill `buffer` with the next bytes of the range."""
        if len(buffer) > self._left:
            raise ValueError(f"{len(buffer)} bytes asked of a range with {self._left} left")
        await trio.to_thread.run_sync(self._fill, buffer)
        self._offset += len(buffer)
        self._left -= len(buffer)

    def _fill(self, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self._descriptor, [buffer[done:]], self._offset + done)
            except OSError as error:
                raise UnavailableError(f"{self._what}: {error.strerror}") from error
            if not got:
                raise UnavailableError(f"{self._what} ends at byte {self._offset + done}")
            done += got
