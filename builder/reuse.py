"""What one build takes over from earlier ones: chunks with the same content, and bases to store differences to.

Decided here: the order in which earlier images are asked (as given; then the dictionary of this machine), that a chunk is taken
over only if
its blob is in the target repository or the registry mounts it there, and what comes along with a chunk that is stored as a difference.

Concurrency: used by the tasks of one pipeline; `find` is called by one task, `take_base` by another, and both only look at or add to the
chunk map between checkpoints. `_usable` may be asked twice for one blob at once; both get the same answer.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import trio

from rafsfs.errors import RemoteError
from rafsfs.format.chunk_map import BlobInfo, StoredChunk
from rafsfs.format.chunk_map_builder import ChunkMapBuilder
from rafsfs.interfaces import ImageStore
from rafsfs.types import Digest

from .dictionary import ChunkDictionary, DictionaryEntry
from .earlier_image import EarlierImage
from .known import Place

_log = logging.getLogger("rafsfs.builder")

MOST_BLOBS: Final = 1000
"""Blobs of earlier images that one image lists: each is 200 bytes of manifest, a request of this build and one more thing that a
registry must keep. Beyond it, chunks are stored again, which is what makes an image whole once more."""
DICTIONARY: Final = "dictionary of this machine"


@dataclass(frozen=True, slots=True)
class Earlier:
    """What builds may take over from, in the order in which it is asked. The same for all passes of a build."""

    images: tuple[EarlierImage, ...] = ()
    dictionary: ChunkDictionary | None = None


class Reuse:
    """What one pass of a build has taken over so far."""

    def __init__(self, earlier: Earlier, store: ImageStore, chunk_map: ChunkMapBuilder) -> None:
        self._earlier = earlier
        self._store = store
        self._map = chunk_map
        self._numbers: dict[Digest, int | None] = {}
        self._spaces: dict[bytes, int] = {}
        self._bases: dict[tuple[bytes, int], tuple[int, int]] = {}
        self._warned: set[str] = set()
        self.sources: dict[Digest, str] = {}
        """Where each blob taken over was found."""
        self.bytes_by_source: Counter[str] = Counter()
        """Bytes of content found, by the name of the earlier image."""
        self.base_bytes = 0
        """Stored bytes of the bases that the image needs besides its own chunks."""

    def may_have(self, digest: bytes) -> bool:
        """Tell whether `find` may find a chunk. In any thread."""
        if any(image.find([digest])[0] is not None for image in self._earlier.images):
            return True
        return self._earlier.dictionary is not None and self._earlier.dictionary.find([digest])[0] is not None

    async def find(self, digests: Sequence[bytes], lengths: Sequence[int]) -> list[Place | None]:
        """Return for each digest where an earlier blob has the chunk, or None."""
        found: list[Place | None] = [None] * len(digests)
        for image in self._earlier.images:
            missing = [index for index, place in enumerate(found) if place is None]
            if not missing:
                return found
            places = image.find([digests[index] for index in missing])
            for index, place in zip(missing, places, strict=True):
                if place is not None:
                    found[index] = await self._take(image, image.stored(place))
                    self.bytes_by_source[image.name] += lengths[index] if found[index] else 0
        missing = [index for index, place in enumerate(found) if place is None]
        if self._earlier.dictionary is not None and missing:
            ask = self._earlier.dictionary.find
            entries = await trio.to_thread.run_sync(ask, [digests[index] for index in missing])
            for index, entry in zip(missing, entries, strict=True):
                if entry is not None:
                    found[index] = await self._take_entry(entry)
                    self.bytes_by_source[DICTIONARY] += lengths[index] if found[index] else 0
        return found

    async def can_take(self, image: EarlierImage, place: tuple[int, int]) -> bool:
        """Tell whether a chunk of an earlier image, and what it is a difference to, can be had from the target repository."""
        following: tuple[int, int] | None = place
        while following is not None:
            stored = image.stored(following)
            if await self._usable(image.image.chunk_map.blobs[stored.blob], image) is None:
                return False
            following = stored.base
        return True

    def take_base(self, image: EarlierImage, place: tuple[int, int]) -> tuple[int, int]:
        """Return (data space, chunk) of a base in the new chunk map. Only after `can_take` has said yes. No checkpoint."""
        table = image.image.chunk_map.table(place[0])
        key = (table.space_id, place[1])
        known = self._bases.get(key)
        if known is not None:
            return known
        stored = image.stored(place)
        below = None if stored.base is None else self.take_base(image, stored.base)
        space = self._spaces.get(table.space_id)
        if space is None:
            space = self._spaces[table.space_id] = self._map.add_base_space(table)
        number = self._numbers[image.image.chunk_map.blobs[stored.blob].digest]
        assert number is not None
        self._map.store_base_chunk(
            space, place[1], number, stored.offset, stored.stored_size, stored.codec, stored.param, below
        )
        self.base_bytes += stored.stored_size
        self._bases[key] = space, place[1]
        return space, place[1]

    async def _take(self, image: EarlierImage, stored: StoredChunk) -> Place | None:
        number = await self._usable(image.image.chunk_map.blobs[stored.blob], image)
        if number is None:
            return None
        base = None
        if stored.base is not None:
            if not await self.can_take(image, stored.base):
                return None
            base = self.take_base(image, stored.base)
        return Place(number, stored.offset, stored.stored_size, stored.codec, stored.param, base)

    async def _take_entry(self, entry: DictionaryEntry) -> Place | None:
        number = await self._usable(BlobInfo(entry.blob, entry.blob_size), None)
        if number is None:
            return None
        return Place(number, entry.offset, entry.stored_size, entry.codec, entry.param)

    async def _usable(self, blob: BlobInfo, image: EarlierImage | None) -> int | None:
        """Return the number of an earlier blob in the chunk map, None if the target repository cannot have it."""
        if blob.digest in self._numbers:
            return self._numbers[blob.digest]
        number = None
        if len(self.sources) < MOST_BLOBS and await self._obtain(blob.digest, image):
            if blob.digest in self._numbers:  # somebody else has asked meanwhile
                return self._numbers[blob.digest]
            number = self._map.add_blob(blob.digest, blob.size)
            self.sources[blob.digest] = image.origin(blob.digest) if image else DICTIONARY
        elif image is not None and image.name not in self._warned and len(self.sources) < MOST_BLOBS:
            self._warned.add(image.name)
            _log.warning(
                "%s has chunks that cannot be used for an image in %s: blob %s is not there and cannot be mounted from where it is; "
                "they are stored again",
                image.name,
                self._store.name,
                blob.digest,
            )
        self._numbers[blob.digest] = number
        return number

    async def _obtain(self, blob: Digest, image: EarlierImage | None) -> bool:
        """See that the target repository has a blob; mount it from another one if that is possible."""
        try:
            if await self._store.has_blob(blob):
                return True
            registry, _, own = self._store.name.partition("/")
            if registry.startswith("oci:"):
                return False
            candidates = []
            if image is not None:
                if image.store.name.partition("/")[0] == registry:
                    candidates = [image.repository]
            elif self._earlier.dictionary is not None:
                candidates = self._earlier.dictionary.repositories(blob, registry)
            for repository in candidates:
                if repository != own and await self._store.mount_blob(blob, repository):
                    return True
        except RemoteError as error:
            _log.warning("blob %s of an earlier image cannot be used: %s", blob, error)
        return False
