"""Chunk map: for every chunk of an image's data spaces, what it hashes to and where its stored bytes are.

Decided here: the byte layout (header, space table, blob table, content records, storage records), its limits and how
unknown versions and features are refused. Not here: what a codec does with the stored bytes (codec.py).
Rule: opening looks at header and the two small tables only; chunks are read from the raw bytes when asked for.
Specification: docs/format/chunk-map.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from ..errors import FormatError, UnsupportedError
from ..types import Digest
from . import codec as codecs
from .space_table import MAX_CHUNK, MAX_SPACE, RECORD_SIZE, SpaceTable, pack_record

MAGIC: Final = b"RAFSCMAP"
VERSION: Final = 1
HEADER_SIZE: Final = 128
MAX_SPACES: Final = 65535
"""EROFS counts extra devices in 16 bits."""
MAX_BLOBS: Final = 65535
MAX_CHUNKS: Final = 1 << 28
"""268 M chunks: 1 PiB at 4 MiB, a 16 GiB map."""

_HEADER = struct.Struct("<8sHHIIIIIQQQQQQ48x")
_SPACE = struct.Struct("<QQQ8x")
_BLOB = struct.Struct("<32sQ8x")
_STORAGE = struct.Struct("<QIHBB")
STORAGE_SIZE: Final = _STORAGE.size
assert _HEADER.size == HEADER_SIZE
assert _SPACE.size == 32
assert _BLOB.size == 48
assert STORAGE_SIZE == 16


@dataclass(frozen=True, slots=True)
class SpaceInfo:
    """One data space of an image: its place in the map."""

    index: int
    size: int
    """Bytes, a multiple of 4096."""
    first: int
    """Number of its first chunk, counted over all spaces of the map."""
    count: int


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """One blob that chunks are stored in; it may belong to an earlier image."""

    digest: Digest
    size: int


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """Where one chunk's stored bytes are, how they are encoded and what must come out."""

    blob: int
    offset: int
    stored_size: int
    codec: int
    param: int
    length: int
    digest: bytes


