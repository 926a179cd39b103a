"""Chunk map: for every chunk of an image's data spaces, what it hashes to and where its stored bytes are.

Decided here: the byte layout (header, space table, blob table, content records, storage records, delta records), its limits and
how unknown versions and features are refused. Not here: what a codec does with the stored bytes (codec.py), how a map is made
(chunk_map_builder.py). Rule: opening looks at header and the two small tables only; chunks are read from the raw bytes when asked for.

A chunk stored as its difference to another one has a delta record that names it, its base. Bases from an earlier image lie in *base
spaces*: data spaces of that image, listed behind this image's own, which no file refers to. So a base is fetched, cached and shared between
nodes like any chunk, and a node that has the earlier image has it already.
Specification: docs/format/chunk-map.md.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..errors import FormatError, UnsupportedError
from ..types import Digest
from . import codec as codecs
from .space_table import MAX_CHUNK, MAX_SPACE, RECORD_SIZE, SpaceTable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAGIC: Final = b"RAFSCMAP"
VERSION: Final = 1
HEADER_SIZE: Final = 128
MAX_SPACES: Final = 65535
"""EROFS counts extra devices in 16 bits."""
MAX_BLOBS: Final = 65535
MAX_CHUNKS: Final = 1 << 28
"""268 M chunks: 1 PiB at 4 MiB, a 16 GiB map."""

MAX_DELTA_DEPTH: Final = 3
"""Bases that a chunk needs, one through the other, at most: each is a fetch, a decoding and a place in the cache."""
INCOMPAT_DELTA: Final = 1
"""Bit of feature_incompat: the map has base spaces or delta records."""

HEADER: Final = struct.Struct("<8sHHIIIIIQQQQQQIIQQ24x")
SPACE_RECORD: Final = struct.Struct("<QQQ8x")
BLOB_RECORD: Final = struct.Struct("<32sQ8x")
STORAGE_RECORD: Final = struct.Struct("<QIHBB")
DELTA_RECORD: Final = struct.Struct("<II")
STORAGE_SIZE: Final = STORAGE_RECORD.size
assert HEADER.size == HEADER_SIZE
assert SPACE_RECORD.size == 32
assert BLOB_RECORD.size == 48
assert STORAGE_SIZE == 16

ABSENT: Final = STORAGE_RECORD.pack(0, 0, 0xFFFF, 255, 0)
"""Storage record of a chunk of a base space that no delta needs: the image does not say where it is."""
_ABSENT_CODEC: Final = 255
STORAGE_DTYPE: Final = [("offset", "<u8"), ("size", "<u4"), ("blob", "<u2"), ("codec", "u1"), ("param", "u1")]
"""The storage record for numpy."""


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
    base: tuple[int, int] | None = None
    """(data space, chunk) whose bytes decoding needs, for a chunk stored as a difference."""


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
            base_spaces,
            reserved_too,
            delta_count,
            delta_start,
        ) = HEADER.unpack_from(view)
        if magic != MAGIC:
            raise FormatError(f"chunk map begins with {magic!r}, expected {MAGIC!r}")
        if version != VERSION:
            raise UnsupportedError(f"chunk map has version {version}, this program reads {VERSION}; upgrade rafs")
        if incompat & ~INCOMPAT_DELTA:
            raise UnsupportedError(
                f"chunk map needs features {incompat & ~INCOMPAT_DELTA:#x} unknown to this program; upgrade rafs"
            )
        if space_count > MAX_SPACES or blob_count > MAX_BLOBS or max(chunk_count, delta_count) > MAX_CHUNKS:
            raise FormatError(
                f"chunk map counts {space_count} spaces, {blob_count} blobs, {chunk_count} chunks: over the limits"
            )
        blobs_at = HEADER_SIZE + 32 * space_count
        content_at = blobs_at + 48 * blob_count
        storage_at = content_at + RECORD_SIZE * chunk_count
        deltas_at = storage_at + STORAGE_SIZE * chunk_count
        end = deltas_at + DELTA_RECORD.size * delta_count
        expected = (HEADER_SIZE, blobs_at, content_at, storage_at, deltas_at if incompat else 0)
        found = (space_start, blob_start, content_start, storage_start, delta_start)
        if header_size != HEADER_SIZE or reserved or reserved_too or found != expected or total != end:
            raise FormatError("chunk map has tables that are not where its counts put them")
        if base_spaces > space_count or (not incompat and (base_spaces or delta_count)):
            raise FormatError(
                f"chunk map counts {base_spaces} base spaces and {delta_count} deltas, which it cannot have"
            )
        if view.nbytes != total:
            raise FormatError(f"chunk map is {view.nbytes} bytes, expected {total}")
        self._view = view
        self._content: int = content_start
        self._storage: int = storage_start
        self._deltas: int = deltas_at
        self._total_chunks: int = chunk_count
        self.delta_count: int = delta_count
        self.all_spaces = self._read_spaces(space_start, space_count)
        """Data spaces with the base spaces at the end."""
        self.spaces = self.all_spaces[: space_count - base_spaces]
        """Data spaces that files of the image lie in: the devices of its bootstrap, in their order."""
        self.chunk_count: int = sum(space.count for space in self.spaces)
        """Chunks of `spaces`."""
        self.blobs = self._read_blobs(blob_start, blob_count)

    @property
    def buffer(self) -> memoryview:
        """The raw bytes of the map."""
        return self._view

    @property
    def data_bytes(self) -> int:
        """Sum of the lengths of the chunks of `spaces`."""
        import numpy as np  # noqa: PLC0415 - tools and daemon only

        return int(self.lengths()[: self.chunk_count].sum(dtype=np.uint64))

    def lengths(self) -> NDArray[np.uint32]:
        """Return the length of every chunk, those of base spaces at the end."""
        import numpy as np  # noqa: PLC0415 - tools and daemon only

        # 12 words a record, the length is word 10
        return np.frombuffer(self._view[self._content : self._storage], dtype="<u4")[10::12]

    def storage(self) -> NDArray[np.void]:
        """Return the storage record of every chunk (fields of STORAGE_DTYPE), those of base spaces at the end."""
        import numpy as np  # noqa: PLC0415 - tools and daemon only

        return np.frombuffer(self._view[self._storage : self._deltas], dtype=STORAGE_DTYPE)

    def deltas(self) -> NDArray[np.uint32]:
        """Return (chunk, base) per delta record, as numbers counted over all spaces: shape (deltas, 2)."""
        import numpy as np  # noqa: PLC0415 - tools and daemon only

        return np.frombuffer(self._view[self._deltas :], dtype="<u4").reshape(-1, 2)

    def table(self, space: int) -> SpaceTable:
        """Return the content table of data space `space`, a view."""
        info = self._space(space)
        start = self._content + info.first * RECORD_SIZE
        return SpaceTable(self._view[start : start + info.count * RECORD_SIZE], info.size)

    def is_stored(self, space: int, index: int) -> bool:
        """Tell whether the image says where chunk `index` of data space `space` is; always so but for chunks of base spaces."""
        number = self._space(space).first + index
        return self._view[self._storage + number * STORAGE_SIZE + 14] != _ABSENT_CODEC

    def stored(self, space: int, index: int) -> StoredChunk:
        """Return where chunk `index` of data space `space` is stored, checked against its blob."""
        info = self._space(space)
        if not 0 <= index < info.count:
            raise FormatError(f"chunk {index} of data space {space}, which has {info.count} chunks")
        number = info.first + index
        record = self._content + number * RECORD_SIZE
        length = int.from_bytes(self._view[record + 40 : record + 44], "little")
        offset, stored_size, blob, codec, param = STORAGE_RECORD.unpack_from(
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
        base = self._base(number) if codec == codecs.CODEC_XOR else None
        return StoredChunk(blob, offset, stored_size, codec, param, length, digest, base)

    def validate(self) -> None:
        """Check every record of every table. Raises FormatError or UnsupportedError naming the first bad one."""
        import numpy as np  # noqa: PLC0415 - tools and daemon only

        for space in self.all_spaces:
            self.table(space.index).validate()
        storage, lengths = self.storage(), self.lengths()
        absent = storage["codec"] == _ABSENT_CODEC
        if absent[: self.chunk_count].any():
            raise FormatError(f"chunk number {int(absent.argmax())} is not stored anywhere")
        known = np.isin(storage["codec"], np.array(codecs.KNOWN_CODECS, dtype=np.uint8)) | absent
        if not known.all():
            number = int((~known).argmax())
            raise UnsupportedError(
                f"chunk number {number} uses codec {int(storage['codec'][number])} unknown to this program; upgrade rafs"
            )
        bad = (storage["blob"] >= len(self.blobs)) & ~absent
        if not bad.any():
            # One more, of size 0, for the chunks that are absent.
            sizes = np.array([*(blob.size for blob in self.blobs), 0], dtype=np.uint64)
            bad = storage["offset"] > (1 << 62)
            ends = storage["offset"] + storage["size"].astype(np.uint64)
            bad |= ends > sizes[np.minimum(storage["blob"], len(self.blobs))]
            bad |= (storage["size"] == 0) | (storage["size"] > lengths)
            bad |= (storage["codec"] == codecs.CODEC_RAW) & (storage["size"] != lengths)
            bad &= ~absent
        if bad.any():
            number = int(bad.argmax())
            raise FormatError(f"chunk number {number} is stored outside its blob or in a wrong size")
        self._validate_deltas(storage, lengths, absent)

    def _validate_deltas(
        self, storage: NDArray[np.void], lengths: NDArray[np.uint32], absent: NDArray[np.bool_]
    ) -> None:
        """Check that each chunk stored as a difference has one base of its own length, and that no chain is too long."""
        import numpy as np  # noqa: PLC0415 - tools and daemon only

        deltas = self.deltas()
        differing = np.flatnonzero(storage["codec"] == codecs.CODEC_XOR)
        if len(differing) != len(deltas) or (differing != deltas[:, 0]).any():
            raise FormatError(
                f"{len(deltas)} delta records do not name the {len(differing)} chunks stored as differences"
            )
        if not len(deltas):
            return
        bases = deltas[:, 1]
        if (bases >= self._total_chunks).any():
            raise FormatError(f"base {int(bases.max())} of a delta in a map of {self._total_chunks} chunks")
        bad = (lengths[bases] != lengths[differing]) | absent[bases]
        if bad.any():
            raise FormatError(
                f"chunk number {int(differing[bad.argmax()])} has a base of another length or stored nowhere"
            )
        above = np.arange(
            self._total_chunks, dtype=np.uint32
        )  # of each chunk, the base that it is made from in the end
        above[differing] = bases
        current = bases
        for _ in range(MAX_DELTA_DEPTH - 1):
            following = above[current]
            if (following == current).all():
                break
            current = following
        if (storage["codec"][current] == codecs.CODEC_XOR).any():
            raise FormatError(f"a delta of the chunk map needs more than {MAX_DELTA_DEPTH} bases, or itself")

    def _base(self, number: int) -> tuple[int, int]:
        """Return (data space, chunk) of the base of chunk `number`. Raises FormatError."""
        low, high = 0, self.delta_count
        while low < high:
            middle = (low + high) >> 1
            chunk, base = DELTA_RECORD.unpack_from(self._view, self._deltas + middle * DELTA_RECORD.size)
            if chunk == number:
                return self._place(base)
            if chunk < number:
                low = middle + 1
            else:
                high = middle
        raise FormatError(f"chunk number {number} is stored as a difference and has no base")

    def _place(self, number: int) -> tuple[int, int]:
        found = bisect_right(self.all_spaces, number, key=lambda space: space.first) - 1
        while found >= 0 and number >= self.all_spaces[found].first + self.all_spaces[found].count:
            found -= 1  # an empty space begins where the next one does
        if not 0 <= number < self._total_chunks or found < 0:
            raise FormatError(f"chunk number {number} in a map of {self._total_chunks} chunks")
        return found, number - self.all_spaces[found].first

    def _space(self, space: int) -> SpaceInfo:
        if not 0 <= space < len(self.all_spaces):
            raise FormatError(f"data space {space} of an image with {len(self.all_spaces)}")
        return self.all_spaces[space]

    def _read_spaces(self, start: int, count: int) -> tuple[SpaceInfo, ...]:
        spaces = []
        following = 0
        for index, (size, first, chunks) in enumerate(SPACE_RECORD.iter_unpack(self._view[start : start + 32 * count])):
            if size > MAX_SPACE or size % 4096 or first != following:
                raise FormatError(f"data space {index} has size {size}, first chunk {first}")
            following = first + chunks
            spaces.append(SpaceInfo(index, size, first, chunks))
        if following != self._total_chunks:
            raise FormatError(f"data spaces hold {following} chunks, the map holds {self._total_chunks}")
        return tuple(spaces)

    def _read_blobs(self, start: int, count: int) -> tuple[BlobInfo, ...]:
        blobs = []
        for sha256, size in BLOB_RECORD.iter_unpack(self._view[start : start + 48 * count]):
            if size > 1 << 62:
                raise FormatError(f"blob of {size} bytes")
            blobs.append(BlobInfo(Digest("sha256:" + sha256.hex()), size))
        return tuple(blobs)
