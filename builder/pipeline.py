"""From planned chunks to blobs: read, hash, look up, encode, append; several threads, one order.

Decided here: batches, bounds, and that the commit order is the planned order. A batch goes through two hops to a thread: read and hash,
then, for chunks not known yet, encode. Between the hops, in order, one task looks digests up: so the result depends neither on thread count
nor on timing, and a chunk is encoded only if it is new.

Memory: 2 × (threads + 2) batches of at most 8 MiB (or one chunk) in flight, each with its encoded form; plus 32 bytes per chunk known.
Concurrency: three tasks in one nursery, joined by channels in order: `_read` starts hashing, `_look_up` decides and starts encoding,
`_append` writes. A failure cancels the others; nothing has been named in the store by then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from rafsfs.errors import SourceError
from rafsfs.format.chunk_map import ChunkMapBuilder
from rafsfs.format.codec import Encoded, chunk_digest, encode

from .blob_writer import BlobWriter
from .layout import ChunkPlan
from .scan import SourceFile, changed, read_error, signature_of

BATCH_BYTES: Final = 8 << 20
"""Bytes per hop to a thread: a hop costs up to 0.25 ms under load, hashing and encoding 8 MiB about 10 ms."""
_BATCH_CHUNKS: Final = 512


@dataclass(slots=True)
class _Batch:
    """Chunks that travel together."""

    chunks: list[tuple[ChunkPlan, bool]]
    data: list[memoryview] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    new: list[int] = field(default_factory=list)
    encoded: dict[int, Encoded] = field(default_factory=dict)
    hashed: trio.Event = field(default_factory=trio.Event)
    ready: trio.Event = field(default_factory=trio.Event)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a known chunk is stored."""

    blob: int
    offset: int
    stored_size: int
    codec: int
    param: int


@dataclass(slots=True)
class Totals:
    """What came of the chunks."""

    new_chunks: int = 0
    reused_chunks: int = 0
    reused_bytes: int = 0
    data_bytes: int = 0