class ChunkMap:
    """A view over a chunk map; copies nothing. Raises FormatError or UnsupportedError for bytes that are not one."""

    def __init__(self, buffer: bytes | bytearray | memoryview) -> None:
        view = memoryview(buffer).cast("B")
        if view.nbytes < HEADER_SIZE:
            raise FormatError(f"chunk map is {view.nbytes} bytes, expected at least {HEADER_SIZE}")
        (
            magic,
            version,
            header_size,
            _compat,
            incompat,
            space_count,
            blob_count,
            reserved,
            chunk_count,
            total,
            space_start,
            blob_start,
            content_start,
            storage_start,
        ) = _HEADER.unpack_from(view)
        if magic != MAGIC:
            raise FormatError(f"chunk map begins with {magic!r}, expected {MAGIC!r}")
        if version != VERSION:
            raise UnsupportedError(f"chunk map has version {version}, this program reads {VERSION}; upgrade rafs")
        if incompat:
            raise UnsupportedError(f"chunk map needs features {incompat:#x} unknown to this program; upgrade rafs")
        if space_count > MAX_SPACES or blob_count > MAX_BLOBS or chunk_count > MAX_CHUNKS:
            raise FormatError(
                f"chunk map counts {space_count} spaces, {blob_count} blobs, {chunk_count} chunks: over the limits"
            )
        blobs_at = HEADER_SIZE + 32 * space_count
        content_at = blobs_at + 48 * blob_count
        storage_at = content_at + RECORD_SIZE * chunk_count
        end = storage_at + STORAGE_SIZE * chunk_count
        expected = (HEADER_SIZE, blobs_at, content_at, storage_at)
        found = (space_start, blob_start, content_start, storage_start)
        if header_size != HEADER_SIZE or reserved or found != expected or total != end:
            raise FormatError("chunk map has tables that are not where its counts put them")
        if view.nbytes != total:
            raise FormatError(f"chunk map is {view.nbytes} bytes, expected {total}")
        self._view = view
        self._content: int = content_start
        self._storage: int = storage_start
        self.chunk_count: int = chunk_count
        self.spaces = self._read_spaces(space_start, space_count)
        self.blobs = self._read_blobs(blob_start, blob_count)

    @property
    def buffer(self) -> memoryview:
        """The raw bytes of the map."""
        return self._view

    @property
    def data_bytes(self) -> int:
        """Sum of the lengths of all chunks."""
        import numpy as np  # noqa: PLC0415 - tools and daemon only

        if not self.chunk_count:
            return 0
        content = np.frombuffer(
            self._view[self._content : self._storage], dtype="<u4"
        )  # 12 words a record, the length is word 10
        return int(content[10::12].sum(dtype=np.uint64))

    def table(self, space: int) -> SpaceTable:
        """Return the content table of data space `space`, a view."""
        info = self._space(space)
        start = self._content + info.first * RECORD_SIZE
        return SpaceTable(self._view[start : start + info.count * RECORD_SIZE], info.size)

    def stored(self, space: int, index: int) -> StoredChunk:
        """Return where chunk `index` of data space `space` is stored, checked against its blob."""
        info = self._space(space)
        if not 0 <= index < info.count:
            raise FormatError(f"chunk {index} of data space {space}, which has {info.count} chunks")
        number = info.first + index
        record = self._content + number * RECORD_SIZE
        length = int.from_bytes(self._view[record + 40 : record + 44], "little")
        offset, stored_size, blob, codec, param = _STORAGE.unpack_from(
            self._view, self._storage + number * STORAGE_SIZE
        )
        if (
            blob >= len(self.blobs)
            or not 0 < stored_size <= length <= MAX_CHUNK
            or offset + stored_size > self.blobs[blob].size
            or (codec == codecs.CODEC_RAW and stored_size != length)
        ):
            raise FormatError(
                f"chunk {index} of data space {space} is stored as {stored_size} bytes at {offset} "
                f"of blob number {blob}: out of bounds"
            )
        digest = bytes(self._view[record : record + 32])
        return StoredChunk(blob, offset, stored_size, codec, param, length, digest)

    def validate(self) -> None:
        """Check every record of every table. Raises FormatError or UnsupportedError naming the first bad one."""
        import numpy as np  # noqa: PLC0415 - tools and daemon only

        for space in self.spaces:
            self.table(space.index).validate()
        if not self.chunk_count:
            return
        storage = np.frombuffer(
            self._view[self._storage :],
            dtype=[
                ("offset", "<u8"),
                ("size", "<u4"),
                ("blob", "<u2"),
                ("codec", "u1"),
                ("param", "u1"),
            ],
        )
        lengths = np.frombuffer(self._view[self._content : self._storage], dtype="<u4")[10::12]
        known = np.isin(storage["codec"], np.array(codecs.KNOWN_CODECS, dtype=np.uint8))
        if not known.all():
            number = int((~known).argmax())
            raise UnsupportedError(
                f"chunk number {number} uses codec {int(storage['codec'][number])} unknown to this program; upgrade rafs"
            )
        bad = storage["blob"] >= len(self.blobs)
        if not bad.any():
            sizes = np.array([blob.size for blob in self.blobs], dtype=np.uint64)
            bad = storage["offset"] > (1 << 62)
            bad |= storage["offset"] + storage["size"].astype(np.uint64) > sizes[storage["blob"]]
            bad |= (storage["size"] == 0) | (storage["size"] > lengths)
            bad |= (storage["codec"] == codecs.CODEC_RAW) & (storage["size"] != lengths)
        if bad.any():
            number = int(bad.argmax())
            raise FormatError(f"chunk number {number} is stored outside its blob or in a wrong size")

    def _space(self, space: int) -> SpaceInfo:
        if not 0 <= space < len(self.spaces):
            raise FormatError(f"data space {space} of an image with {len(self.spaces)}")
        return self.spaces[space]

    def _read_spaces(self, start: int, count: int) -> tuple[SpaceInfo, ...]:
        spaces = []
        following = 0
        for index, (size, first, chunks) in enumerate(_SPACE.iter_unpack(self._view[start : start + 32 * count])):
            if size > MAX_SPACE or size % 4096 or first != following:
                raise FormatError(f"data space {index} has size {size}, first chunk {first}")
            following = first + chunks
            spaces.append(SpaceInfo(index, size, first, chunks))
        if following != self.chunk_count:
            raise FormatError(f"data spaces hold {following} chunks, the map holds {self.chunk_count}")
        return tuple(spaces)

    def _read_blobs(self, start: int, count: int) -> tuple[BlobInfo, ...]:
        blobs = []
        for sha256, size in _BLOB.iter_unpack(self._view[start : start + 48 * count]):
            if size > 1 << 62:
                raise FormatError(f"blob of {size} bytes")
            blobs.append(BlobInfo(Digest("sha256:" + sha256.hex()), size))
        return tuple(blobs)


