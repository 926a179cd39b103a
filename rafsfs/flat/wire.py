"""The FUSE protocol as far as a flat, read-only folder needs it: Linux fuse.h, protocol 7.31 and later. Pure.

Decided here: bytes of requests and replies. Sizes are checked at import; a request too short for its operation is a FormatError.
Constants carry the kernel's names without their prefix.
"""

from __future__ import annotations

import errno
import struct
from typing import Final

from ..errors import FormatError

LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE = 1, 2, 3, 14, 15, 17, 18
FLUSH, INIT, OPENDIR, RELEASEDIR, ACCESS, INTERRUPT, DESTROY, BATCH_FORGET = 25, 26, 27, 29, 34, 36, 38, 42

NO_REPLY: Final = frozenset({FORGET, BATCH_FORGET, INTERRUPT})
"""Requests that must not be answered (an INTERRUPT may be ignored: reads here end by themselves)."""

FOPEN_DIRECT_IO: Final = 1
RESENT: Final = 1 << 63
"""Bit of `unique` in a request that an earlier server has read already; the answer carries it too."""

ROOT: Final = 1
MAJOR: Final = 7
MINOR: Final = 31
"""The oldest minor that has all we use; we offer no more than we know."""
MAX_PAGES: Final = 256
"""Pages of one READ: 1 MiB, the kernel's own limit."""
MAX_WRITE: Final = 4096
"""Nothing is written; a small value lets the read buffer be small."""
REQUEST_BUFFER: Final = 64 << 10
"""Bytes; the kernel wants at least 8192 and max_write with its headers."""

_INIT_FLAGS: Final = (1 << 0) | (1 << 15) | (1 << 22)
"""ASYNC_READ, ASYNC_DIO, MAX_PAGES."""
_INIT_EXT: Final = 1 << 30
_HAS_RESEND: Final = 1 << 39
_FOR_EVER_S: Final = 86400

IN_HEADER: Final = struct.Struct("<IIQQIIIHH")
OUT_HEADER: Final = struct.Struct("<IiQ")
_INIT_IN: Final = struct.Struct("<IIII")
_INIT_OUT: Final = struct.Struct("<IIIIHHIIHHIIH11H")
_READ_IN: Final = struct.Struct("<QQIIQII")
_ATTR: Final = struct.Struct("<QQQQQQIIIIIIIIII")
_ENTRY_OUT: Final = struct.Struct("<QQQQII")
_ATTR_OUT: Final = struct.Struct("<QII")
_OPEN_OUT: Final = struct.Struct("<QII")
_STATFS_OUT: Final = struct.Struct("<QQQQQIIII24x")
assert (IN_HEADER.size, OUT_HEADER.size, _READ_IN.size) == (40, 16, 40)
assert (_INIT_OUT.size, _ATTR.size, _ENTRY_OUT.size, _STATFS_OUT.size) == (64, 88, 40, 80)

Request = tuple[int, int, int]
"""opcode, unique, nodeid."""


def parse(request: memoryview) -> Request:
    """Return opcode, unique and nodeid of a request. Raises FormatError if it is cut off."""
    if len(request) < IN_HEADER.size:
        raise FormatError(f"FUSE request of {len(request)} bytes, a header has {IN_HEADER.size}")
    length, opcode, unique, nodeid = IN_HEADER.unpack_from(request)[:4]
    if length != len(request):
        raise FormatError(f"FUSE request of {len(request)} bytes says that it has {length}")
    return opcode, unique, nodeid


def parse_thread(request: memoryview) -> int:
    """Return the thread that a request is for, 0 for one outside our PID namespace, of a request that `parse` took."""
    return int(IN_HEADER.unpack_from(request)[6])


def parse_read(request: memoryview) -> tuple[int, int]:
    """Return offset and size of a READ."""
    if len(request) < IN_HEADER.size + _READ_IN.size:
        raise FormatError(f"FUSE read request of {len(request)} bytes")
    _, offset, size = _READ_IN.unpack_from(request, IN_HEADER.size)[:3]
    return offset, min(size, MAX_PAGES * 4096)


def parse_name(request: memoryview) -> bytes:
    """Return the name of a LOOKUP."""
    return bytes(request[IN_HEADER.size :]).split(b"\0", 1)[0]


def parse_init(request: memoryview) -> tuple[int, int, int]:
    """Return major, minor and the largest read-ahead that the kernel offers."""
    if len(request) < IN_HEADER.size + _INIT_IN.size:
        raise FormatError(f"FUSE init request of {len(request)} bytes")
    major, minor, readahead, _ = _INIT_IN.unpack_from(request, IN_HEADER.size)
    return major, minor, readahead


def reply(unique: int, *parts: bytes) -> bytes:
    """Return a whole reply of success."""
    body = b"".join(parts)
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


def reply_header(unique: int, length: int) -> bytes:
    """Return the header of a reply whose `length` bytes follow."""
    return OUT_HEADER.pack(OUT_HEADER.size + length, 0, unique)


def reply_error(unique: int, code: int = errno.EIO) -> bytes:
    """Return a reply that carries an errno."""
    return OUT_HEADER.pack(OUT_HEADER.size, -code, unique)


def resend() -> bytes:
    """Return the notification after which the kernel sends again what an earlier server had read and not answered (Linux 6.9)."""
    return OUT_HEADER.pack(OUT_HEADER.size, 7, 0)


def init_out(minor: int, readahead: int) -> bytes:
    """Return the body of the reply to INIT."""
    flags = _INIT_FLAGS | _INIT_EXT | _HAS_RESEND
    return _INIT_OUT.pack(
        MAJOR,
        min(minor, 39),  # 7.39 knows flags2
        readahead,
        flags & 0xFFFFFFFF,
        64,  # max_background
        48,  # congestion_threshold
        MAX_WRITE,
        1,  # time granularity, ns
        MAX_PAGES,
        0,
        flags >> 32,
        0,  # no stacking
        *([0] * 12),
    )


def attributes(nodeid: int, mode: int, size: int) -> bytes:
    """Return a fuse_attr; everything belongs to root."""
    return _ATTR.pack(nodeid, size, (size + 511) // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def entry_out(nodeid: int, attr: bytes) -> bytes:
    """Return the body of the reply to LOOKUP."""
    return _ENTRY_OUT.pack(nodeid, 0, _FOR_EVER_S, _FOR_EVER_S, 0, 0) + attr


def attr_out(attr: bytes) -> bytes:
    """Return the body of the reply to GETATTR."""
    return _ATTR_OUT.pack(_FOR_EVER_S, 0, 0) + attr


def open_out(handle: int) -> bytes:
    """Return the body of the reply to OPEN: pages are cached by who reads the file, not by FUSE as well."""
    return _OPEN_OUT.pack(handle, FOPEN_DIRECT_IO, 0)


def statfs_out() -> bytes:
    """Return the body of the reply to STATFS."""
    return _STATFS_OUT.pack(0, 0, 0, 0, 0, 4096, 255, 4096, 0)
