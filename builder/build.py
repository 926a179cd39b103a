"""Building an image, end to end: scan, plan, stream blobs, write chunk map and bootstrap, publish.

Decided here: the order of publication (blobs, chunk map, bootstrap, config, manifest, and the tag last, so nothing half-pushed is
ever visible) and what the figures of a build mean. docs/builder.md.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import trio
import zstandard

from rafsfs import __version__
from rafsfs.errors import RafsError, UsageError
from rafsfs.format.bootstrap_writer import SpaceSpec, write_bootstrap
from rafsfs.format.chunk_map import MAX_SPACES, ChunkMap
from rafsfs.format.chunk_map_builder import ChunkMapBuilder
from rafsfs.format.codec import CODEC_XOR, POLICIES
from rafsfs.format.manifest import (
    FEATURE_DELTA,
    FROM,
    MAX_BOOTSTRAP,
    MEDIA_TYPE_BLOB,
    MEDIA_TYPE_BOOTSTRAP,
    MEDIA_TYPE_CHUNK_MAP,
    MEDIA_TYPE_CONFIG,
    MEDIA_TYPE_MANIFEST,
    UNCOMPRESSED_SIZE,
    XATTRS,
    ImageConfig,
    encode_manifest,
)
from rafsfs.format.space_table import MAX_CHUNK
from rafsfs.interfaces import ImageStore
from rafsfs.patterns import Patterns
from rafsfs.types import Descriptor, Digest

from .base_image import BaseImage
from .blob_writer import BlobWriter
from .cutting import CHUNKINGS, FileCutter
from .dictionary import ChunkDictionary
from .identical import find_identical
from .journal import Journal
from .layout import SpacePlan, chunks_of_space, interleave, plan_layout
from .pipeline import ChunkPipeline, Totals
from .reuse import DICTIONARY, Earlier, Reuse
from .scan import Scan, scan

OPEN_SPACES: Final = 4
"""Data spaces filled in turn, so that as many blobs upload at once. A constant: blobs depend on it."""
_MIN_CHUNK: Final = 64 << 10

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to build. All but `threads` decide the digests."""

    chunking: str = "auto"
    """How files are cut: one of CHUNKINGS."""
    chunk_size: int = 1 << 20
    """Bytes, a power of two, 64 KiB to 16 MiB."""
    codec: str = "auto"
    exclude: tuple[str, ...] = ()
    space_bound: int = 4 << 30
    """Bytes of a data space at most, a power of two: bounds a layer, and what a broken upload costs."""
    threads: int | None = None
    """Worker threads; None: one per core."""

    def check(self) -> None:
        """Raise UsageError for options out of range."""
        if self.chunking not in CHUNKINGS:
            raise UsageError(f"chunking {self.chunking!r} is unknown, expected one of {', '.join(CHUNKINGS)}")
        if self.codec not in POLICIES:
            raise UsageError(f"codec {self.codec!r} is unknown, expected one of {', '.join(POLICIES)}")
        if self.chunk_size & (self.chunk_size - 1) or not _MIN_CHUNK <= self.chunk_size <= MAX_CHUNK:
            raise UsageError(f"chunk size {self.chunk_size} is not a power of two from 64 KiB to 16 MiB")
        if self.space_bound & (self.space_bound - 1) or not self.chunk_size <= self.space_bound <= 1 << 40:
            raise UsageError(f"data space bound {self.space_bound} is not a power of two from the chunk size to 1 TiB")
        if self.threads is not None and not 1 <= self.threads <= 256:
            raise UsageError(f"{self.threads} threads, expected 1 to 256")


