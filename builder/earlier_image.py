"""An image that is in a registry already, as a builder uses it: which of its chunks have a given content, and where they are stored.

Decided here: the look-up. Memory: 12 bytes per chunk besides the image's own chunk map. What the chunk map says is believed as far as it
agrees with itself: an image built on one that lies cannot be read where it lied, never reads wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rafsfs.format.chunk_map import StoredChunk
from rafsfs.format.codec import CODEC_XOR
from rafsfs.format.manifest import FROM
from rafsfs.image import Image
from rafsfs.interfaces import ImageStore
from rafsfs.types import Digest


class EarlierImage:
    """One earlier image. `name`: how messages call it; `store`: where it is."""

    def __init__(self, name: str, image: Image, store: ImageStore) -> None:
        self.name = name
        self.image = image
        self.store = store
        chunk_map = image.chunk_map
        tables = [chunk_map.table(space.index).buffer for space in chunk_map.all_spaces]
        digests = [
            np.frombuffer(table, dtype="<u8")[::6] for table in tables
        ]  # 6 words a record, the first of the digest
        prefixes: NDArray[np.uint64] = np.concatenate(digests) if digests else np.zeros(0, dtype=np.uint64)
        order = np.argsort(prefixes, kind="stable").astype(np.uint32)  # the first of equal chunks is found first
        self._prefixes = prefixes[order]
        self._order = order
        self._firsts = np.array([space.first for space in chunk_map.all_spaces], dtype=np.int64)

    @property
    def repository(self) -> str:
        """The repository without its registry, as a mount of blobs names it."""
        return self.store.name.partition("/")[2]

    def origin(self, blob: Digest) -> str:
        """Return the name of the image that a blob of this one was made for."""
        for listed in self.image.manifest.blobs:
            if listed.digest == blob:
                return listed.annotations.get(FROM, self.name)
        return self.name

    def find(self, digests: Sequence[bytes]) -> list[tuple[int, int] | None]:
        """Return for each digest (data space, chunk) of a chunk with that content, or None."""
        if not len(self._prefixes) or not digests:
            return [None] * len(digests)
        wanted = np.frombuffer(b"".join(digest[:8] for digest in digests), dtype="<u8")
        starts = np.searchsorted(self._prefixes, wanted)
        return [
            self._exact(int(start), digest, int(prefix))
            for start, digest, prefix in zip(starts, digests, wanted, strict=True)
        ]

    def _exact(self, position: int, digest: bytes, prefix: int) -> tuple[int, int] | None:
        chunk_map = self.image.chunk_map
        while position < len(self._prefixes) and int(self._prefixes[position]) == prefix:
            number = int(self._order[position])
            space = int(np.searchsorted(self._firsts, number, side="right")) - 1
            index = number - int(self._firsts[space])
            if chunk_map.table(space).digest(index) == digest and chunk_map.is_stored(space, index):
                return space, index
            position += 1
        return None

    def stored(self, place: tuple[int, int]) -> StoredChunk:
        """Return where a chunk is stored. Raises FormatError."""
        return self.image.chunk_map.stored(*place)

    def depth(self, place: tuple[int, int]) -> int:
        """Return how many bases a chunk needs, one through the other."""
        stored = self.stored(place)
        depth = 0
        while stored.codec == CODEC_XOR and stored.base is not None:
            stored = self.stored(stored.base)
            depth += 1
        return depth
