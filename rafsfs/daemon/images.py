"""The images a daemon has in use: metadata in the cache, chunks to be had from a store, counted by users.

Decided here: that what is cached is mounted without asking a registry, that a tag is asked for each time while its registry answers,
and that mounts of one image from one repository share one source and its connections. An image is *in use* while a mount, a pull or a
filling has it; then its data spaces are held in the cache. A seed *keeps* images that nobody uses any more: they stay open, so that
others get them from here, but their data may be evicted.

Concurrency: trio tasks only. `_opening` keeps two openings from making two sources; counts change between checkpoints. A
cancelled opening leaves at most complete metadata in the cache. While any opening is under way, no metadata are dropped.
"""

from __future__ import annotations

import logging
import mmap
from dataclasses import dataclass

import trio

from ..errors import CacheFullError, FormatError, UnavailableError
from ..fetch.fetcher import Fetcher
from ..fetch.layout import ImageLayout, image_layout
from ..fetch.source import Source
from ..format.bootstrap import Bootstrap
from ..format.chunk_map import ChunkMap
from ..image import load_image
from ..interfaces import ImageStore
from ..registry.reference import Reference
from ..registry.store import RegistryOptions, make_store
from ..store.cache import Cache, CachedImage
from ..types import Digest
from .eviction import Evictor

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class OpenedImage:
    """An image in use: where its chunks come from, and by how many mounts and pulls it is used."""

    image: CachedImage
    source: Source
    store: ImageStore
    data_bytes: int
    users: int = 0
    layout: ImageLayout | None = None
    """What lies where, once the bootstrap has been gone through."""
    is_kept: bool = False
    """Whether it stays open without users."""


class OpenImages:
    """The images in use."""

    def __init__(self, cache: Cache, fetcher: Fetcher, nursery: trio.Nursery, evictor: Evictor) -> None:
        self._evictor = evictor
        self._arriving = 0
        self._cache = cache
        self._fetcher = fetcher
        self._nursery = nursery
        self._opened: dict[tuple[Digest, str], OpenedImage] = {}
        self._opening = trio.Lock()

    def __len__(self) -> int:
        """Images open, in use or kept."""
        return len(self._opened)

    def digests(self) -> set[str]:
        """Return the digests of the images in use."""
        return {str(opened.image.digest) for opened in self._opened.values() if opened.users}

    async def open(self, reference: Reference, options: RegistryOptions) -> OpenedImage:
        """Return an image ready to be fetched from, one more user. What is cached already needs no registry."""
        store = make_store(reference, options)
        self._arriving += 1
        try:
            image = await self._cached_image(reference, store)
            opened = await self._open(image, store)
        except BaseException:
            with trio.CancelScope(shield=True):
                await store.aclose()
            raise
        finally:
            self._arriving -= 1
        if opened.store is not store:
            with trio.CancelScope(shield=True):
                await store.aclose()
        return opened

    async def _open(self, image: CachedImage, store: ImageStore) -> OpenedImage:
        """Return an open image with one more user."""
        async with self._opening:
            opened = self._opened.get((image.digest, store.name))
            chunk_map = opened.source.chunk_map if opened else await trio.to_thread.run_sync(_read_chunk_map, image)
            space_ids = {chunk_map.table(space.index).space_id for space in chunk_map.all_spaces}
            self._cache.acquire(space_ids)
            try:
                await self._open_spaces(chunk_map)
                if opened is None:
                    source = await trio.to_thread.run_sync(self._fetcher.add_source, chunk_map, store, store.name)
                    opened = OpenedImage(image, source, store, chunk_map.data_bytes)
                    self._opened[image.digest, store.name] = opened
                    self._nursery.start_soon(self._lay_out, opened)
            except BaseException:
                self._cache.release(space_ids)
                raise
            opened.users += 1  # in the lock: nobody's release may come between
            return opened

    async def _lay_out(self, opened: OpenedImage) -> None:
        """Find out what lies where in an image; its readers do not wait for it."""
        try:
            layout = await trio.to_thread.run_sync(_read_layout, opened.image)
        except (FormatError, OSError) as error:
            _log.warning("image is read without being understood: digest=%s cause=%s", opened.image.digest, error)
            return
        if self._opened.get((opened.image.digest, opened.store.name)) is opened:
            opened.layout = layout
            self._fetcher.prefetcher.add_layout(layout)

    async def _open_spaces(self, chunk_map: ChunkMap) -> None:
        """Open the data spaces; if the disk is full, again when something could be evicted."""
        try:
            await trio.to_thread.run_sync(self._fetcher.open_spaces, chunk_map)
        except CacheFullError:
            over, outcome = trio.Event(), []

            def done(has_space: bool) -> None:
                outcome.append(has_space)
                over.set()

            self._evictor.relieve(done)
            await over.wait()
            if not outcome[0]:
                raise
            await trio.to_thread.run_sync(self._fetcher.open_spaces, chunk_map)

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

    def share(self, opened: OpenedImage) -> None:
        """Put one more user on an image that is open. No checkpoint."""
        opened.users += 1
        self._cache.acquire(opened.source.spaces)

    def keep(self, opened: OpenedImage) -> None:
        """Leave an image open when its last user goes, for others to fetch it from here. No checkpoint."""
        opened.is_kept = True

    def release(self, opened: OpenedImage, *, is_use: bool = True) -> None:
        """Take one user off; the last one closes the store, unless the image is kept. `is_use` false: its data do not count as used
        now. No checkpoint.
        """
        opened.users -= 1
        self._cache.release(opened.source.spaces, is_use=is_use)
        self._evictor.poke()
        if not opened.users and not opened.is_kept:
            self._close(opened)

    def _close(self, opened: OpenedImage) -> None:
        self._fetcher.remove_source(opened.source)
        if opened.layout is not None:
            self._fetcher.prefetcher.remove_layout(opened.layout)
        if self._opened.pop((opened.image.digest, opened.store.name), None) is not None:
            self._nursery.start_soon(opened.store.aclose)

    def forget(self, digest: Digest) -> bool:
        """Drop the metadata of an image that nobody uses; False if somebody does, or may be about to. No checkpoint."""
        opened = [one for one in self._opened.values() if one.image.digest == digest]
        if self._arriving or any(one.users for one in opened):
            return False
        for one in opened:
            self._close(one)
        self._cache.remove_image(digest)
        return True

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


def _read_chunk_map(image: CachedImage) -> ChunkMap:
    chunk_map = image.chunk_map()
    chunk_map.validate()
    return chunk_map


def _read_layout(image: CachedImage) -> ImageLayout:
    with open(image.bootstrap_path, "rb") as file:
        return image_layout(Bootstrap(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)))