@dataclass(frozen=True, slots=True)
class BuildResult:
    """The figures of a build, as `rafs build --json` prints them."""

    ref: str
    digest: str
    files: int
    """Regular files, each inode once."""
    input_bytes: int
    """Sum of their sizes."""
    data_bytes: int
    """Bytes in data spaces: what is left after small files went into the bootstrap, holes and identical files away."""
    stored_bytes: int
    """Bytes of the blobs that this build made."""
    new_chunks: int
    """Chunks stored."""
    reused_chunks: int
    """Chunks whose bytes were stored already, in this image or an earlier one."""
    reused_bytes: int
    """Their bytes before encoding."""
    reused_from: dict[str, int]
    """Of these, bytes found in earlier images, by the name of the image."""
    delta_chunks: int
    """Of the new ones, those stored as differences to the base."""
    delta_bytes: int
    """Their bytes before encoding."""
    delta_stored_bytes: int
    """Their stored bytes."""
    alone_bytes: int
    """What they would have taken without the base."""
    base_bytes: int
    """Stored bytes of the bases that a node needs besides this image, if it has none of them."""
    cut_bytes: dict[str, int]
    """Bytes of files by the way they were cut."""
    seconds: float
    sent_bytes: int
    """Bytes of blobs that went to the store in this run: less than stored_bytes when it had some already."""


async def build_image(
    source: str | bytes,
    store: ImageStore,
    tag: str | None,
    options: BuildOptions,
    *,
    progress: Progress | None = None,
    journal: Journal | None = None,
    earlier: Earlier | None = None,
    base: BaseImage | None = None,
    ref_text: str = "",
) -> BuildResult:
    """Build `source` into `store`, under `tag` if given. `earlier`: what chunks are taken over from; `base`: what weights are stored as
    differences to where that pays. Raises SourceError, RemoteError, FormatError, UsageError.

    Cancelled or failed, nothing is visible under the tag; a registry keeps what was uploaded for the next run.
    """
    options.check()
    started = time.monotonic()
    # Both only read: a thread that is still at it when the build is cancelled is left behind.
    scanned = await trio.to_thread.run_sync(
        scan, source, Patterns(options.exclude), options.space_bound, abandon_on_cancel=True
    )
    copies = await trio.to_thread.run_sync(find_identical, scanned.files, abandon_on_cancel=True)
    # A note of the journal that turns out to be wrong costs a second pass, which starts without that note.
    for hints in (journal, journal, None):
        build = _Build(scanned, copies, store, options, hints, progress, earlier or Earlier(), base)
        try:
            result = await build.run(tag, ref_text, started)
        except BaseExceptionGroup as group:
            raise _first_error(group) from group
        if result is not None:
            return result
    raise AssertionError("the last pass has no notes, so none can be wrong")


