"""One blob on its way out: bytes come in order, are hashed, and go to the store while the blob still grows.

Decided here: small blobs are asked for before they are sent; what an earlier, interrupted push has sent is skipped; a blob the
journal knows as finished is only hashed. Memory: up to 32 MiB before an upload starts, then one part.

Concurrency: one task (`run`, owned by the builder's nursery) per blob; `put` hands data over a channel of one part, so that a slow
upload holds the builder back. After a cancellation the upload stays resumable and the journal says where.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import trio

from rafsfs.errors import IntegrityError
from rafsfs.interfaces import BlobUpload, ImageStore
from rafsfs.registry.upload import UploadLostError
from rafsfs.types import Digest

from .journal import Journal

_WHOLE: Final = 32 << 20
"""A blob up to this size is kept until it is complete, and not sent if the store has it."""


class StaleJournalError(Exception):
    """What the journal or the store knew of a blob does not hold: build again without its word."""


@dataclass(frozen=True, slots=True)
class FinishedBlob:
    """A blob that the store has."""

    digest: Digest
    size: int


class BlobWriter:
    """A blob being written."""

    def __init__(self, store: ImageStore, journal: Journal | None, key: str) -> None:
        self._store = store
        self._journal = journal
        self._key = key
        self._hash = hashlib.sha256()
        self._kept: list[bytes | memoryview] = []
        self._kept_bytes = 0
        self._upload: BlobUpload | None = None
        self._skip = 0
        self._expected: tuple[str, int] | None = None
        self._noted = ""
        self._send, self._receive = trio.open_memory_channel[list[bytes | memoryview]](1)
        self.size = 0
        """Bytes put so far: the offset of the next chunk."""
        self.sent_bytes = 0
        self.result: FinishedBlob | None = None
        self.done = trio.Event()

    def reserve(self, length: int) -> int:
        """Return the offset of the next `length` bytes, which the caller will put in this order."""
        offset = self.size
        self.size += length
        return offset

    async def put(self, parts: list[bytes | memoryview]) -> None:
        """Append data. The caller does not touch it again."""
        await self._send.send(parts)

    async def finish(self) -> None:
        """Say that nothing follows."""
        await self._send.aclose()

    async def run(self) -> None:
        """Take data until `finish`, then see that the store has the blob. Raises StaleJournalError if the build must be made anew."""
        try:
            await self._run()
        except UploadLostError:
            if self._journal is None:
                raise
            self._journal.forget(self._key)  # the session is gone with what it held; other blobs keep theirs
            raise StaleJournalError from None

    async def _run(self) -> None:
        if self._journal:
            finished = self._journal.finished(self._key)
            if finished and await self._store.has_blob(Digest(finished[0])):
                self._expected = finished
        async for parts in self._receive:
            await trio.to_thread.run_sync(self._update, parts)
            if self._expected is None:
                await self._take(parts)
        digest = Digest(f"sha256:{self._hash.hexdigest()}")
        if self._expected is not None:
            if self._expected != (str(digest), self.size):
                if self._journal:
                    self._journal.forget(self._key)
                raise StaleJournalError
        elif self._upload is None:
            if self.size and not await self._store.has_blob(digest):
                await self._begin(None)
                await self._flush()
                await self._commit(digest)
        else:
            await self._commit(digest)
        if self.size and self._journal:
            self._journal.note_finished(self._key, str(digest), self.size)
        self.result = FinishedBlob(digest, self.size)
        self.done.set()

    def _update(self, parts: list[bytes | memoryview]) -> None:
        for part in parts:
            self._hash.update(part)

    async def _take(self, parts: list[bytes | memoryview]) -> None:
        self._kept += parts
        self._kept_bytes += sum(len(part) for part in parts)
        if self._upload is None and self._kept_bytes > _WHOLE:
            await self._begin(self._journal.token(self._key) if self._journal else None)
        if self._upload is not None:
            await self._flush()

    async def _begin(self, token: str | None) -> None:
        self._upload = await self._store.begin_upload(token)
        self._skip = self._upload.offset

    async def _flush(self) -> None:
        assert self._upload is not None
        for part in self._kept:
            view = memoryview(part)
            skipped = min(self._skip, len(view))
            self._skip -= skipped
            if skipped < len(view):
                await self._upload.write(view[skipped:])
                self.sent_bytes += len(view) - skipped
        self._kept.clear()
        self._kept_bytes = 0
        token = self._upload.resume_token
        if self._journal and token and token != self._noted:  # once per part that the store has taken
            self._journal.note_token(self._key, token)
            self._noted = token

    async def _commit(self, digest: Digest) -> None:
        assert self._upload is not None
        try:
            if self._skip:
                raise IntegrityError("the store holds more of the upload than the blob has")
            await self._upload.commit(digest)
        except IntegrityError:
            # the resumed session held other bytes: this build's own are gone, so it is made anew from nothing
            if self._journal and self._journal.token(self._key):
                self._journal.forget(self._key)
                raise StaleJournalError from None
            raise
