"""Pre-content events of fanotify: the group, marks, events and answers (fanotify.h, Linux 6.14), and the journal of open events.

Decided here: bytes. Who answers what is decided by the guard. Rules that the order of calls must keep are in docs/modes.md: a mark before
the mount, the journal before anything else, a successor before its first read.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ..errors import FormatError

_CLOEXEC, _NONBLOCK, _CLASS_PRE_CONTENT = 0x1, 0x2, 0x8
_UNLIMITED_QUEUE, _UNLIMITED_MARKS = 0x10, 0x20
_MARK_ADD, _MARK_REMOVE = 0x1, 0x2
_PRE_ACCESS: Final = 0x0010_0000
_ALLOW: Final = 1
_DENY: Final = 2
_INFO_RANGE: Final = 6
_VERSION: Final = 3

_EVENT: Final = struct.Struct("<IBBHQii")
_INFO: Final = struct.Struct("<BBHIQQ")
_ANSWER: Final = struct.Struct("<iI")
assert (_EVENT.size, _INFO.size, _ANSWER.size) == (24, 24, 8)

EVENTS: Final = 64
"""Events of one read: each opens a descriptor."""
READ_BUFFER: Final = EVENTS * 64
_SLOT: Final = struct.Struct("<IIIIQQ")
"""One open event in the journal: 1 if it is open, data space, pid, unused, offset, length."""
Noted = tuple[int, int, int, int]
"""Data space, pid, offset, length."""
JOURNAL_SLOTS: Final = 4096
"""Descriptor numbers that events may get: the guard's RLIMIT_NOFILE. Reads that wait at once are fewer than threads that read."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Event:
    """A process is about to read [offset, offset+length) of a marked file."""

    descriptor: int
    """Open on the file; its number names the event in the answer. Negative: the kernel has denied the event itself."""
    pid: int
    offset: int
    length: int
    sound: bool
    """Whether it is what we know: a pre-access event of the known version with a range."""


def open_group() -> int:
    """Return a new group of class pre-content. Raises OSError (EPERM, EINVAL before Linux 6.14)."""
    flags = _CLASS_PRE_CONTENT | _CLOEXEC | _NONBLOCK | _UNLIMITED_QUEUE | _UNLIMITED_MARKS
    group = _libc.fanotify_init(ctypes.c_uint(flags), ctypes.c_uint(os.O_RDONLY | os.O_LARGEFILE | os.O_CLOEXEC))
    if group < 0:
        raise _error()
    return int(group)


def add_mark(group: int, file: int) -> None:
    """Mark the file that descriptor `file` is open on. Raises OSError (EOPNOTSUPP on tmpfs and overlayfs)."""
    _mark(group, file, _MARK_ADD)


def remove_mark(group: int, file: int) -> None:
    """Take a mark away; one that is not there is fine. Raises OSError."""
    try:
        _mark(group, file, _MARK_REMOVE)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def _mark(group: int, file: int, what: int) -> None:
    path = f"/proc/self/fd/{file}".encode()
    if _libc.fanotify_mark(
        ctypes.c_int(group), ctypes.c_uint(what), ctypes.c_uint64(_PRE_ACCESS), ctypes.c_int(-100), path
    ):
        raise _error()


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


def parse_events(data: memoryview) -> Iterator[Event]:
    """Yield the events of one read. Raises FormatError if their lengths do not fit the bytes."""
    at = 0
    while at < len(data):
        if len(data) - at < _EVENT.size:
            raise FormatError(f"fanotify event cut off after {len(data) - at} bytes")
        length, version, _, header, mask, descriptor, pid = _EVENT.unpack_from(data, at)
        if not _EVENT.size <= header <= length <= len(data) - at:
            raise FormatError(f"fanotify event of {length} bytes with a header of {header}, {len(data) - at} are left")
        found = _range(data[at + header : at + length])
        sound = version == _VERSION and bool(mask & _PRE_ACCESS) and found is not None
        offset, count = found or (0, 0)
        yield Event(descriptor, pid, offset, count, sound)
        at += length


def _range(info: memoryview) -> tuple[int, int] | None:
    at = 0
    while len(info) - at >= 4:
        kind, _, length = struct.unpack_from("<BBH", info, at)
        if length < 4 or length > len(info) - at:
            return None
        if kind == _INFO_RANGE and length >= _INFO.size:
            offset, count = _INFO.unpack_from(info, at)[4:]
            return offset, count
        at += length
    return None


def allow(group: int, number: int) -> bool:
    """Let the event with descriptor `number` go on; return False if the group has none. Raises OSError."""
    return _answer(group, number, _ALLOW)


def deny(group: int, number: int) -> bool:
    """End the event with EIO for the reader; return False if the group has none. Raises OSError."""
    return _answer(group, number, _DENY | errno.EIO << 24)


def _answer(group: int, number: int, response: int) -> bool:
    try:
        os.write(group, _ANSWER.pack(number, response))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


class Journal:
    """The events that were read and not answered, by descriptor number, in memory that outlives the guard."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self._lock = -1
        os.ftruncate(memory, JOURNAL_SLOTS * _SLOT.size)
        self._map = mmap.mmap(memory, JOURNAL_SLOTS * _SLOT.size)

    def lock(self) -> None:
        """Wait until no other process works with this journal."""
        # Through a file description of its own: a lock of the inherited one would be everybody's.
        self._lock = os.open(f"/proc/self/fd/{self.memory}", os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def note(self, number: int, space: int, pid: int, offset: int, length: int) -> None:
        """Write an event down."""
        at = number * _SLOT.size
        _SLOT.pack_into(self._map, at, 0, space, pid, 0, offset, length)
        self._map[at] = 1  # last: a slot is live when all of it is written

    def clear(self, number: int) -> None:
        """Strike an event that was answered."""
        self._map[number * _SLOT.size] = 0

    def live(self) -> dict[int, Noted]:
        """Return by number what an earlier guard left unanswered."""
        found = {}
        for number in range(JOURNAL_SLOTS):
            alive, space, pid, _, offset, length = _SLOT.unpack_from(self._map, number * _SLOT.size)
            if alive:
                found[number] = (space, pid, offset, length)
        return found

    def close(self) -> None:
        """Let go of the memory."""
        self._map.close()
        for descriptor in (self.memory, self._lock):
            if descriptor >= 0:
                os.close(descriptor)


def make_journal() -> int:
    """Return a new memory for a journal."""
    return os.memfd_create("rafs-journal", os.MFD_CLOEXEC)