class _Build:
    """One pass of one build."""

    def __init__(
        self,
        scanned: Scan,
        copies: dict[int, int],
        store: ImageStore,
        options: BuildOptions,
        journal: Journal | None,
        progress: Progress | None,
        earlier: Earlier,
        base: BaseImage | None,
    ) -> None:
        self._scan = scanned
        self._store = store
        self._options = options
        self._journal = journal
        self._progress = progress
        self._earlier = earlier
        self._base = base
        self._map = ChunkMapBuilder()
        self._threads = trio.CapacityLimiter(options.threads or os.cpu_count() or 1)
        self._reuse = Reuse(earlier, store, self._map)
        self._writers: dict[int, BlobWriter] = {}
        ranges = [file.ranges for file in scanned.files]
        self._spaces, self._extents = plan_layout(ranges, copies, options.space_bound)
        if len(self._spaces) > MAX_SPACES:
            raise UsageError(
                f"the source needs {len(self._spaces)} data spaces of {options.space_bound} bytes, expected at most "
                f"{MAX_SPACES}; choose larger ones with --space-size"
            )
        self._total = sum(piece.length for space in self._spaces for piece in space.pieces)
        self._done = 0

    async def run(self, tag: str | None, ref_text: str, started: float) -> BuildResult | None:
        """Stream the blobs, then publish. None, and nothing published, if the journal was wrong: it has been corrected."""
        for space in self._spaces:
            self._map.add_space(space.size)
        with FileCutter(self._scan, self._options.chunking, self._options.chunk_size) as cutter:
            await trio.to_thread.run_sync(cutter.prepare)
            totals = await self._stream(cutter)
        if any(writer.is_stale for writer in self._writers.values()):
            return None
        self._settle_blobs()
        digest, sizes = await self._publish(tag, totals.data_bytes)
        if self._earlier.dictionary is not None:
            await trio.to_thread.run_sync(self._note_chunks, self._earlier.dictionary)
        return BuildResult(
            ref=ref_text,
            digest=str(digest.digest),
            files=self._scan.file_count,
            input_bytes=self._scan.input_bytes,
            data_bytes=totals.data_bytes,
            stored_bytes=sizes,
            new_chunks=totals.new_chunks,
            reused_chunks=totals.reused_chunks,
            reused_bytes=totals.reused_bytes,
            reused_from=dict(self._reuse.bytes_by_source),
            delta_chunks=totals.delta_chunks,
            delta_bytes=totals.delta_bytes,
            delta_stored_bytes=totals.delta_stored_bytes,
            alone_bytes=totals.alone_bytes,
            base_bytes=self._reuse.base_bytes,
            cut_bytes=dict(cutter.kinds),
            seconds=round(time.monotonic() - started, 3),
            sent_bytes=sum(writer.sent_bytes for writer in self._writers.values()),
        )

    async def _stream(self, cutter: FileCutter) -> Totals:
        """Fill the blobs."""
        async with trio.open_nursery() as nursery:
            pipeline = ChunkPipeline(
                self._scan.files,
                self._map,
                lambda space: self._open_blob(space, nursery),
                self._reuse,
                base=self._base,
                paths=lambda number: self._scan.relative(self._scan.files[number]),
                chunk_size=self._options.chunk_size,
                codec=self._options.codec,
                limiter=self._threads,
                progress=self._report,
            )
            streams = [chunks_of_space(number, space, cutter.cutter) for number, space in enumerate(self._spaces)]
            await pipeline.run(interleave(streams, OPEN_SPACES))
        return pipeline.totals

    def _open_blob(self, space: int, nursery: trio.Nursery) -> tuple[int, BlobWriter]:
        index = self._map.reserve_blob()
        key = _journal_key(self._scan, self._spaces[space], self._options, self._store.name) if self._journal else ""
        writer = BlobWriter(self._store, self._journal, key, self._threads)
        self._writers[index] = writer
        nursery.start_soon(writer.run)
        return index, writer

    def _settle_blobs(self) -> None:
        """Enter the finished blobs in the chunk map."""
        for index, writer in sorted(self._writers.items()):
            assert writer.result is not None
            self._map.set_blob(index, writer.result.digest, writer.result.size)

    async def _publish(self, tag: str | None, data_bytes: int) -> tuple[Descriptor, int]:
        """Publish chunk map, bootstrap, config and manifest; return the image and the bytes of the blobs made for it."""
        chunk_map, bootstrap = await trio.to_thread.run_sync(self._metadata)
        if len(bootstrap) > MAX_BOOTSTRAP:
            raise UsageError(f"the bootstrap has {len(bootstrap)} bytes, at most {MAX_BOOTSTRAP}: split the image")
        stored = await trio.to_thread.run_sync(zstandard.ZstdCompressor(level=3).compress, bootstrap)
        own = {writer.result.digest: writer.result.size for writer in self._writers.values() if writer.result}
        blobs = [
            Descriptor(MEDIA_TYPE_BLOB, blob.digest, blob.size, {} if blob.digest in own else self._origin(blob.digest))
            for blob in self._map.blobs()
        ]
        config = ImageConfig(
            self._scan.file_count, data_bytes, sum(blob.size for blob in blobs), self._requires(chunk_map)
        ).encode()
        layers = (stored, chunk_map, config)
        manifest = self._unchanged([Digest.of(part) for part in layers])
        if manifest is None:
            bootstrap_digest, map_digest, config_digest = [await self._store.put_blob(part) for part in layers]
            manifest = encode_manifest(
                config=Descriptor(MEDIA_TYPE_CONFIG, config_digest, len(config)),
                bootstrap=Descriptor(
                    MEDIA_TYPE_BOOTSTRAP, bootstrap_digest, len(stored), {UNCOMPRESSED_SIZE: str(len(bootstrap))}
                ),
                chunk_map=Descriptor(MEDIA_TYPE_CHUNK_MAP, map_digest, len(chunk_map)),
                blobs=blobs,
                annotations={} if self._scan.has_xattrs else {XATTRS: "none"},
            )
        published = await self._store.put_manifest(manifest, MEDIA_TYPE_MANIFEST, tag=tag)
        return published, sum(own.values())

    def _requires(self, chunk_map: bytes) -> tuple[str, ...]:
        """Return the features that a reader must know."""
        return (FEATURE_DELTA,) if ChunkMap(chunk_map).delta_count else ()

    def _origin(self, blob: Digest) -> dict[str, str]:
        source = self._reuse.sources.get(blob, "")
        return {FROM: source} if source and source != DICTIONARY else {}

    def _unchanged(self, parts: list[Digest]) -> bytes | None:
        """Return the manifest of an earlier image of this repository that has the same parts: then there is nothing to store."""
        for earlier in self._earlier.images:
            manifest = earlier.image.manifest
            found = [manifest.bootstrap.digest, manifest.chunk_map.digest, manifest.config.digest]
            if found == parts and earlier.store.name == self._store.name:
                return earlier.image.manifest_bytes
        return None

    def _note_chunks(self, dictionary: ChunkDictionary) -> None:
        """Enter the chunks of the blobs made for this image in the dictionary of this machine."""
        chunk_map = ChunkMap(self._map.to_bytes())
        own = {writer.result.digest for writer in self._writers.values() if writer.result}
        for number, blob in enumerate(chunk_map.blobs):
            if blob.digest in own:
                dictionary.note_blob(blob.digest, blob.size, self._store.name, _chunks_in(chunk_map, number))

    def _metadata(self) -> tuple[bytes, bytes]:
        """Return chunk map and bootstrap. CPU only."""
        for file, extents in zip(self._scan.files, self._extents, strict=True):
            file.node.extents = extents
        specs = [SpaceSpec(self._map.space_id(number), space.size) for number, space in enumerate(self._spaces)]
        return self._map.to_bytes(), write_bootstrap(self._scan.root, specs)

    def _report(self, done: int) -> None:
        self._done += done
        if self._progress:
            self._progress(self._done, self._total)


