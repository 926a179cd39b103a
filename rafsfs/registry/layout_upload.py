"""One blob on its way into an OCI image layout.

The bytes grow in `.uploads/<id>`; `commit` hashes what is there, unless its caller has, syncs and renames. The resume token is the id: an
upload that was continued is always hashed, so a torn tail of a crash is found. Uploads that nobody touched for a week are removed by the
next one to begin.
Rule: one task writes one upload (as with any file object).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import time
from functools import partial
from typing import Final

from ..errors import IntegrityError, RemoteError
from ..types import Digest
from .disk import in_thread, place, start_writing, write_all

TOKEN_PREFIX: Final = "layout1:"  # noqa: S105 - the name of a version
STALE_S: Final = 7 * 24 * 3600.0
BATCH: Final = 1 << 20
"""Small writes are gathered to this many bytes: a thread hop costs about 0.2 ms, writing a MiB 0.3 ms."""
_HASHED: Final = 64 << 20
"""Bytes hashed per thread hop at the end."""
_TOKEN: Final = re.compile(rf"\A{TOKEN_PREFIX}([0-9a-f]{{32}})\Z")


def uploads_directory(layout: str) -> str:
    """Return where unfinished blobs of a layout live: on the same file system, outside blobs/."""
    return os.path.join(layout, ".uploads")


async def open_upload(layout: str, blobs: str, token: str | None) -> LayoutUpload:
    """Start an upload, or continue the one of `token` if its file is still there."""
    return await in_thread(lambda: _open(layout, blobs, token))


class LayoutUpload:
    """A BlobUpload into a file."""

    def __init__(self, fd: int, path: str, blobs: str, offset: int) -> None:
        self._fd = fd
        self._path = path
        self._blobs = blobs
        self._offset = offset
        self._resumed = offset > 0
        self._gathered = bytearray()

    @property
    def offset(self) -> int:
        """Bytes taken, resumed ones included."""
        return self._offset + len(self._gathered)

    @property
    def resume_token(self) -> str | None:
        """The upload's name."""
        return TOKEN_PREFIX + os.path.basename(self._path)

    async def write(self, *parts: bytes | bytearray | memoryview) -> None:
        """Append `parts`. Raises RemoteError when the disk refuses (full, read-only)."""
        views = [memoryview(part).cast("B") for part in parts]
        if len(self._gathered) + sum(map(len, views)) < BATCH:
            for view in views:
                self._gathered += view
            return
        await self._flush()
        await self._append(views)

    async def commit(self, digest: Digest, *, computed: bool = False) -> None:
        """Give the blob its name. Raises IntegrityError if its bytes do not hash to `digest`; the upload is then gone."""
        await self._flush()
        if not computed or self._resumed:
            actual = await self._hash()
            if actual != digest:
                self._close()
                os.unlink(self._path)
                raise IntegrityError(f"the uploaded blob hashes to {actual}, expected {digest}; build it again")
        await in_thread(lambda: self._finish(digest))

    async def abandon(self) -> None:
        """Flush and let go; an empty upload leaves nothing behind."""
        if self._fd < 0:
            return
        try:
            await self._flush()
        finally:
            self._close()
            if self.offset == 0:
                with contextlib.suppress(OSError):
                    os.unlink(self._path)
                    os.rmdir(os.path.dirname(self._path))

    async def _flush(self) -> None:
        if self._gathered:
            # Let go of only when written: after a failure or a cancellation the next write begins with it.
            await self._append([memoryview(bytes(self._gathered))])
            self._gathered.clear()

    async def _append(self, views: list[memoryview]) -> None:
        self._check_open()

        def append() -> None:
            # At a place of our own counting: what a full disk cut short is overwritten by the next try.
            write_all(self._fd, views, self._path, offset=self._offset)
            start_writing(self._fd, self._offset)
            self._offset += sum(map(len, views))

        await in_thread(append)

    async def _hash(self) -> Digest:
        """Return the digest of what the file holds."""
        self._check_open()
        sha256 = hashlib.sha256()
        buffer = memoryview(bytearray(BATCH))

        def piece(start: int) -> None:
            for offset in range(start, min(start + _HASHED, self._offset), BATCH):
                got = os.preadv(self._fd, [buffer[: self._offset - offset]], offset)
                sha256.update(buffer[:got])

        for start in range(0, self._offset, _HASHED):
            await in_thread(partial(piece, start))
        return Digest(f"sha256:{sha256.hexdigest()}")

    def _check_open(self) -> None:
        if self._fd < 0:
            raise RemoteError(f"upload {self._path} is already finished or abandoned")

    def _finish(self, digest: Digest) -> None:
        self._check_open()
        os.ftruncate(self._fd, self._offset)
        os.fsync(self._fd)
        self._close()
        place(self._path, self._blobs, digest.hex)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(self._path))  # only the last one out can

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _open(layout: str, blobs: str, token: str | None) -> LayoutUpload:
    directory = uploads_directory(layout)
    match = _TOKEN.match(token) if token is not None else None
    if match is not None:
        path = os.path.join(directory, match[1])
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            return LayoutUpload(fd, path, blobs, os.fstat(fd).st_size)
    path = os.path.join(directory, secrets.token_hex(16))
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    for attempt in range(3):
        os.makedirs(directory, exist_ok=True)
        _remove_stale(directory)
        try:
            fd = os.open(path, flags, 0o666)
        except FileNotFoundError:
            if attempt == 2:  # another upload keeps removing the directory with its own end
                raise
            continue
        return LayoutUpload(fd, path, blobs, 0)
    raise AssertionError("unreachable")


def _remove_stale(directory: str) -> None:
    limit = time.time() - STALE_S
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_mtime < limit:
                    os.unlink(entry.path)
