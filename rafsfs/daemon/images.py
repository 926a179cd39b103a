"""The images a daemon has in use: metadata in the cache, chunks to be had from a store, counted by users.

Decided here: that what is cached is mounted without asking a registry, that a tag is asked for each time while its registry answers,
and that mounts of one image from one repository share one source and its connections.

Concurrency: trio tasks only. `_opening` keeps two openings from making two sources; counts change between checkpoints. A
cancelled opening leaves at most complete metadata in the cache.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import trio

from ..errors import UnavailableError
from ..fetch.fetcher import Fetcher
from ..fetch.source import Source
from ..format.chunk_map import ChunkMap
from ..image import load_image
from ..interfaces import ImageStore
from ..registry.reference import Reference
from ..registry.store import RegistryOptions, make_store
from ..store.cache import Cache, CachedImage
from ..types import Digest

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class OpenedImage:
    """An image in use: where its chunks come from, and by how many mounts and pulls it is used."""

    image: CachedImage
    source: Source
    store: ImageStore
    data_bytes: int
    users: int = 0


class OpenImages:
    """The images in use."""

    def __init__(self, cache: Cache, fetcher: Fetcher, nursery: trio.Nursery) -> None:
        self._cache = cache
        self._fetcher = fetcher
        self._nursery = nursery
        self._opened: dict[tuple[Digest, str], OpenedImage] = {}
        self._opening = trio.Lock()

    def digests(self) -> set[str]:
        """Return the digests of the images in use."""
        return {str(opened.image.digest) for opened in self._opened.values()}

    async def open(self, reference: Reference, options: RegistryOptions) -> OpenedImage:
        """Return an image ready to be fetched from, one more user. What is cached already needs no registry."""
        store = make_store(reference, options)
        try:
            image = await self._cached_image(reference, store)
            key = (image.digest, store.name)
            async with self._opening:
                opened = self._opened.get(key)
                if opened is None:
                    chunk_map = await trio.to_thread.run_sync(_read_chunk_map, image)
                    source = await trio.to_thread.run_sync(self._fetcher.add_source, chunk_map, store, store.name)
                    opened = self._opened[key] = OpenedImage(image, source, store, chunk_map.data_bytes)
                opened.users += 1  # in the lock: nobody's release may come between
        except BaseException:
            with trio.CancelScope(shield=True):
                await store.aclose()
            raise
        if opened.store is not store:
            with trio.CancelScope(shield=True):
                await store.aclose()
        return opened

    async def _cached_image(self, reference: Reference, store: ImageStore) -> CachedImage:
        name = str(reference)
        if reference.digest:
            image = self._cache.image(reference.digest)
            if image:
                return image
        try:
            descriptor = await store.resolve(reference.reference)
        except UnavailableError as error:
            image = self._cache.find_by_reference(name)
            if image is None:
                raise
            _log.warning("registry away, using the cached image: ref=%s digest=%s cause=%s", name, image.digest, error)
            return image
        image = self._cache.image(descriptor.digest)
        if image is None:
            loaded = await load_image(store, str(descriptor.digest))
            parts = (loaded.manifest_bytes, loaded.bootstrap_bytes, loaded.chunk_map_bytes)
            return await trio.to_thread.run_sync(self._cache.add_image, *parts, name)
        self._cache.note_reference(image, name)
        return image

    def release(self, opened: OpenedImage) -> None:
        """Take one user off; the last one closes the store."""
        opened.users -= 1
        if not opened.users:
            self._fetcher.remove_source(opened.source)
            self._opened.pop((opened.image.digest, opened.store.name), None)
            self._nursery.start_soon(opened.store.aclose)

    def release_source(self, source: Source) -> None:
        """Take one user off the image that `source` belongs to."""
        opened = next((o for o in self._opened.values() if o.source is source), None)
        if opened:
            self.release(opened)

    def present_bytes(self, source: Source) -> int:
        """Return the bytes of a source's data spaces that are on this node."""
        total = 0
        for space_id in source.own:
            space = self._cache.opened_space(space_id)
            total += space.present_bytes if space else 0
        return total

    def used_spaces(self) -> set[bytes]:
        """Return the ids of the data spaces of all images in use."""
        return {space_id for opened in self._opened.values() for space_id in opened.source.spaces}


def _read_chunk_map(image: CachedImage) -> ChunkMap:
    chunk_map = image.chunk_map()
    chunk_map.validate()
    return chunk_map