def _chunks_in(chunk_map: ChunkMap, blob: int) -> Iterator[tuple[bytes, int, int, int, int]]:
    """Yield (digest, offset, stored size, codec, parameter) of the chunks in one blob that need no base."""
    storage = chunk_map.storage()
    for space in chunk_map.spaces:
        mine = storage[space.first : space.first + space.count]
        table = chunk_map.table(space.index)
        for index in np.flatnonzero((mine["blob"] == blob) & (mine["codec"] != CODEC_XOR)).tolist():
            record = mine[index]
            yield (
                table.digest(index),
                int(record["offset"]),
                int(record["size"]),
                int(record["codec"]),
                int(record["param"]),
            )


def _journal_key(scanned: Scan, space: SpacePlan, options: BuildOptions, store_name: str) -> str:
    """Return what names the blob of a data space before it is made: program version, repository, options, and the files as stat
    sees them. Other data spaces take part in the blob only by the chunks they have in common with this one, which the digest tells.
    """
    hasher = hashlib.sha256()
    hasher.update(repr((__version__, store_name, options.chunking, options.chunk_size, options.codec)).encode())
    hasher.update(repr((options.space_bound, OPEN_SPACES, space.size)).encode())
    for piece in space.pieces:
        place = (piece.file_offset, piece.offset, piece.length)
        hasher.update(repr((scanned.files[piece.file].signature, place)).encode())
    return hasher.hexdigest()


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error of ours that ended a build, or what else did."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        ours = found.subgroup(RafsError) or found.subgroup(KeyboardInterrupt)
        found = (ours or found).exceptions[0]
    return found
