"""A regular file of the source: what it was when it was scanned, and how it is opened and read later.

Decided here: what counts as change, and the words for it. Rule: bytes of a file are believed only if its signature was the scanned
one when it was opened and still is when it is closed; whoever reads a file goes through `OpenFiles`.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from rafsfs.errors import SourceError
from rafsfs.format.bootstrap_writer import Node

_LONG_PATH: Final = 4000
"""Bytes of a path that one system call takes with some to spare (PATH_MAX is 4096); a longer one is opened in steps."""
_MOST_OPEN: Final = 16
"""Files open per reader: four data spaces take turns, and many readers together stay far below the usual limit of 1024."""
READ_AHEAD: Final = 16 << 20
"""Bytes asked of the disk when a file is opened: a batch and the one after it. Readers open anew for each batch, so
the kernel's own readahead begins small every time."""
_WORTH_ASKING: Final = 256 << 10


@dataclass(frozen=True, slots=True)
class Signature:
    """What tells that a file is still the one that was scanned."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


def signature_of(status: os.stat_result) -> Signature:
    """Return the signature of a file's status."""
    return Signature(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(slots=True, eq=False)
class SourceFile:
    """A regular file whose content goes to a data space."""

    path: bytes
    """Absolute or relative to the working directory, as it is opened."""
    node: Node
    signature: Signature
    ranges: list[tuple[int, int]]
    """(offset, length) of what is stored, sorted; the rest is holes."""

    @property
    def size(self) -> int:
        """Bytes of the file, holes included."""
        return self.signature.size


class OpenFiles:
    """Files of a list, opened as they are read and checked to be what was scanned, before and after. One thread.

    Leaving the block checks and closes all of them. Raises SourceError for a file that changed, vanished or fails.
    """

    def __init__(self, files: Sequence[SourceFile], *, ahead: int = READ_AHEAD) -> None:
        self._files = files
        self._ahead = ahead
        self._open: OrderedDict[int, int] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while self._open and error is None:
                self._check_oldest()
        finally:
            while self._open:
                os.close(self._open.popitem()[1])

    def read_into(self, number: int, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset` of file `number`."""
        file = self._files[number]
        descriptor = self._descriptor(number, offset)
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise read_error(file.path, error) from error
            if not got:
                raise changed(file.path)
            done += got

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` of file `number`."""
        data = bytearray(0)
        descriptor = self._descriptor(number, offset)
        while True:
            try:
                got = os.pread(descriptor, length - len(data), offset + len(data))
            except OSError as error:
                raise read_error(self._files[number].path, error) from error
            if len(got) == length:  # as good as always
                return got
            data += got
            if len(data) == length:
                return bytes(data)
            if not got:
                raise changed(self._files[number].path)

    def _descriptor(self, number: int, offset: int) -> int:
        found = self._open.get(number)
        if found is not None:
            self._open.move_to_end(number)
            return found
        while len(self._open) >= _MOST_OPEN:
            self._check_oldest()
        file = self._files[number]
        try:
            descriptor = open_path(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise read_error(file.path, error) from error
        self._open[number] = descriptor
        self._check(descriptor, file)
        if self._ahead and file.size >= _WORTH_ASKING:
            os.posix_fadvise(descriptor, offset, self._ahead, os.POSIX_FADV_WILLNEED)
        return descriptor

    def _check_oldest(self) -> None:
        """Close the file that was used longest ago, after checking that nobody has written to it meanwhile."""
        number, descriptor = self._open.popitem(last=False)
        try:
            self._check(descriptor, self._files[number])
        finally:
            os.close(descriptor)

    def _check(self, descriptor: int, file: SourceFile) -> None:
        try:
            status = os.fstat(descriptor)
        except OSError as error:
            raise read_error(file.path, error) from error
        if signature_of(status) != file.signature:
            raise changed(file.path)


def open_path(path: bytes, flags: int) -> int:
    """Open a path of any length. Raises OSError. The caller closes the descriptor."""
    anchor: int | None = None
    try:
        while len(path) > _LONG_PATH:
            cut = path.rfind(b"/", 1, _LONG_PATH)
            if cut < 0:
                break
            step = os.open(path[:cut], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=anchor)
            if anchor is not None:
                os.close(anchor)
            anchor = step
            path = path[cut + 1 :]
        return os.open(path, flags | os.O_CLOEXEC, dir_fd=anchor)
    finally:
        if anchor is not None:
            os.close(anchor)


def changed(path: bytes) -> SourceError:
    """Return the error for a file that is not what it was when it was scanned."""
    return SourceError(f"{show(path)} changed while it was read; build again when nothing writes to it")


def read_error(path: bytes, error: OSError) -> SourceError:
    """Return the error for a path of the source that the system refuses."""
    if error.errno in {errno.ENOENT, errno.ELOOP, errno.ENOTDIR}:
        return SourceError(f"{show(path)} vanished while it was read; build again when nothing changes the source")
    if error.errno in {errno.EACCES, errno.EPERM}:
        return SourceError(
            f"{show(path)} cannot be read: {error.strerror}; run as a user who may, or leave it out with --exclude"
        )
    return SourceError(f"{show(path)} cannot be read: {error.strerror}; check the disk, or leave it out with --exclude")


def show(path: bytes) -> str:
    """Return a path for a message: what is not UTF-8 escaped, a very long one with its middle left out."""
    text = path.decode("utf-8", "backslashreplace")
    return text if len(text) <= 1000 else f"{text[:400]}[...]{text[-400:]}"
