"""A data space as a FUSE worker sees it: read-only, by file, with no library but the standard one and blake3.

Rule: reads go through pread, never through a mapping of the data file, since an I/O error under a mapping is SIGBUS and would kill the
worker; the presence map alone is mapped. Bytes are read only after the map says that their chunks are present.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ..errors import CacheError, FormatError
from ..format.space_table import SpaceTable
from ..format.superblock import Superblock

LOOK_AHEAD: Final = 136 << 20
"""Bytes behind a read of which a chunk must be missing for the daemon to be told of a hit: more than its largest window."""
HINT_EVERY: Final = 4 << 20
"""Bytes that a reader may come further before the daemon is told again: a call costs a tenth of what serving a chunk of 1 MiB does."""


class SpaceView:
    """An open view. Single-threaded. `data_fd`: the data file, open; taken over. -1: it is opened here."""

    def __init__(self, directory: str, data_fd: int = -1) -> None:
        try:
            record = json.loads(Path(directory, "record").read_bytes())
            with open(os.path.join(directory, "chunks"), "rb") as file:
                count = os.fstat(file.fileno()).st_size
                self._chunks = mmap.mmap(file.fileno(), count, prot=mmap.PROT_READ) if count else None
            chunks = memoryview(self._chunks) if self._chunks is not None else memoryview(b"")
            self.table = SpaceTable(chunks, int(record["size"]))
            self._data = data_fd
            if data_fd < 0:
                self._data = os.open(os.path.join(directory, "data"), os.O_RDONLY | os.O_CLOEXEC)
            with open(os.path.join(directory, "present"), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                self._present = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) if size else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"data space {directory} cannot be opened: {error}") from error
        if size != self.table.count:
            raise FormatError(f"{directory}/present is {size} bytes, expected {self.table.count}")
        self.space_id = bytes.fromhex(os.path.basename(directory))
        self._touched = bytearray(self.table.count)

    @property
    def data_inode(self) -> tuple[int, int]:
        """Device and inode number of the data file that is read."""
        found = os.fstat(self._data)
        return found.st_dev, found.st_ino

    def is_present(self, first: int, stop: int) -> bool:
        """Tell whether chunks [first, stop) are all present now: the daemon unmarks one that it finds damaged."""
        return self._present is None or first >= stop or self._present.find(b"\0", first, stop) < 0

    def lacks_ahead(self, offset: int, stop: int) -> bool:
        """Tell whether a chunk of the next bytes that a reader at `offset` would come to, before chunk `stop`, is missing."""
        ahead = self.table.covering(offset, min(LOOK_AHEAD, self.table.size - offset))
        return not self.is_present(ahead.start, min(stop, ahead.stop))

    def touch(self, first: int, stop: int) -> bool:
        """Note that chunks [first, stop) are read; tell whether one of them is for the first time."""
        if self._touched.find(0, first, stop) < 0:
            return False
        self._touched[first:stop] = b"\1" * (stop - first)
        return True

    def covering(self, offset: int, length: int) -> range:
        """Return the chunks that overlap [offset, offset+length)."""
        return self.table.covering(offset, length)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset` of the space. Raises CacheError. The caller has checked presence."""
        try:
            got = os.preadv(self._data, [buffer], offset)
        except OSError as error:
            raise CacheError(f"cached data: {error.strerror}") from error
        if got != len(buffer):
            raise CacheError(f"cached data ends at byte {offset + got}, expected {offset + len(buffer)}")

    def close(self) -> None:
        """Close files and mappings."""
        os.close(self._data)
        if self._present is not None:
            self._present.close()


def open_views(cache_dir: str, digest: str, files: Mapping[str, int] | None = None) -> list[SpaceView]:
    """Open the data spaces of a cached image, in the order of its bootstrap's device slots. Raises CacheError, FormatError.

    `files`: data files that are open already, by id in hex; they are taken over.
    """
    path = os.path.join(cache_dir, "images", digest.removeprefix("sha256:"), "bootstrap.erofs")
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as whole,
            memoryview(whole) as view,
        ):
            slots = Superblock.unpack_from(view).read_slots(view)
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} cannot be opened: {error}") from error
    names = [slot.space_id.hex() for slot in slots]
    return [SpaceView(os.path.join(cache_dir, "spaces", name), (files or {}).get(name, -1)) for name in names]
