"""Copying ranges between files in the kernel: shared blocks where the file system can, else copied there, else through a buffer.

Blocking. Rule: it returns only when all of the range is written; a source that is too short is an error, never zeros.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from ..errors import CacheError

_PIECE: Final = 16 << 20
"""Bytes per call, so that a thread that is to end does not copy on for minutes."""
_BUFFER: Final = 1 << 20
_CANNOT: Final = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ETXTBSY}
)


def copy_range(source: int, offset: int, target: int, position: int, length: int) -> None:
    """Copy bytes [offset, offset+length) of one descriptor to `position` of another. Raises OSError, CacheError."""
    while length:
        try:
            done = os.copy_file_range(source, target, min(length, _PIECE), offset, position)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            _copy_through(source, offset, target, position, length)
            return
        if not done:
            raise CacheError(f"the cached data end {length} bytes too soon; see `rafs cache verify`")
        offset, position, length = offset + done, position + done, length - done


def _copy_through(source: int, offset: int, target: int, position: int, length: int) -> None:
    while length:
        data = memoryview(os.pread(source, min(length, _BUFFER), offset))
        if not data:
            raise CacheError(f"the cached data end {length} bytes too soon; see `rafs cache verify`")
        offset, length = offset + len(data), length - len(data)
        while data:
            written = os.pwrite(target, data, position)
            data, position = data[written:], position + written
