"""One data space on this node: a sparse file, a presence map, and the content table they are checked against.

Decided here: the order of writes, verify digest, pwrite, mark 1; and what survives which death. A chunk marked 1 was verified
and written by a process; a chunk marked 2 is on the disk as well. After an unclean stop every 1 is hashed again before it counts.
Directory: chunks (content table), data, present (one byte per chunk), record (JSON). Specification: docs/cache.md.

Concurrency: used from several threads of ONE process (the daemon). `store` of different chunks may run at once: they touch
disjoint ranges, and a mark is one byte. `store` of the same chunk twice at once is harmless (equal bytes). `sync` holds a lock against
itself. `close` may come from another thread at any time, since a data space may be evicted: the file stays open until the last read or
write of it has ended, and what comes later is refused, so the number of a closed descriptor is never used. FUSE workers map `present`
read-only and see a mark only after its bytes: both are in the page cache of one kernel.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import mmap
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from ..errors import CacheError, CacheFullError, FormatError, IntegrityError
from ..format.codec import chunk_digest
from ..format.space_table import SpaceTable
from ..types import BLOCK_SIZE, align_up
from .boot import boot_id

MISSING: Final = 0
PRESENT: Final = 1
DURABLE: Final = 2

RECORD_VERSION: Final = 1
_log = logging.getLogger(__name__)


class DataSpace:
    """An open data space. Made by `create` or `open_space_directory`; closed by its cache."""

    def __init__(
        self, directory: str, table: SpaceTable, data_fd: int, present: mmap.mmap | None, last_used: float = 0.0
    ) -> None:
        self.path = directory
        self.table = table
        self.space_id = table.space_id
        self.size = table.size
        self._data_fd = data_fd
        self._present = present
        self.last_used = last_used
        """Seconds since 1970; written down now and then."""
        self._noted_use = int(last_used)
        self._users = 0
        self._closed = False
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._dirty: set[int] = set()
        marks = present[:] if present is not None else b""
        self._present_chunks = len(marks) - marks.count(MISSING)
        self._present_bytes = sum(table.extent(i)[1] for i in range(table.count) if marks[i])
        self._dirty.update(i for i in range(table.count) if marks[i] == PRESENT)

    @property
    def present_chunks(self) -> int:
        """Chunks present."""
        return self._present_chunks

    @property
    def present_bytes(self) -> int:
        """Bytes of the chunks present."""
        return self._present_bytes

    @property
    def complete(self) -> bool:
        """Whether every chunk is present."""
        return self._present_chunks == self.table.count

    @property
    def settled(self) -> bool:
        """Whether every chunk is present and on the disk: no power loss, no failed write-back can take one away."""
        with self._lock:
            return self.complete and not self._dirty

    @property
    def data_fd(self) -> int:
        """The descriptor of the data file, lent: it names the very inode that the presence map speaks of. -1 when closed."""
        return self._data_fd

    @property
    def dirty(self) -> bool:
        """Whether a sync would do anything."""
        return bool(self._dirty)

    def is_present(self, index: int) -> bool:
        """Tell whether chunk `index` can be read."""
        present = self._present
        return present is not None and present[index] != MISSING

    def touch(self) -> None:
        """Note that it is used now."""
        self.last_used = time.time()

    @property
    def has_news_of_use(self) -> bool:
        """Whether it was used since that was last written down."""
        return int(self.last_used) > self._noted_use

    @contextlib.contextmanager
    def _file(self) -> Iterator[int]:
        """Hold the data file open. Raises CacheError if the data space has been closed."""
        with self._lock:
            if self._closed:
                raise CacheError(f"data space {self.space_id.hex()[:16]} has been removed from the cache")
            self._users += 1
        try:
            yield self._data_fd
        finally:
            with self._lock:
                self._users -= 1
                self._close_file()

    def _close_file(self) -> None:
        """Close the file if nobody uses it any more. The lock is held."""
        if self._closed and not self._users and self._data_fd >= 0:
            os.close(self._data_fd)
            self._data_fd = -1

    def duplicate(self) -> int:
        """Return a descriptor of the data file, the caller's own: it outlives the data space. Raises CacheError."""
        with self._file() as data_fd:
            return os.dup(data_fd)

    def missing(self, indexes: Iterable[int]) -> list[int]:
        """Return those of `indexes` that are not present, in their order."""
        present = self._present
        return [index for index in indexes if present is None or present[index] == MISSING]

    def store(self, index: int, data: memoryview | bytes | bytearray, *, verified: bool = False) -> None:
        """Write chunk `index` and mark it. `verified`: the caller has just checked these very bytes against the table.

        Raises IntegrityError (nothing is written), CacheFullError, CacheError. Blocking.
        """
        offset, length = self.table.extent(index)
        if len(data) != length:
            raise IntegrityError(f"chunk {index} is {len(data)} bytes, expected {length}")
        if not verified and chunk_digest(data) != self.table.digest(index):
            raise IntegrityError(f"chunk {index} of data space {self.space_id.hex()[:16]} does not match its digest")
        view = memoryview(data)
        done = 0
        with self._file() as data_fd:
            try:
                while done < length:
                    done += os.pwrite(data_fd, view[done:], offset + done)
            except OSError as error:
                raise write_error(error, self.path) from error
            self._mark(index, length)

    def read(self, index: int) -> bytes:
        """Return the bytes of a chunk as they are on disk, not verified. Raises CacheError."""
        offset, length = self.table.extent(index)
        with self._file() as data_fd:
            try:
                data = os.pread(data_fd, length, offset)
            except OSError as error:
                raise CacheError(f"{self.path}/data: {error.strerror}") from error
        if len(data) != length:
            raise CacheError(f"{self.path}/data is {offset + len(data)} bytes, expected {self.size}")
        return data

    def verify(self, index: int) -> bool:
        """Hash chunk `index`; unmark it and return False if it is not what the table says. Blocking."""
        try:
            good = chunk_digest(self.read(index)) == self.table.digest(index)
        except CacheError as error:
            _log.warning("cannot read a cached chunk: %s", error)
            good = False
        if not good:
            self._unmark(index)
        return good

    def recover(self) -> int:
        """Hash every chunk marked since the last sync, unmark what does not match; return how many. Blocking."""
        bad = sum(not self.verify(index) for index in sorted(self._dirty))
        if bad:
            _log.warning("data space %s: %d chunks did not survive an unclean stop", self.space_id.hex()[:16], bad)
        return bad

    def sync(self) -> list[int]:
        """Bring data to the disk, then turn the marks set before into DURABLE; return those chunks. Blocking."""
        with self._sync_lock:
            with self._lock:
                batch = sorted(self._dirty)
            present = self._present
            if not batch or present is None:
                return []
            try:
                self._write_back(batch)
                for index in batch:
                    if present[index] == PRESENT:
                        present[index] = DURABLE
                present.flush()
            except OSError as error:
                raise write_error(error, self.path) from error
            with self._lock:
                self._dirty.difference_update(batch)
            return batch

    def _write_back(self, batch: list[int]) -> None:
        """Bring data to the disk. What a failed write-back was to bring is unmarked: the kernel says it once, and drops the pages."""
        with self._file() as data_fd:
            try:
                os.fdatasync(data_fd)
            except OSError:
                for index in batch:
                    self._unmark(index)
                raise

    def write_record(self, *, clean: bool) -> None:
        """Write the record file: whether the next opener may trust every mark."""
        noted = int(self.last_used)
        record = {
            "version": RECORD_VERSION,
            "size": self.size,
            "boot_id": boot_id(),
            "clean": clean,
            "last_used": noted,
        }
        replace_file(os.path.join(self.path, "record"), json.dumps(record, sort_keys=True).encode())
        self._noted_use = noted

    def close(self, *, clean: bool = True) -> None:
        """Sync and close. With `clean` false, nothing is synced: for tests of unclean stops."""
        if self._closed:
            return
        if clean:
            with contextlib.suppress(CacheError):
                self.sync()
                self.write_record(clean=True)
        with self._lock:
            self._closed = True
            self._present = None  # unmapped when the last thread that looks at it lets go
            self._close_file()

    def _mark(self, index: int, length: int) -> None:
        with self._lock:
            if self._present is not None and self._present[index] == MISSING:
                self._present[index] = PRESENT
                self._present_chunks += 1
                self._present_bytes += length
                self._dirty.add(index)

    def _unmark(self, index: int) -> None:
        with self._lock:
            if self._present is not None and self._present[index] != MISSING:
                self._present[index] = MISSING
                self._present_chunks -= 1
                self._present_bytes -= self.table.extent(index)[1]
            self._dirty.discard(index)