class ChunkMapBuilder:
    """Collects spaces, blobs and chunks, 64 bytes per chunk, and packs them into a map.

    A blob's digest is known only when its last chunk is written, so blobs are reserved first and set later; a
    reservation that no chunk uses is dropped. Chunks of one space arrive in order of offset; spaces may interleave.
    """

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._content: list[bytearray] = []
        self._storage: list[bytearray] = []
        self._blobs: list[tuple[Digest, int] | None] = []
        self._used: set[int] = set()

    def add_space(self, size: int) -> int:
        """Add a data space of `size` bytes (multiple of 4096); return its index."""
        self._sizes.append(size)
        self._content.append(bytearray())
        self._storage.append(bytearray())
        return len(self._sizes) - 1

    def set_space_size(self, space: int, size: int) -> None:
        """Give data space `space` its final size."""
        self._sizes[space] = size

    def reserve_blob(self) -> int:
        """Return the number of a blob whose digest comes later."""
        self._blobs.append(None)
        return len(self._blobs) - 1

    def set_blob(self, index: int, digest: Digest, size: int) -> None:
        """Say what blob `index` turned out to be."""
        self._blobs[index] = (digest, size)

    def add_blob(self, digest: Digest, size: int) -> int:
        """Add a blob that exists already; return its number."""
        self._blobs.append((digest, size))
        return len(self._blobs) - 1

    def add_chunk(
        self,
        space: int,
        offset: int,
        length: int,
        digest: bytes,
        blob: int,
        blob_offset: int,
        stored_size: int,
        codec: int,
        param: int,
    ) -> None:
        """Append a chunk to data space `space`."""
        self._used.add(blob)
        self._content[space] += pack_record(digest, offset, length)
        self._storage[space] += _STORAGE.pack(blob_offset, stored_size, blob, codec, param)

    def space_id(self, space: int) -> bytes:
        """Return the id of data space `space` as it is now."""
        return SpaceTable(self._content[space], self._sizes[space]).space_id

    def to_bytes(self) -> bytes:
        """Pack the map. Blob numbers are made dense in order of reservation; equal blobs become one."""
        order: dict[tuple[Digest, int], int] = {}
        renumbered: dict[int, int] = {}
        for index, blob in enumerate(self._blobs):
            if index in self._used:
                if blob is None:
                    raise ValueError(f"blob {index} holds chunks and was never set")
                renumbered[index] = order.setdefault(blob, len(order))
        counts = [len(content) // RECORD_SIZE for content in self._content]
        total = sum(counts)
        if len(self._sizes) > MAX_SPACES or len(order) > MAX_BLOBS or total > MAX_CHUNKS:
            raise FormatError(
                f"image has {len(self._sizes)} data spaces, {len(order)} blobs, {total} chunks: over the limits; "
                "use larger chunks or data spaces"
            )
        spaces_at = HEADER_SIZE
        blobs_at = spaces_at + 32 * len(self._sizes)
        content_at = blobs_at + 48 * len(order)
        storage_at = content_at + RECORD_SIZE * total
        end = storage_at + STORAGE_SIZE * total
        out = bytearray(
            _HEADER.pack(
                MAGIC, VERSION, HEADER_SIZE, 0, 0, len(self._sizes), len(order), 0,
                total, end, spaces_at, blobs_at, content_at, storage_at,
            )
        )  # fmt: skip
        first = 0
        for size, count in zip(self._sizes, counts, strict=True):
            out += _SPACE.pack(size, first, count)
            first += count
        for digest, size in order:
            out += _BLOB.pack(bytes.fromhex(digest.hex), size)
        for content in self._content:
            out += content
        for storage in self._storage:
            out += self._renumber(storage, renumbered)
        return bytes(out)

    @staticmethod
    def _renumber(storage: bytearray, renumbered: dict[int, int]) -> bytearray:
        if all(old == new for old, new in renumbered.items()):
            return storage
        out = bytearray(storage)
        for at in range(12, len(out), STORAGE_SIZE):
            old = int.from_bytes(out[at : at + 2], "little")
            out[at : at + 2] = renumbered[old].to_bytes(2, "little")
        return out
