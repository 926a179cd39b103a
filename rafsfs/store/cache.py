"""The cache directory of a node: images, data spaces, chunk index, one lock. Layout: docs/cache.md.

Decided here: who may write (the holder of the lock), what is made of a directory found unsound (set aside, made anew), what may be
removed (what nobody uses). Blocking calls, thread-safe; the daemon runs the long ones in threads.

Removing against opening. Users are counted (`acquire`, `release`). A data space without users is doomed in one step (`doom`), from
then on nobody finds it; whoever holds `_mutex` next renames its directory, be it `remove_doomed` or an opener, who then makes it anew. A
directory that has been renamed is deleted at leisure, or when the next daemon starts. So an opener never gets a half-removed one, and
after a death at any point the directory is there whole or not at all. `acquire`, `release`, `doom` and `opened_space` of an open space
wait for no disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ..errors import CacheError, FormatError
from ..format.bootstrap import Bootstrap
from ..format.chunk_map import ChunkMap
from ..format.manifest import ImageManifest, parse_manifest
from ..format.space_table import SpaceTable
from ..types import Digest
from .adopt import adopt
from .chunk_index import ChunkIndex
from .data_space import DataSpace, create, open_space_directory, remove_tree, replace_file, write_error
from .eviction import Held
from .lock import lock_directory

_log = logging.getLogger(__name__)
_IMAGE_FILES: Final = ("manifest.json", "bootstrap.erofs", "chunkmap")


@dataclass(frozen=True, slots=True)
class CachedImage:
    """An image whose metadata are on this node, complete and verified when they were written."""

    digest: Digest
    directory: str
    view: str = ""
    """Path of a bootstrap of a part of it, to be used in place of its own; empty: all of it."""

    @property
    def bootstrap_path(self) -> str:
        """Path of the uncompressed bootstrap."""
        return self.view or os.path.join(self.directory, "bootstrap.erofs")

    def manifest(self) -> ImageManifest:
        """Read the manifest."""
        return parse_manifest(Path(self.directory, "manifest.json").read_bytes())

    def bootstrap(self) -> Bootstrap:
        """Read the bootstrap into memory."""
        return Bootstrap(Path(self.bootstrap_path).read_bytes())

    def chunk_map(self) -> ChunkMap:
        """Read the chunk map into memory."""
        return ChunkMap(Path(self.directory, "chunkmap").read_bytes())

    def references(self) -> list[str]:
        """Return the references under which the image has come here."""
        try:
            found = json.loads(Path(self.directory, "references").read_bytes())
        except (OSError, ValueError):
            return []
        return [str(name) for name in found] if isinstance(found, list) else []

    @property
    def pinned(self) -> bool:
        """Whether its data are never evicted."""
        return os.path.exists(os.path.join(self.directory, "pinned"))


@dataclass(slots=True)
class SpaceSummary:
    """What `rafs cache ls` says of a data space."""

    space_id: bytes
    size: int
    chunks: int
    present_chunks: int
    present_bytes: int
    last_used: float
    images: list[str] = field(default_factory=list)


class Cache:
    """An open cache directory."""

    def __init__(self, path: str, lock_fd: int, index: ChunkIndex | None) -> None:
        self.path = path
        self._lock_fd = lock_fd
        self._references = threading.Lock()
        self._index = index
        self._spaces: dict[bytes, DataSpace] = {}
        self._mutex = threading.Lock()
        self._uses: Counter[bytes] = Counter()
        self._doomed: set[bytes] = set()
        self._uses_lock = threading.Lock()
        """Guards the two above; taken inside `_mutex`, never the other way round."""
        self._leftovers: list[str] = []
        """Directories that have been renamed away and wait to be deleted."""
        self._resting: dict[bytes, Held] = {}
        """What was found of data spaces that are not open: nobody changes them."""
        self._spaces_of: dict[Digest, tuple[bytes, ...]] = {}
        self.lend: Callable[[bytes], int | None] = lambda space_id: None
        """Returns a descriptor of a data file that somebody keeps open, to be used in place of opening it anew. Called in threads."""

    @classmethod
    def open(cls, path: str, *, exclusive: bool = True) -> Cache:
        """Open a cache directory, made if it is not there. Raises CacheBusyError if another daemon holds it.

        With `exclusive` false nothing is locked, written or recovered: for looking on while no daemon runs.
        """
        path = os.path.abspath(path)
        try:
            for name in ("", "images", "spaces", "mounts"):
                os.makedirs(os.path.join(path, name), mode=0o700, exist_ok=True)
        except OSError as error:
            raise CacheError(f"cache directory {path}: {error.strerror}") from error
        if not exclusive:
            return cls(path, -1, None)
        try:
            lock_fd = lock_directory(path)
        except OSError as error:
            raise CacheError(f"cache directory {path}: {error.strerror}") from error
        try:
            for part in ("spaces", "images"):
                for name in os.listdir(os.path.join(path, part)):
                    if ".new-" in name:
                        shutil.rmtree(os.path.join(path, part, name), ignore_errors=True)
            return cls(path, lock_fd, ChunkIndex(os.path.join(path, "index")))
        except OSError as error:
            os.close(lock_fd)
            raise write_error(error, path) from error
        except BaseException:
            os.close(lock_fd)
            raise

    @property
    def index(self) -> ChunkIndex:
        """The chunk index; only the lock's holder has one."""
        if self._index is None:
            raise CacheError(f"cache directory {self.path} is open for looking only")
        return self._index

    def add_image(
        self, manifest_bytes: bytes, bootstrap_bytes: bytes, chunk_map_bytes: bytes, reference: str = ""
    ) -> CachedImage:
        """Keep the metadata of an image; return it. What is there already stays."""
        digest = Digest.of(manifest_bytes)
        directory = self._image_directory(digest)
        if not os.path.isdir(directory):
            # Of its own thread: several mounts of a new image may arrive here at once.
            temporary = f"{directory}.new-{os.getpid()}-{threading.get_ident()}"
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                os.makedirs(temporary, mode=0o700)
                for name, data in zip(_IMAGE_FILES, (manifest_bytes, bootstrap_bytes, chunk_map_bytes), strict=True):
                    _write_synced(os.path.join(temporary, name), data)
                os.rename(temporary, directory)
            except OSError as error:
                shutil.rmtree(temporary, ignore_errors=True)
                if error.errno not in {errno.EEXIST, errno.ENOTEMPTY} or not os.path.isdir(directory):
                    raise write_error(error, directory) from error
        image = CachedImage(digest, directory)
        if reference:
            self.note_reference(image, reference)
        return image

    def note_reference(self, image: CachedImage, reference: str) -> None:
        """Remember that `reference` named this image just now, for mounts while the registry is away."""
        with self._references:
            others = [name for name in image.references() if name != reference]
            replace_file(os.path.join(image.directory, "references"), json.dumps([reference, *others][:64]).encode())

    def image(self, digest: Digest) -> CachedImage | None:
        """Return a cached image; None if it is not here or its manifest is not what its name says."""
        directory = self._image_directory(digest)
        try:
            manifest = Path(directory, "manifest.json").read_bytes()
        except OSError:
            return None
        if Digest.of(manifest) != digest or not all(os.path.isfile(os.path.join(directory, n)) for n in _IMAGE_FILES):
            _log.warning("cached image %s is damaged and is left aside", digest)
            shutil.rmtree(directory, ignore_errors=True)
            return None
        return CachedImage(digest, directory)

    def images(self) -> list[CachedImage]:
        """Return all cached images."""
        found = []
        for name in sorted(os.listdir(os.path.join(self.path, "images"))):
            with contextlib.suppress(FormatError):
                image = self.image(Digest(f"sha256:{name}"))
                if image:
                    found.append(image)
        return found

    def find_by_reference(self, reference: str) -> CachedImage | None:
        """Return the image that last came under this reference, for mounting while the registry is away."""
        found = [image for image in self.images() if reference in image.references()]
        return max(found, key=lambda image: os.path.getmtime(os.path.join(image.directory, "references")), default=None)

    def space_directory(self, space_id: bytes) -> str:
        """Return where a data space is or would be."""
        return os.path.join(self.path, "spaces", space_id.hex())

    def open_space(self, table: SpaceTable) -> DataSpace:
        """Return the data space of this content table, created or reopened; one object per space."""
        with self._mutex:
            self._detach_doomed(table.space_id)
            space = self._spaces.get(table.space_id)
            if space is None:
                space = self._open_or_create(table)
                self._spaces[space.space_id] = space
                self._resting.pop(space.space_id, None)
            return space

    def adopt_space(self, table: SpaceTable, data_path: str) -> DataSpace:
        """Return the data space of this content table, all of it present: the bytes are in `data_path`, a file of this file system that the
        caller has just hashed against the table; it is gone afterwards. Blocking. Raises CacheError.
        """
        with self._mutex:
            space = self._spaces.get(table.space_id)
            if space is None and not os.path.isdir(self.space_directory(table.space_id)):
                adopt(self.space_directory(table.space_id), table, data_path)
        space = self.open_space(table)
        if os.path.exists(data_path):
            with open(data_path, "rb") as file:  # it was here, or a part of it
                for index in space.missing(range(table.count)):
                    offset, length = table.extent(index)
                    space.store(index, os.pread(file.fileno(), length, offset))
            os.unlink(data_path)
        return space

    def opened_space(self, space_id: bytes) -> DataSpace | None:
        """Return a data space if it is open, or can be opened as it is on disk; None otherwise. Blocking if it is not open."""
        space = self._spaces.get(space_id)
        if space_id in self._doomed:
            return None
        if space is not None:
            return space
        with self._mutex:
            if space_id in self._doomed:
                return None
            space = self._spaces.get(space_id)
            if space is None and os.path.isdir(self.space_directory(space_id)):
                with contextlib.suppress(FormatError):
                    space = self._reopen(self.space_directory(space_id))
                    self._spaces[space_id] = space
                    self._resting.pop(space_id, None)
            return space

    # ---- who uses what -------------------------------------------------------------------------------------------

    def acquire(self, space_ids: Iterable[bytes]) -> None:
        """Keep data spaces from being removed until `release`; they need not be there yet. Counted."""
        with self._uses_lock:
            self._uses.update(iter(space_ids))  # an iterator: of a mapping, `update` would add the values

    def release(self, space_ids: Iterable[bytes], *, is_use: bool = True) -> None:
        """Take one use off each; it counts as used now, unless `is_use` is false: verifying, or opening to give to others, is no use."""
        with self._uses_lock:
            for space_id in space_ids:
                self._uses[space_id] -= 1
                if self._uses[space_id] <= 0:
                    del self._uses[space_id]
                space = self._spaces.get(space_id)
                if space is not None and is_use:
                    space.touch()

    def used_spaces(self) -> set[bytes]:
        """Return the ids of the data spaces in use."""
        with self._uses_lock:
            return set(self._uses)

    def spaces_of(self, image: CachedImage) -> tuple[bytes, ...]:
        """Return the ids of the data spaces of an image, those of bases included. Raises FormatError."""
        found = self._spaces_of.get(image.digest)
        if found is None:
            chunk_map = image.chunk_map()
            ids = (chunk_map.table(space.index).space_id for space in chunk_map.all_spaces)
            found = self._spaces_of[image.digest] = tuple(dict.fromkeys(ids))
        return found

    def set_pinned(self, image: CachedImage, *, pinned: bool) -> None:
        """Say whether the data of an image may be evicted. It lasts."""
        path = os.path.join(image.directory, "pinned")
        if pinned:
            replace_file(path, b"")
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def held(self) -> list[Held]:
        """Return what is held on this node, and what of it may go. Blocking; reads presence maps of what is not open, once each."""
        pinned: set[bytes] = set()
        for image in self.images():
            if image.pinned:
                with contextlib.suppress(FormatError, OSError):
                    pinned.update(self.spaces_of(image))
        used = self.used_spaces()
        found = []
        for name in os.listdir(os.path.join(self.path, "spaces")):
            held = self._held(name)
            if held is not None:
                space_id = held.space_id
                found.append(
                    Held(space_id, held.held_bytes, held.last_used, in_use=space_id in used, pinned=space_id in pinned)
                )
        return found

    def _held(self, name: str) -> Held | None:
        try:
            space_id = bytes.fromhex(name)
        except ValueError:
            return None
        space = self._spaces.get(space_id)
        if space_id in self._doomed:
            return None
        if space is not None:
            return Held(space_id, space.present_bytes, space.last_used)
        resting = self._resting.get(space_id)
        if resting is None:
            summary = _summarise(os.path.join(self.path, "spaces", name))
            if summary is None:
                return None
            resting = self._resting[space_id] = Held(space_id, summary.present_bytes, summary.last_used)
        return resting

    def spaces(self) -> list[SpaceSummary]:
        """Return a summary of every data space on disk. Reads presence maps only."""
        users: dict[bytes, list[str]] = {}
        for image in self.images():
            with contextlib.suppress(FormatError, OSError):
                for space_id in self.spaces_of(image):
                    users.setdefault(space_id, []).append(str(image.digest))
        found = []
        for name in sorted(os.listdir(os.path.join(self.path, "spaces"))):
            summary = _summarise(os.path.join(self.path, "spaces", name))
            if summary:
                summary.images = users.get(summary.space_id, [])
                space = self._spaces.get(summary.space_id)
                if space is not None:
                    summary.last_used = space.last_used
                found.append(summary)
        return found

    def sync(self) -> None:
        """Sync every dirty data space and enter what became durable in the index. Blocking."""
        for space in list(self._spaces.values()):
            if space.dirty:
                try:
                    durable = space.sync()
                except CacheError:
                    if self._spaces.get(space.space_id) is space:
                        raise
                    continue  # it has just been removed
                self.index.put_many((space.table.digest(i), space.space_id, i) for i in durable)

    def emptied_images(self, gone: set[bytes]) -> list[Digest]:
        """Return the images that had data spaces among `gone` and have none any more, but for those pinned. Blocking."""
        found = []
        for image in self.images():
            with contextlib.suppress(FormatError, OSError):
                ids = self.spaces_of(image)
                is_empty = not any(os.path.isdir(self.space_directory(space_id)) for space_id in ids)
                if is_empty and not image.pinned and not gone.isdisjoint(ids):
                    found.append(image.digest)
        return found

    def note_use(self) -> None:
        """Write down when data spaces were last used, those in use being used now. Blocking."""
        used = self.used_spaces()
        for space in list(self._spaces.values()):
            if space.space_id in used:
                space.touch()
            if space.has_news_of_use:
                with contextlib.suppress(CacheError):
                    space.write_record(clean=False)

    def remove_image(self, digest: Digest) -> None:
        """Forget the metadata of an image. The caller has made sure that no mount uses it. Quick; deleted by `tidy`."""
        self._spaces_of.pop(digest, None)
        self._put_away(self._image_directory(digest))

    def doom(self, space_id: bytes) -> bool:
        """Take a data space out of reach if nobody uses it; False if somebody does. To be followed by `remove_doomed`."""
        with self._uses_lock:
            if self._uses[space_id] > 0:
                return False
            self._doomed.add(space_id)
            return True

    def remove_doomed(self, space_id: bytes) -> int:
        """Delete a data space that has been doomed and return the bytes that were present. Blocking."""
        with self._mutex:
            freed = self._detach_doomed(space_id)
        self.tidy()
        return freed

    def remove_space(self, space_id: bytes) -> int:
        """Delete a data space and return the bytes that were present, 0 if somebody uses it. Blocking."""
        return self.remove_doomed(space_id) if self.doom(space_id) else 0

    def _detach_doomed(self, space_id: bytes) -> int:
        """Rename the directory of a doomed data space away and close it. `_mutex` is held."""
        if space_id not in self._doomed:
            return 0
        space = self._spaces.pop(space_id, None)
        held = self._resting.pop(space_id, None)
        directory = self.space_directory(space_id)
        freed = 0
        if space is not None:
            freed = space.present_bytes
            space.close(clean=False)
        elif held is not None:
            freed = held.held_bytes
        elif (summary := _summarise(directory)) is not None:
            freed = summary.present_bytes
        self._put_away(directory)
        with self._uses_lock:
            self._doomed.discard(space_id)
        return freed

    def _put_away(self, directory: str) -> None:
        aside = f"{directory}.new-removed-{os.urandom(6).hex()}"
        try:
            os.rename(directory, aside)
        except FileNotFoundError:
            return
        except OSError as error:
            raise write_error(error, directory) from error
        self._leftovers.append(aside)

    def tidy(self) -> None:
        """Delete what has been renamed away, and its entries in the index. Blocking."""
        while self._leftovers:
            try:
                aside = self._leftovers.pop()
            except IndexError:  # another thread has taken it
                return
            self._forget_chunks(aside)
            remove_tree(aside)

    def _forget_chunks(self, aside: str) -> None:
        """Take the chunks of a removed data space out of the index. They would be harmless, but cost a look each."""
        name = os.path.basename(aside).partition(".")[0]
        try:
            size = int(json.loads(Path(aside, "record").read_bytes())["size"])
            table = SpaceTable(Path(aside, "chunks").read_bytes(), size)
            digests = [table.digest(index) for index in range(table.count)]
        except (OSError, ValueError, KeyError, TypeError, FormatError):
            return
        if self._index is not None:
            self._index.remove_space(bytes.fromhex(name), digests)

    def close(self, *, clean: bool = True) -> None:
        """Sync, close and give the lock back."""
        if clean and self._index is not None:
            with contextlib.suppress(CacheError):
                self.sync()
        for space in self._spaces.values():
            space.close(clean=clean)
        self._spaces.clear()
        if self._index is not None:
            self._index.close()
            self._index = None
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _image_directory(self, digest: Digest) -> str:
        return os.path.join(self.path, "images", digest.hex)

    def _open_or_create(self, table: SpaceTable) -> DataSpace:
        directory = self.space_directory(table.space_id)
        if os.path.isdir(directory):
            try:
                return self._reopen(directory)
            except FormatError as error:
                aside = f"{directory}.new-damaged-{int(time.time())}"
                _log.warning("data space set aside and made anew: %s", error)
                os.rename(directory, aside)
                shutil.rmtree(aside, ignore_errors=True)
        create(directory, table)
        return self._reopen(directory)

    def _reopen(self, directory: str) -> DataSpace:
        space, trusted = open_space_directory(directory, self.lend(bytes.fromhex(os.path.basename(directory))))
        if self._index is not None:
            if not trusted:
                space.recover()
            space.write_record(clean=False)
        return space


def _summarise(directory: str) -> SpaceSummary | None:
    try:
        record = json.loads(Path(directory, "record").read_bytes())
        present = Path(directory, "present").read_bytes()
        table = SpaceTable(Path(directory, "chunks").read_bytes(), int(record["size"]))
        if table.count != len(present):
            return None
        present_bytes = sum(table.extent(i)[1] for i in _marked(present))
        return SpaceSummary(
            space_id=bytes.fromhex(os.path.basename(directory)),
            size=table.size,
            chunks=table.count,
            present_chunks=len(present) - present.count(0),
            present_bytes=present_bytes,
            last_used=float(record.get("last_used", 0)),
        )
    except (OSError, ValueError, KeyError, TypeError, FormatError):
        return None


def _marked(present: bytes) -> Iterator[int]:
    return (index for index, mark in enumerate(present) if mark)


def _write_synced(path: str, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
