"""One blob on its way out: bytes come in order, are hashed, and go to the store while the blob still grows.

Decided here: small blobs are asked for before they are sent; what an earlier, interrupted push has sent is skipped; a blob the
journal knows as finished is only hashed. When what the journal or the store knew of a blob does not hold (other bytes, a session
that is gone with what it held), the blob `is_stale`: the build goes on for the others and has to be made again for this one. Memory: up
to 32 MiB before an upload starts; from then on nothing of its own, what the caller handed over is sent as it is.

Concurrency: per blob one task (`run`, owned by the builder's nursery) that hashes parts in a thread, and one that sends the parts before
and gives them back, so that SHA-256 and the store overlap. `put` hands data over a channel of one and sending has no queue: a slow
upload holds the builder back. After a failure or cancellation the upload stays resumable and the journal says where.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import trio

from rafsfs.errors import IntegrityError, RafsError, UploadLostError
from rafsfs.interfaces import BlobUpload, ImageStore
from rafsfs.types import Digest

from .journal import Journal

_WHOLE: Final = 32 << 20
"""A blob up to this size is kept until it is complete, and not sent if the store has it."""
_LET_GO_S: Final = 5.0
"""How long an upload may take to be let go of when a build ends before its time."""

Parts = list[bytes | memoryview]


@dataclass(frozen=True, slots=True)
class FinishedBlob:
    """A blob that the store has."""

    digest: Digest
    size: int


class BlobWriter:
    """A blob being written."""

    def __init__(
        self, store: ImageStore, journal: Journal | None, key: str, limiter: trio.CapacityLimiter | None = None
    ) -> None:
        self._store = store
        self._journal = journal
        self._key = key
        self._limiter = limiter
        self._hash = hashlib.sha256()
        self._kept: Parts = []
        self._filled = 0
        self._is_streaming = False
        self._upload: BlobUpload | None = None
        self._resumed = False
        self._skip = 0
        self._expected: tuple[Digest, int] | None = None
        self._noted = ""
        self._send, self._receive = trio.open_memory_channel[tuple[Parts, Callable[[], None]]](1)
        self.size = 0
        """Bytes reserved so far: the offset of the next chunk."""
        self.sent_bytes = 0
        self.is_stale = False
        self.result: FinishedBlob | None = None
        """Set when `run` returns, unless the blob is stale."""

    def reserve(self, length: int) -> int:
        """Return the offset of the next `length` bytes, which the caller will put in this order."""
        offset = self.size
        self.size += length
        return offset

    async def put(self, parts: Parts, taken: Callable[[], None]) -> None:
        """Append data. The caller leaves it alone until `taken` is called."""
        await self._send.send((parts, taken))

    async def finish(self) -> None:
        """Say that nothing follows."""
        await self._send.aclose()

    async def run(self) -> None:
        """Take data until `finish`, then see that the store has the blob, or that the blob is stale. Raises RemoteError."""
        try:
            await self._ask_journal()
            to_send, from_hash = trio.open_memory_channel[tuple[Parts, Callable[[], None]]](0)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_all, from_hash)
                await self._take_all(to_send)
            if not self.is_stale:
                await self._complete(Digest(f"sha256:{self._hash.hexdigest()}"))
            if self.is_stale:
                await self._let_go()
                if self._journal:
                    self._journal.forget(self._key)
        except BaseException:
            await self._let_go()
            raise
        finally:
            self._kept = []

    async def _ask_journal(self) -> None:
        if self._journal:
            finished = self._journal.finished(self._key)
            if finished and await self._store.has_blob(finished[0]):
                self._expected = finished

    async def _take_all(self, onward: trio.MemorySendChannel[tuple[Parts, Callable[[], None]]]) -> None:
        async with onward:
            async for parts, taken in self._receive:
                if not self.is_stale:
                    await trio.to_thread.run_sync(self._hash_and_keep, parts, limiter=self._limiter)
                if self._is_streaming and self._expected is None:
                    await onward.send((parts, taken))
                    continue
                taken()
                if self._filled > _WHOLE:
                    self._is_streaming = True
                    kept, self._kept = self._kept, []
                    await onward.send((kept, _nothing))

    async def _send_all(self, incoming: trio.MemoryReceiveChannel[tuple[Parts, Callable[[], None]]]) -> None:
        async for parts, taken in incoming:
            if not self.is_stale:
                if self._upload is None:
                    await self._begin(self._journal.token(self._key) if self._journal else None)
                await self._write(parts)
            taken()

    async def _complete(self, digest: Digest) -> None:
        if self._expected is not None:
            self.is_stale = self._expected != (digest, self.size)
        elif self._upload is not None:
            await self._commit(digest)
        elif not await self._store.has_blob(digest):
            await self._begin(None)
            await self._write(self._kept)
            await self._commit(digest)
        if not self.is_stale:
            if self._journal:
                self._journal.note_finished(self._key, digest, self.size)
            self.result = FinishedBlob(digest, self.size)

    def _hash_and_keep(self, parts: Parts) -> None:
        """Hash parts; keep them while it is open whether the blob is going to be sent. In a thread."""
        for part in parts:
            self._hash.update(part)
        if self._expected is not None or self._is_streaming:
            return
        for part in parts:
            # What was encoded has memory of its own; the rest is in a slab that its owner wants back.
            self._kept.append(part if isinstance(part, bytes) else bytes(part))
            self._filled += len(part)

    async def _begin(self, token: str | None) -> None:
        self._upload = await self._store.begin_upload(token)
        self._skip = self._upload.offset
        self._resumed = token is not None and self._skip > 0

    async def _write(self, parts: Parts) -> None:
        """Send parts, but for what the store has from an earlier push."""
        assert self._upload is not None
        left = []
        for part in parts:
            skipped = min(self._skip, len(part))
            self._skip -= skipped
            if skipped < len(part):
                left.append(memoryview(part)[skipped:])
        if left:
            try:
                await self._upload.write(*left)
            except UploadLostError:
                if self._journal is None:
                    raise
                self.is_stale = True
                return
            self.sent_bytes += sum(map(len, left))
        self._note_token()

    def _note_token(self) -> None:
        assert self._upload is not None
        token = self._upload.resume_token
        if self._journal and token and token != self._noted:  # once per part that the store has taken
            self._journal.note_token(self._key, token)
            self._noted = token

    async def _commit(self, digest: Digest) -> None:
        assert self._upload is not None
        if self.is_stale:
            return
        if self._skip:  # the store holds more of the upload than the blob has
            self.is_stale = True
            return
        try:
            await self._upload.commit(digest, computed=not self._resumed)
        except UploadLostError:
            if self._journal is None:
                raise
            self.is_stale = True
        except IntegrityError:
            if not self._resumed:
                raise
            self.is_stale = True  # the session held other bytes; this build's own have left memory

    async def _let_go(self) -> None:
        """End the upload so that it can be continued, as far as the store lets us."""
        if self._upload is None:
            return
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _LET_GO_S), suppress(RafsError):
            await self._upload.abandon()
            self._note_token()


def _nothing() -> None:
    """What is called when parts of our own have been sent."""
