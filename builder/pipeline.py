"""From planned chunks to blobs: read, hash, look up, encode, append; several threads, one order.

Decided here: batches, bounds, and that the commit order is the planned order. A batch goes to a thread that takes one chunk after the
other: read, hash, and encode it at once, while it is in the processor's cache, if nothing that this build or an earlier one has can be the
same. Then, in order, one task looks digests up, which alone decides what is new; what it finds new and not encoded yet goes to a thread
again. So the result depends neither on thread count nor on timing; two equal chunks on their way at once cost one encoding in vain.

Memory: 2 × threads + 1 slabs of 16 MiB and one chunk, used again and again (fresh pages cost more than the reading), each twice: as
read, as encoded; with a base image as much again for its chunks; plus 60 bytes per distinct chunk in the table of known
ones. Nothing grows with the size of a file.

Concurrency: three tasks in one nursery, joined by channels in order: `_read` takes a slab and starts a batch, `_look_up` decides and
starts encoding what is left, `_append` hands over to the blob writers. The threads that read and encode ask `KnownChunks` (which has
a lock) and `Reuse.may_have`, and change nothing but their batch. All that computes, the SHA-256 of blobs too, shares one limiter: more
threads than cores at work wait for the interpreter's lock more often than they gain. At most one batch more than there are threads
waits to be read, so that what is further on its way is not kept waiting behind it. A slab is free again when every writer has copied
what it was given; batches are handed over in the order in which they took their slabs, so taking one cannot wait for ever. A failure
cancels the others; nothing has been named in the store by then.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

import trio

from rafsfs.format.chunk_map_builder import ChunkMapBuilder
from rafsfs.format.codec import CODEC_XOR, Encoded, chunk_digest, encode, encode_delta
from rafsfs.format.planes import EXTRA_ROOM

from .base_image import BaseImage
from .blob_writer import BlobWriter, Parts
from .known import KnownChunks, Place
from .layout import ChunkPlan
from .reuse import Reuse
from .source_file import OpenFiles, SourceFile

BATCH_BYTES: Final = 16 << 20
"""Bytes per hop to a thread: a batch takes five hops, each up to 0.25 ms under load and a turn of the event loop, which the threads wait
for too; hashing and encoding 16 MiB takes about 30 ms."""
_PLANNED: Final = 4
"""Batches planned in one hop."""
_BATCH_CHUNKS: Final = 512
_BASE_READS: Final = 8
"""Chunks of the base image fetched at once."""


@dataclass(slots=True, eq=False)
class _Batch:
    """Chunks that travel together."""

    chunks: list[tuple[ChunkPlan, bool]]
    slab: _Slab | None = None
    data: list[memoryview] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    known: list[int] = field(default_factory=list)
    """Of each chunk, its number among the known ones."""
    new: list[int] = field(default_factory=list)
    """Chunks to be stored that are not encoded yet."""
    encoded: dict[int, Encoded] = field(default_factory=dict)
    alone: dict[int, int] = field(default_factory=dict)
    """Of each chunk that has a base, what it takes alone."""
    bases: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Of each chunk that may be stored as a difference, where its base is in the base image."""
    base_data: dict[int, bytes] = field(default_factory=dict)
    holders: int = 0
    """Blob writers that have not copied their parts yet."""
    hashed: trio.Event = field(default_factory=trio.Event)
    ready: trio.Event = field(default_factory=trio.Event)

    def room(self, position: int) -> memoryview:
        """Return the room for what chunk `position` becomes; only once it has been read."""
        assert self.slab is not None
        start = sum(map(len, self.data[:position])) + position * EXTRA_ROOM
        return self.slab.encoded[start : start + len(self.data[position]) + EXTRA_ROOM]


@dataclass(slots=True)
class Totals:
    """What came of the chunks."""

    new_chunks: int = 0
    reused_chunks: int = 0
    reused_bytes: int = 0
    data_bytes: int = 0
    delta_chunks: int = 0
    """Of the new ones, those stored as differences."""
    delta_bytes: int = 0
    """Their bytes before encoding."""
    delta_stored_bytes: int = 0
    alone_bytes: int = 0
    """What they would have taken alone."""


class _Slab:
    """Room for one batch as it is read, and for what it becomes."""

    def __init__(self, size: int) -> None:
        self.read = memoryview(_anonymous(size))
        self.encoded = memoryview(_anonymous(size + _BATCH_CHUNKS * EXTRA_ROOM))


def _anonymous(size: int) -> mmap.mmap:
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


