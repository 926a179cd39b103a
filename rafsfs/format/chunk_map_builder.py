"""Making a chunk map: collects data spaces, blobs and chunks, and packs them. Layout: chunk_map.py.

Decided here: that blobs are numbered densely in order of reservation and equal ones become one, and that chunks of base spaces are stored
nowhere until something needs them. Memory: 64 bytes per chunk and 16 per delta, twice while packing.
"""

from __future__ import annotations

from array import array

import numpy as np

from ..errors import FormatError
from ..types import Digest
from .chunk_map import (
    ABSENT,
    BLOB_RECORD,
    DELTA_RECORD,
    HEADER,
    HEADER_SIZE,
    INCOMPAT_DELTA,
    MAGIC,
    MAX_BLOBS,
    MAX_CHUNKS,
    MAX_SPACES,
    SPACE_RECORD,
    STORAGE_DTYPE,
    STORAGE_RECORD,
    STORAGE_SIZE,
    VERSION,
    BlobInfo,
)
from .space_table import RECORD_SIZE, SpaceTable, pack_record


class ChunkMapBuilder:
    """A chunk map in the making.

    A blob's digest is known only when its last chunk is written, so blobs are reserved first and set later; a
    reservation that no chunk uses is dropped. Chunks of one space arrive in order of offset; spaces may interleave. Base spaces come
    after the last `add_space`.
    """

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._content: list[bytearray] = []
        self._storage: list[bytearray] = []
        self._base_spaces = 0
        self._blobs: list[tuple[Digest, int] | None] = []
        self._used: set[int] = set()
        self._deltas = array("I")  # space, chunk, base space, base chunk

    def add_space(self, size: int) -> int:
        """Add a data space of `size` bytes (multiple of 4096); return its index."""
        if self._base_spaces:
            raise ValueError("base spaces come last")
        return self._add_space(size)

    def add_base_space(self, table: SpaceTable) -> int:
        """Add a data space of an earlier image, none of its chunks stored anywhere so far; return its index."""
        index = self._add_space(table.size)
        self._base_spaces += 1
        self._content[index] += table.buffer
        self._storage[index] += ABSENT * table.count
        return index

    def _add_space(self, size: int) -> int:
        self._sizes.append(size)
        self._content.append(bytearray())
        self._storage.append(bytearray())
        return len(self._sizes) - 1

    def set_space_size(self, space: int, size: int) -> None:
        """Give data space `space` its final size."""
        self._sizes[space] = size

    def reserve_blob(self) -> int:
        """Return the number of a blob whose digest comes later."""
        if len(self._blobs) == MAX_BLOBS:
            raise FormatError(f"image has more than {MAX_BLOBS} blobs; use larger data spaces")
        self._blobs.append(None)
        return len(self._blobs) - 1

    def set_blob(self, index: int, digest: Digest, size: int) -> None:
        """Say what blob `index` turned out to be."""
        self._blobs[index] = (digest, size)

    def add_blob(self, digest: Digest, size: int) -> int:
        """Add a blob that exists already; return its number."""
        index = self.reserve_blob()
        self._blobs[index] = (digest, size)
        return index

    def blobs(self) -> list[BlobInfo]:
        """Return the blobs that chunks are in, as the map will list them."""
        return [BlobInfo(digest, size) for digest, size in self._order()[0]]

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
        base: tuple[int, int] | None = None,
    ) -> None:
        """Append a chunk to data space `space`. `base`: (data space, chunk) that it is stored as a difference to."""
        self._used.add(blob)
        if base is not None:
            self._deltas.extend((space, len(self._content[space]) // RECORD_SIZE, *base))
        self._content[space] += pack_record(digest, offset, length)
        self._storage[space] += STORAGE_RECORD.pack(blob_offset, stored_size, blob, codec, param)

    def store_base_chunk(
        self,
        space: int,
        index: int,
        blob: int,
        blob_offset: int,
        stored_size: int,
        codec: int,
        param: int,
        base: tuple[int, int] | None = None,
    ) -> None:
        """Say where a chunk of a base space is stored. Once per chunk."""
        self._used.add(blob)
        if base is not None:
            self._deltas.extend((space, index, *base))
        STORAGE_RECORD.pack_into(
            self._storage[space], index * STORAGE_SIZE, blob_offset, stored_size, blob, codec, param
        )

    def space_id(self, space: int) -> bytes:
        """Return the id of data space `space` as it is now."""
        return SpaceTable(self._content[space], self._sizes[space]).space_id

    def to_bytes(self) -> bytes:
        """Pack the map."""
        order, renumbered = self._order()
        counts = [len(content) // RECORD_SIZE for content in self._content]
        firsts = _sums(counts)
        total = sum(counts)
        if len(self._sizes) > MAX_SPACES or len(order) > MAX_BLOBS or total > MAX_CHUNKS:
            raise FormatError(
                f"image has {len(self._sizes)} data spaces, {len(order)} blobs, {total} chunks: over the limits; "
                "use larger chunks or data spaces"
            )
        deltas = self._delta_records(firsts)
        blobs_at = HEADER_SIZE + SPACE_RECORD.size * len(self._sizes)
        content_at = blobs_at + BLOB_RECORD.size * len(order)
        storage_at = content_at + RECORD_SIZE * total
        deltas_at = storage_at + STORAGE_SIZE * total
        has_deltas = bool(self._base_spaces or deltas)
        out = bytearray(
            HEADER.pack(
                MAGIC, VERSION, HEADER_SIZE, 0, INCOMPAT_DELTA * has_deltas, len(self._sizes), len(order), 0, total,
                deltas_at + len(deltas), HEADER_SIZE, blobs_at, content_at, storage_at,
                self._base_spaces, 0, len(deltas) // DELTA_RECORD.size, deltas_at if has_deltas else 0,
            )
        )  # fmt: skip
        for size, first, count in zip(self._sizes, firsts, counts, strict=True):
            out += SPACE_RECORD.pack(size, first, count)
        for digest, size in order:
            out += BLOB_RECORD.pack(bytes.fromhex(digest.hex), size)
        for content in self._content:
            out += content
        for storage in self._storage:
            out += _renumber(storage, renumbered)
        out += deltas
        return bytes(out)

    def _order(self) -> tuple[dict[tuple[Digest, int], int], dict[int, int]]:
        """Return the blobs as the map numbers them, and from number of reservation to that number."""
        order: dict[tuple[Digest, int], int] = {}
        renumbered: dict[int, int] = {}
        for index, blob in enumerate(self._blobs):
            if index in self._used:
                if blob is None:
                    raise ValueError(f"blob {index} holds chunks and was never set")
                renumbered[index] = order.setdefault(blob, len(order))
        return order, renumbered

    def _delta_records(self, firsts: list[int]) -> bytes:
        places = np.array(self._deltas, dtype=np.int64).reshape(-1, 4)
        starts = np.array(firsts, dtype=np.int64)
        chunks = starts[places[:, 0]] + places[:, 1]
        bases = starts[places[:, 2]] + places[:, 3]
        records = np.stack([chunks, bases], axis=1)[np.argsort(chunks)]
        return records.astype("<u4").tobytes()


def _sums(counts: list[int]) -> list[int]:
    found, total = [], 0
    for count in counts:
        found.append(total)
        total += count
    return found


def _renumber(storage: bytearray, renumbered: dict[int, int]) -> bytearray:
    if all(old == new for old, new in renumbered.items()):
        return storage
    out = bytearray(storage)
    records = np.frombuffer(out, dtype=STORAGE_DTYPE)
    table = np.arange(1 << 16, dtype=np.uint16)  # chunks that are stored nowhere keep their mark
    for old, new in renumbered.items():
        table[old] = new
    records["blob"] = table[records["blob"]]
    return out
