"""A whole image in memory, and reading its files without a mount.

Decided here: in which order the parts of an image are fetched and checked against each other. Rule: an Image exists only if
bootstrap, chunk map and manifest agree: digests, sizes, data spaces by their computed ids, blobs by their descriptors.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import trio
import zstandard

from .errors import FormatError, IntegrityError, UnavailableError
from .format.bootstrap import Bootstrap
from .format.chunk_index import Extent
from .format.chunk_map import ChunkMap, StoredChunk
from .format.codec import chunk_digest, codec_name, decode
from .format.manifest import MAX_CONFIG, ImageConfig, ImageManifest, parse_config, parse_manifest
from .interfaces import ImageStore
from .types import Digest

_MAX_CHUNK_MAP = 2 << 30
"""Largest chunk map taken into memory: 32 million chunks."""
_WINDOW_MAX = 1 << 27
"""Largest zstd window of a bootstrap, bytes: what level 19 uses; more is hostile."""
_ZERO = bytes(1 << 20)
_ATTEMPTS = 3


@dataclass(slots=True)
class Image:
    """An image whose metadata have been fetched, verified and cross-checked."""

    reference: str
    manifest: ImageManifest
    manifest_bytes: bytes
    config: ImageConfig
    bootstrap: Bootstrap
    bootstrap_bytes: bytes
    chunk_map: ChunkMap
    chunk_map_bytes: bytes


async def load_image(store: ImageStore, reference: str) -> Image:
    """Fetch and check the metadata of an image. Raises RemoteError, FormatError, UnsupportedError, IntegrityError."""
    _, manifest_bytes = await store.get_manifest(reference)
    manifest = parse_manifest(manifest_bytes)
    if manifest.config.size > MAX_CONFIG or manifest.chunk_map.size > _MAX_CHUNK_MAP:
        raise FormatError("the image's config or chunk map is larger than this program takes")
    config = parse_config(await store.get_blob(manifest.config.digest, size=manifest.config.size))
    parts: dict[str, bytes] = {}

    async def fetch(name: str, digest: Digest, size: int) -> None:
        parts[name] = await store.get_blob(digest, size=size)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch, "bootstrap", manifest.bootstrap.digest, manifest.bootstrap.size)
        nursery.start_soon(fetch, "chunk map", manifest.chunk_map.digest, manifest.chunk_map.size)
    return await trio.to_thread.run_sync(
        assemble_image, reference, manifest_bytes, manifest, config, parts["bootstrap"], parts["chunk map"]
    )


def assemble_image(
    reference: str,
    manifest_bytes: bytes,
    manifest: ImageManifest,
    config: ImageConfig,
    bootstrap_stored: bytes,
    chunk_map_bytes: bytes,
) -> Image:
    """Check the parts of an image against each other and put them together. Blocking, CPU only."""
    bootstrap_bytes = decompress_bootstrap(bootstrap_stored, manifest.bootstrap_size)
    bootstrap = Bootstrap(bootstrap_bytes)
    chunk_map = ChunkMap(chunk_map_bytes)
    chunk_map.validate()
    check_agreement(manifest, bootstrap, chunk_map)
    return Image(reference, manifest, manifest_bytes, config, bootstrap, bootstrap_bytes, chunk_map, chunk_map_bytes)


def decompress_bootstrap(stored: bytes, size: int) -> bytes:
    """Return the bootstrap, exactly `size` bytes. Raises FormatError."""
    out = bytearray(size)
    view = memoryview(out)
    done = 0
    try:
        with zstandard.ZstdDecompressor(max_window_size=_WINDOW_MAX).stream_reader(stored) as reader:
            while done < len(out):
                got = reader.readinto(view[done:])
                if not got:
                    break
                done += got
            if done != len(out) or reader.read(1):
                raise FormatError(f"bootstrap is not the {len(out)} bytes that the manifest says")
    except zstandard.ZstdError as error:
        raise FormatError(f"bootstrap is not a zstd frame: {error}") from error
    return bytes(out)


def check_agreement(manifest: ImageManifest, bootstrap: Bootstrap, chunk_map: ChunkMap) -> None:
    """Raise FormatError unless bootstrap, chunk map and manifest describe the same image."""
    if len(bootstrap.spaces) != len(chunk_map.spaces):
        raise FormatError(f"bootstrap names {len(bootstrap.spaces)} data spaces, the chunk map {len(chunk_map.spaces)}")
    for slot, space in zip(bootstrap.spaces, chunk_map.spaces, strict=True):
        found = chunk_map.table(space.index).space_id.hex().encode()
        if slot.tag != found or slot.blocks * 4096 != space.size:
            raise FormatError(f"data space {space.index} of the chunk map is not the one that the bootstrap names")
    listed = {blob.digest: blob.size for blob in manifest.blobs}
    for blob in chunk_map.blobs:
        if listed.get(blob.digest) != blob.size:
            raise FormatError(
                f"chunk map uses blob {blob.digest} of {blob.size} bytes, which the manifest does not list"
            )


class ImageReader:
    """Reads files of an image straight from its store, every chunk verified.

    Memory per read: a chunk, with the chunks that it is a difference to.
    """

    def __init__(self, store: ImageStore, image: Image) -> None:
        self._store = store
        self._image = image

    async def read_chunk(self, space: int, index: int) -> bytes:
        """Return one chunk, verified. Raises IntegrityError, FormatError or RemoteError naming chunk and blob."""
        stored = self._image.chunk_map.stored(space, index)
        blob = self._image.chunk_map.blobs[stored.blob]
        buffer = bytearray(stored.stored_size)
        for attempt in range(_ATTEMPTS):
            try:
                async with self._store.open_range(blob.digest, stored.offset, stored.stored_size) as stream:
                    await stream.readinto(memoryview(buffer))
                break
            except UnavailableError:
                if attempt + 1 == _ATTEMPTS:
                    raise
        base = None if stored.base is None else await self.read_chunk(*stored.base)
        try:
            return await trio.to_thread.run_sync(decode_chunk, stored, buffer, base)
        except (FormatError, IntegrityError) as error:
            raise type(error)(f"chunk {index} of data space {space} in blob {blob.digest}: {error}") from error

    async def read_range(self, nid: int, offset: int, length: int) -> bytes:
        """Return bytes [offset, offset+length) of a regular file, fewer at its end."""
        inline = self._image.bootstrap.inline_data(nid)
        if inline is not None:
            return bytes(inline[offset : offset + length])
        out = bytearray()
        stop = offset + length
        for extent in self._image.bootstrap.extents(nid):
            first, last = max(offset, extent.file_offset), min(stop, extent.file_offset + extent.length)
            if first >= last:
                continue
            if extent.space is None:
                out += bytes(last - first)
                continue
            part = Extent(first, last - first, extent.space, extent.offset + first - extent.file_offset)
            async for data in self._read_extent(part, extent.space):
                out += data
        return bytes(out)

    async def read_file(self, nid: int) -> AsyncIterator[bytes | memoryview]:
        """Yield the content of a regular file in order, in pieces of at most a chunk. Holes come as zeros."""
        inline = self._image.bootstrap.inline_data(nid)
        if inline is not None:
            yield inline
            return
        for extent in self._image.bootstrap.extents(nid):
            if extent.space is None:
                left = extent.length
                while left:
                    piece = _ZERO[: min(left, len(_ZERO))]
                    yield piece
                    left -= len(piece)
                    await trio.lowlevel.checkpoint()
            else:
                async for part in self._read_extent(extent, extent.space):
                    yield part

    async def _read_extent(self, extent: Extent, space: int) -> AsyncIterator[memoryview]:
        table = self._image.chunk_map.table(space)
        position, end = extent.offset, extent.offset + extent.length
        for index in table.covering(extent.offset, extent.length):
            start, length = table.extent(index)
            if start > position:
                raise FormatError(f"no chunk holds byte {position} of data space {space}")
            data = await self.read_chunk(space, index)
            yield memoryview(data)[position - start : min(length, end - start)]
            position = min(start + length, end)
        if position != end:
            raise FormatError(f"no chunk holds byte {position} of data space {space}")


def decode_chunk(stored: StoredChunk, buffer: bytes | bytearray, base: bytes | None = None) -> bytes:
    """Decode stored bytes, against the bytes of the base if there is one, and check the digest of what comes out. Blocking, CPU only."""
    out = bytearray(stored.length)
    held = None if base is None else memoryview(base)
    decode(stored.codec, stored.param, memoryview(buffer), memoryview(out), held)
    if chunk_digest(out) != stored.digest:
        raise IntegrityError(f"{stored.length} bytes ({codec_name(stored.codec)}) do not match their digest")
    return bytes(out)
