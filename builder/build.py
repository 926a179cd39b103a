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

import trio
import zstandard

from rafsfs import __version__
from rafsfs.errors import RafsError, UsageError
from rafsfs.format.bootstrap_writer import SpaceSpec, write_bootstrap
from rafsfs.format.chunk_map import MAX_SPACES
from rafsfs.format.chunk_map_builder import ChunkMapBuilder
from rafsfs.format.codec import POLICIES
from rafsfs.format.manifest import (
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
from rafsfs.types import Descriptor, Digest

from .blob_writer import BlobWriter
from .exclude import Exclude
from .identical import find_identical
from .journal import Journal
from .layout import ChunkPlan, SpacePlan, chunks_of_space, interleave, plan_layout
from .pipeline import ChunkPipeline
from .scan import Scan, scan

OPEN_SPACES: Final = 4
"""Data spaces filled in turn, so that as many blobs upload at once. A constant: blobs depend on it."""
_MIN_CHUNK: Final = 64 << 10

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to build. All but `threads` decide the digests."""

    chunking: str = "fixed"
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
        if self.chunking != "fixed":
            raise UsageError(f"chunking {self.chunking!r} is not in this version, expected fixed")
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
    """Bytes of this image's blobs."""
    new_chunks: int
    """Chunks stored."""
    reused_chunks: int
    """Chunks whose bytes were stored already."""
    reused_bytes: int
    """Their bytes before encoding."""
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
    ref_text: str = "",
) -> BuildResult:
    """Build `source` into `store`, under `tag` if given. Raises SourceError, RemoteError, FormatError, UsageError.

    Cancelled or failed, nothing is visible under the tag; a registry keeps what was uploaded for the next run.
    """
    options.check()
    started = time.monotonic()
    # Both only read: a thread that is still at it when the build is cancelled is left behind.
    scanned = await trio.to_thread.run_sync(
        scan, source, Exclude(options.exclude), options.space_bound, abandon_on_cancel=True
    )
    copies = await trio.to_thread.run_sync(find_identical, scanned.files, abandon_on_cancel=True)
    # A note of the journal that turns out to be wrong costs a second pass, which starts without that note.
    for hints in (journal, journal, None):
        build = _Build(scanned, copies, store, options, hints, progress)
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
    ) -> None:
        self._scan = scanned
        self._store = store
        self._options = options
        self._journal = journal
        self._progress = progress
        self._map = ChunkMapBuilder()
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
        async with trio.open_nursery() as nursery:
            pipeline = ChunkPipeline(
                self._scan.files,
                self._map,
                lambda space: self._open_blob(space, nursery),
                chunk_size=self._options.chunk_size,
                codec=self._options.codec,
                threads=self._options.threads or os.cpu_count() or 1,
                progress=self._report,
            )
            streams = [self._chunks(number, space) for number, space in enumerate(self._spaces)]
            await pipeline.run(interleave(streams, OPEN_SPACES))
        if any(writer.is_stale for writer in self._writers.values()):
            return None
        blobs = self._settle_blobs()
        digest = await self._publish(tag, blobs, pipeline.totals.data_bytes)
        totals = pipeline.totals
        return BuildResult(
            ref=ref_text,
            digest=str(digest.digest),
            files=self._scan.file_count,
            input_bytes=self._scan.input_bytes,
            data_bytes=totals.data_bytes,
            stored_bytes=sum(blob.size for blob in blobs),
            new_chunks=totals.new_chunks,
            reused_chunks=totals.reused_chunks,
            reused_bytes=totals.reused_bytes,
            seconds=round(time.monotonic() - started, 3),
            sent_bytes=sum(writer.sent_bytes for writer in self._writers.values()),
        )

    def _chunks(self, number: int, space: SpacePlan) -> Iterator[ChunkPlan]:
        return chunks_of_space(number, space, self._options.chunk_size)

    def _open_blob(self, space: int, nursery: trio.Nursery) -> tuple[int, BlobWriter]:
        index = self._map.reserve_blob()
        key = _journal_key(self._scan, self._spaces[space], self._options, self._store.name) if self._journal else ""
        writer = BlobWriter(self._store, self._journal, key)
        self._writers[index] = writer
        nursery.start_soon(writer.run)
        return index, writer

    def _settle_blobs(self) -> list[Descriptor]:
        """Enter the finished blobs in the chunk map; return them in the order in which it lists them, each once."""
        found: dict[Digest, Descriptor] = {}
        for index, writer in sorted(self._writers.items()):
            assert writer.result is not None
            self._map.set_blob(index, writer.result.digest, writer.result.size)
            found[writer.result.digest] = Descriptor(MEDIA_TYPE_BLOB, writer.result.digest, writer.result.size)
        return list(found.values())

    async def _publish(self, tag: str | None, blobs: list[Descriptor], data_bytes: int) -> Descriptor:
        chunk_map, bootstrap = await trio.to_thread.run_sync(self._metadata)
        if len(bootstrap) > MAX_BOOTSTRAP:
            raise UsageError(f"the bootstrap has {len(bootstrap)} bytes, at most {MAX_BOOTSTRAP}: split the image")
        stored = await trio.to_thread.run_sync(zstandard.ZstdCompressor(level=3).compress, bootstrap)
        config = ImageConfig(self._scan.file_count, data_bytes, sum(blob.size for blob in blobs)).encode()
        bootstrap_digest = await self._store.put_blob(stored)
        map_digest = await self._store.put_blob(chunk_map)
        config_digest = await self._store.put_blob(config)
        manifest = encode_manifest(
            config=Descriptor(MEDIA_TYPE_CONFIG, config_digest, len(config)),
            bootstrap=Descriptor(
                MEDIA_TYPE_BOOTSTRAP, bootstrap_digest, len(stored), {UNCOMPRESSED_SIZE: str(len(bootstrap))}
            ),
            chunk_map=Descriptor(MEDIA_TYPE_CHUNK_MAP, map_digest, len(chunk_map)),
            blobs=blobs,
            annotations={} if self._scan.has_xattrs else {XATTRS: "none"},
        )
        return await self._store.put_manifest(manifest, MEDIA_TYPE_MANIFEST, tag=tag)

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