class ChunkPipeline:
    """Runs the chunks of one build."""

    def __init__(
        self,
        files: Sequence[SourceFile],
        chunk_map: ChunkMapBuilder,
        open_blob: Callable[[int], tuple[int, BlobWriter]],
        *,
        codec: str,
        threads: int,
        progress: Callable[[int], None],
    ) -> None:
        self._files = files
        self._chunk_map = chunk_map
        self._open_blob = open_blob
        self._codec = codec
        self._limiter = trio.CapacityLimiter(threads)
        self._depth = threads + 2
        self._progress = progress
        self._blobs: dict[int, tuple[int, BlobWriter]] = {}
        self._known: dict[bytes, _Place | None] = {}
        self.totals = Totals()

    async def run(self, chunks: Iterator[tuple[ChunkPlan, bool]]) -> None:
        """Process all chunks. Raises SourceError, RemoteError."""
        to_look_up, from_read = trio.open_memory_channel[_Batch](self._depth)
        to_append, from_look_up = trio.open_memory_channel[_Batch](self._depth)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read, chunks, to_look_up, nursery)
            nursery.start_soon(self._look_up, from_read, to_append, nursery)
            nursery.start_soon(self._append, from_look_up)

    async def _read(
        self, chunks: Iterator[tuple[ChunkPlan, bool]], onward: trio.MemorySendChannel[_Batch], nursery: trio.Nursery
    ) -> None:
        async with onward:
            for batch in _batches(chunks):
                await onward.send(batch)  # bounded: waits for the batch `depth` places before this one
                nursery.start_soon(self._hash, batch)

    async def _hash(self, batch: _Batch) -> None:
        await trio.to_thread.run_sync(self._read_and_hash, batch, limiter=self._limiter)
        batch.hashed.set()

    async def _look_up(
        self, incoming: trio.MemoryReceiveChannel[_Batch], onward: trio.MemorySendChannel[_Batch], nursery: trio.Nursery
    ) -> None:
        async with onward:
            async for batch in incoming:
                await batch.hashed.wait()
                for number, digest in enumerate(batch.digests):
                    if digest not in self._known:
                        self._known[digest] = None
                        batch.new.append(number)
                await onward.send(batch)
                nursery.start_soon(self._encode, batch)

    async def _encode(self, batch: _Batch) -> None:
        if batch.new:
            await trio.to_thread.run_sync(self._encode_new, batch, limiter=self._limiter)
        batch.ready.set()

    async def _append(self, incoming: trio.MemoryReceiveChannel[_Batch]) -> None:
        async for batch in incoming:
            await batch.ready.wait()
            parts: dict[int, list[bytes | memoryview]] = {}
            for number, (chunk, _) in enumerate(batch.chunks):
                place = self._place(batch, number, chunk, parts)
                self._chunk_map.add_chunk(
                    chunk.space,
                    chunk.offset,
                    chunk.length,
                    batch.digests[number],
                    place.blob,
                    place.offset,
                    place.stored_size,
                    place.codec,
                    place.param,
                )
            for space, data in parts.items():
                await self._blobs[space][1].put(data)
            for chunk, last in batch.chunks:
                if last and chunk.space in self._blobs:
                    await self._blobs[chunk.space][1].finish()
            self._progress(sum(chunk.length for chunk, _ in batch.chunks))

    def _place(
        self, batch: _Batch, number: int, chunk: ChunkPlan, parts: dict[int, list[bytes | memoryview]]
    ) -> _Place:
        """Return where a chunk is stored, giving it its place if it is new."""
        totals = self.totals
        totals.data_bytes += chunk.length
        encoded = batch.encoded.get(number)
        if encoded is None:
            known = self._known[batch.digests[number]]
            assert known is not None
            totals.reused_chunks += 1
            totals.reused_bytes += chunk.length
            return known
        if chunk.space not in self._blobs:
            self._blobs[chunk.space] = self._open_blob(chunk.space)
        blob, writer = self._blobs[chunk.space]
        size = len(encoded.data)
        place = _Place(blob, writer.reserve(size), size, encoded.codec, encoded.param)
        self._known[batch.digests[number]] = place
        parts.setdefault(chunk.space, []).append(encoded.data)
        totals.new_chunks += 1
        return place

    def _read_and_hash(self, batch: _Batch) -> None:
        """Read the chunks of a batch and hash them. In a thread."""
        opened = -1
        descriptor = -1
        try:
            for chunk, _ in batch.chunks:
                file = self._files[chunk.file]
                if chunk.file != opened:
                    if descriptor >= 0:
                        self._close(descriptor, self._files[opened])
                        descriptor = -1
                    descriptor, opened = self._open(file), chunk.file
                data = memoryview(bytearray(chunk.length))
                self._fill(descriptor, data, chunk, file)
                batch.data.append(data)
                batch.digests.append(chunk_digest(data))
            if descriptor >= 0:
                self._close(descriptor, self._files[opened])
                descriptor = -1
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _open(self, file: SourceFile) -> int:
        try:
            descriptor = os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise read_error(file.path, error) from error
        if signature_of(os.fstat(descriptor)) != file.signature:
            os.close(descriptor)
            raise changed(file.path)
        return descriptor

    def _close(self, descriptor: int, file: SourceFile) -> None:
        """Close a file after checking that nobody has written to it meanwhile."""
        same = signature_of(os.fstat(descriptor)) == file.signature
        os.close(descriptor)
        if not same:
            raise changed(file.path)

    def _fill(self, descriptor: int, data: memoryview, chunk: ChunkPlan, file: SourceFile) -> None:
        done = 0
        try:
            while done < chunk.length:
                got = os.preadv(descriptor, [data[done:]], chunk.file_offset + done)
                if not got:
                    raise changed(file.path)
                done += got
        except SourceError:
            raise
        except OSError as error:
            raise read_error(file.path, error) from error

    def _encode_new(self, batch: _Batch) -> None:
        """Encode the chunks that nobody has seen before. In a thread."""
        for number in batch.new:
            batch.encoded[number] = encode(batch.data[number], self._codec)
        batch.data = []


def _batches(chunks: Iterator[tuple[ChunkPlan, bool]]) -> Iterator[_Batch]:
    held: list[tuple[ChunkPlan, bool]] = []
    size = 0
    for item in chunks:
        held.append(item)
        size += item[0].length
        if size >= BATCH_BYTES or len(held) >= _BATCH_CHUNKS:
            yield _Batch(held)
            held, size = [], 0
    if held:
        yield _Batch(held)