def create(directory: str, table: SpaceTable) -> None:
    """Make the directory of a data space: complete under a temporary name, then renamed. Raises CacheError."""
    temporary = f"{directory}.new-{os.getpid()}-{threading.get_ident()}"
    try:
        os.makedirs(temporary, mode=0o700)
        write_synced(os.path.join(temporary, "chunks"), bytes(table.buffer))
        for name, size in (("data", align_up(table.size, BLOCK_SIZE)), ("present", table.count)):
            descriptor = os.open(os.path.join(temporary, name), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.ftruncate(descriptor, size)
            finally:
                os.close(descriptor)
        write_new_record(temporary, table.size)
        try:
            os.rename(temporary, directory)
        except OSError as error:
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                raise
            remove_tree(temporary)
    except OSError as error:
        remove_tree(temporary)
        raise write_error(error, directory) from error


def write_new_record(directory: str, size: int) -> None:
    """Write the record of a new data space of `size` bytes."""
    record = {"version": RECORD_VERSION, "size": size, "boot_id": boot_id(), "clean": True}
    record["last_used"] = int(time.time())
    write_synced(os.path.join(directory, "record"), json.dumps(record).encode())


def open_space_directory(directory: str, lent: int | None = None) -> tuple[DataSpace, bool]:
    """Open a data space; return it and whether its marks can all be trusted (a clean stop on this boot).

    `lent`: a descriptor open for reading and writing, which is copied and used if it is on this very data file: where the file is guarded
    by pre-content events, one that was opened before the mark raises none. Raises FormatError if the directory is not a sound data space.
    """
    try:
        record = json.loads(Path(directory, "record").read_bytes())
        size, clean, boot = int(record["size"]), bool(record["clean"]), str(record["boot_id"])
        last_used = float(record.get("last_used", 0))
        if record["version"] != RECORD_VERSION:
            raise FormatError(f"{directory}/record has version {record['version']}, expected {RECORD_VERSION}")
        chunks = Path(directory, "chunks").read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{directory} is not a data space: {error}") from error
    table = SpaceTable(chunks, size)
    if table.space_id.hex() != os.path.basename(directory):
        raise FormatError(f"{directory}/chunks does not hash to the name of its directory")
    table.validate()
    try:
        data_fd = _open_data(os.path.join(directory, "data"), lent)
    except OSError as error:
        raise FormatError(f"{directory}/data: {error.strerror}") from error
    try:
        if os.fstat(data_fd).st_size != align_up(size, BLOCK_SIZE):
            raise FormatError(
                f"{directory}/data is {os.fstat(data_fd).st_size} bytes, expected {align_up(size, BLOCK_SIZE)}"
            )
        present = _map_present(directory, table.count)
    except BaseException:
        os.close(data_fd)
        raise
    return DataSpace(directory, table, data_fd, present, last_used), clean and boot == boot_id()


def _open_data(path: str, lent: int | None) -> int:
    if lent is not None:
        with contextlib.suppress(OSError):
            copy = os.dup(lent)  # looked at afterwards: its number may just have been closed and given to another file
            if os.path.samestat(os.fstat(copy), os.lstat(path)):
                return copy
            os.close(copy)
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)


def _map_present(directory: str, count: int) -> mmap.mmap | None:
    path = os.path.join(directory, "present")
    try:
        with open(path, "r+b") as file:
            if os.fstat(file.fileno()).st_size != count:
                raise FormatError(f"{path} is {os.fstat(file.fileno()).st_size} bytes, expected {count}")
            return mmap.mmap(file.fileno(), count) if count else None
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from error


def write_error(error: OSError, where: str) -> CacheError:
    """Return our error for a failed write into the cache."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return CacheFullError(f"{where}: no space left in the cache; free some with `rafs cache rm`")
    return CacheError(f"{where}: {error.strerror}")


def replace_file(path: str, data: bytes) -> None:
    """Replace a file's content in one step, 0600."""
    temporary = f"{path}.new-{os.urandom(6).hex()}"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.rename(temporary, path)
    except OSError as error:
        raise write_error(error, path) from error


def write_synced(path: str, data: bytes) -> None:
    """Write a new file, 0600, and bring it to the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def remove_tree(directory: str) -> None:
    """Remove a directory of plain files; what is gone already is fine."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, name))
        os.rmdir(directory)