class _Slabs:
    """A fixed number of buffers of one size. Anonymous maps: pages come when a thread first reads into them, large ones if the system has
    them, where a bytearray would be filled with zeros while all other threads wait.
    """

    def __init__(self, count: int, size: int) -> None:
        self._size = size
        self._free: list[_Slab] = []
        self._permits = trio.Semaphore(count)

    async def take(self) -> _Slab:
        """Return a free slab; waits for one."""
        await self._permits.acquire()
        return self._free.pop() if self._free else _Slab(self._size)

    def give(self, slab: _Slab) -> None:
        """Take a slab back."""
        self._free.append(slab)
        self._permits.release()


class ChunkPipeline:
    """Runs the chunks of one build."""

    def __init__(
        self,
        files: Sequence[SourceFile],
        chunk_map: ChunkMapBuilder,
        open_blob: Callable[[int], tuple[int, BlobWriter]],
        reuse: Reuse,
        *,
        base: BaseImage | None,
        paths: Callable[[int], str],
        chunk_size: int,
        codec: str,
        limiter: trio.CapacityLimiter,
        progress: Callable[[int], None],
    ) -> None:
        self._files = files
        self._chunk_map = chunk_map
        self._open_blob = open_blob
        self._reuse = reuse
        self._base = base
        self._paths = paths
        self._codec = codec
        self._limiter = limiter
        threads = int(limiter.total_tokens)
        self._depth = 2 * threads + 1
        self._slabs = _Slabs(self._depth, BATCH_BYTES + chunk_size)
        self._progress = progress
        self._to_read = trio.Semaphore(threads + 1)
        self._base_reads = trio.Semaphore(_BASE_READS)
        self._blobs: dict[int, tuple[int, BlobWriter]] = {}
        self._known = KnownChunks()
        self.totals = Totals()

    async def run(self, chunks: Iterator[tuple[ChunkPlan, bool]]) -> None:
        """Process all chunks. Raises SourceError, RemoteError."""
        # As deep as there are slabs: those are what bounds the batches on their way.
        to_look_up, from_read = trio.open_memory_channel[_Batch](self._depth)
        to_append, from_look_up = trio.open_memory_channel[_Batch](self._depth)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read, chunks, to_look_up, nursery)
            nursery.start_soon(self._look_up, from_read, to_append, nursery)
            nursery.start_soon(self._append, from_look_up)

    async def _read(
        self, chunks: Iterator[tuple[ChunkPlan, bool]], onward: trio.MemorySendChannel[_Batch], nursery: trio.Nursery
    ) -> None:
        batches = _batches(chunks)
        async with onward:
            # Planning reads what is cut by content, and headers.
            while planned := await trio.to_thread.run_sync(lambda: list(islice(batches, _PLANNED))):
                for batch in planned:
                    batch.slab = await self._slabs.take()
                    await self._to_read.acquire()
                    await onward.send(batch)
                    nursery.start_soon(self._take_in, batch)

    async def _take_in(self, batch: _Batch) -> None:
        try:
            await trio.to_thread.run_sync(self._read_chunks, batch, limiter=self._limiter)
        finally:
            self._to_read.release()
        batch.hashed.set()

    async def _look_up(
        self, incoming: trio.MemoryReceiveChannel[_Batch], onward: trio.MemorySendChannel[_Batch], nursery: trio.Nursery
    ) -> None:
        async with onward:
            async for batch in incoming:
                await batch.hashed.wait()
                unseen = []
                for position, digest in enumerate(batch.digests):
                    number, is_new = self._known.add(digest)
                    batch.known.append(number)
                    if is_new and position not in batch.encoded:
                        unseen.append(position)
                    elif not is_new:
                        batch.encoded.pop(position, None)
                await self._take_over(batch, unseen)
                await onward.send(batch)
                nursery.start_soon(self._encode, batch)

    async def _take_over(self, batch: _Batch, unseen: list[int]) -> None:
        """Sort the chunks that are new to this build into those that earlier images have and those that must be stored."""
        digests = [batch.digests[position] for position in unseen]
        lengths = [batch.chunks[position][0].length for position in unseen]
        places = await self._reuse.find(digests, lengths)
        for position, place in zip(unseen, places, strict=True):
            if place is not None:
                self._known.set_place(batch.known[position], place)
                continue
            batch.new.append(position)
            chunk = batch.chunks[position][0]
            if self._base is not None and chunk.tensor is not None:
                offset = chunk.file_offset - chunk.tensor.offset
                home = self._base.find(self._paths(chunk.file), chunk.tensor, offset, chunk.length)
                if home is not None and await self._reuse.can_take(self._base.earlier, home):
                    batch.bases[position] = home

    async def _encode(self, batch: _Batch) -> None:
        if batch.bases:
            async with trio.open_nursery() as nursery:
                for position, place in batch.bases.items():
                    nursery.start_soon(self._read_base, batch, position, place)
        if batch.new:
            await trio.to_thread.run_sync(self._encode_new, batch, limiter=self._limiter)
        batch.ready.set()

    async def _read_base(self, batch: _Batch, position: int, place: tuple[int, int]) -> None:
        assert self._base is not None
        async with self._base_reads:
            batch.base_data[position] = await self._base.read(place)

    async def _append(self, incoming: trio.MemoryReceiveChannel[_Batch]) -> None:
        async for batch in incoming:
            await batch.ready.wait()
            parts: dict[int, Parts] = {}
            for position, (chunk, _) in enumerate(batch.chunks):
                place = self._place(batch, position, chunk, parts)
                self._chunk_map.add_chunk(
                    chunk.space,
                    chunk.offset,
                    chunk.length,
                    batch.digests[position],
                    place.blob,
                    place.offset,
                    place.stored_size,
                    place.codec,
                    place.param,
                    place.base,
                )
            await self._hand_over(batch, parts)
            for chunk, last in batch.chunks:
                if last and chunk.space in self._blobs:
                    await self._blobs.pop(chunk.space)[1].finish()
            self._progress(sum(chunk.length for chunk, _ in batch.chunks))

    def _place(self, batch: _Batch, position: int, chunk: ChunkPlan, parts: dict[int, Parts]) -> Place:
        """Return where a chunk is stored, giving it its place if it is new."""
        totals = self.totals
        totals.data_bytes += chunk.length
        encoded = batch.encoded.get(position)
        if encoded is None:
            totals.reused_chunks += 1
            totals.reused_bytes += chunk.length
            return self._known.place(batch.known[position])
        if chunk.space not in self._blobs:
            self._blobs[chunk.space] = self._open_blob(chunk.space)
        blob, writer = self._blobs[chunk.space]
        size = len(encoded.data)
        base = None
        if encoded.codec == CODEC_XOR:
            assert self._base is not None
            base = self._reuse.take_base(self._base.earlier, batch.bases[position])
            totals.delta_chunks += 1
            totals.delta_bytes += chunk.length
            totals.delta_stored_bytes += size
            totals.alone_bytes += batch.alone[position]
        place = Place(blob, writer.reserve(size), size, encoded.codec, encoded.param, base)
        self._known.set_place(batch.known[position], place)
        parts.setdefault(chunk.space, []).append(encoded.data)
        totals.new_chunks += 1
        return place

    async def _hand_over(self, batch: _Batch, parts: dict[int, Parts]) -> None:
        """Give each blob writer its parts; the slab goes back when the last of them has copied."""
        slab = batch.slab
        assert slab is not None
        batch.encoded = {}
        batch.holders = len(parts)
        if not parts:
            self._slabs.give(slab)

        def taken() -> None:
            batch.holders -= 1
            if not batch.holders:
                self._slabs.give(slab)

        for space, data in parts.items():
            await self._blobs[space][1].put(data, taken)

    def _read_chunks(self, batch: _Batch) -> None:
        """Read the chunks of a batch, hash them, and encode those that are certainly not stored anywhere. In a thread."""
        assert batch.slab is not None
        view = batch.slab.read
        mine: set[bytes] = set()
        with OpenFiles(self._files) as opened:
            for position, (chunk, _) in enumerate(batch.chunks):
                data, view = view[: chunk.length], view[chunk.length :]
                opened.read_into(chunk.file, data, chunk.file_offset)
                digest = chunk_digest(data)
                batch.data.append(data)
                batch.digests.append(digest)
                is_left = (
                    (self._base is not None and chunk.tensor is not None)
                    or digest in mine
                    or digest in self._known
                    or self._reuse.may_have(digest)
                )
                if not is_left:
                    mine.add(digest)
                    batch.encoded[position] = encode(data, self._codec, chunk.width, batch.room(position))

    def _encode_new(self, batch: _Batch) -> None:
        """Encode the chunks that turned out to be new. In a thread."""
        for position in batch.new:
            data, width = batch.data[position], batch.chunks[position][0].width
            encoded = encode(data, self._codec, width, batch.room(position))
            base = batch.base_data.pop(position, None)
            if base is not None:
                batch.alone[position] = len(encoded.data)
                encoded = encode_delta(data, memoryview(base), width, encoded)
            batch.encoded[position] = encoded


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
