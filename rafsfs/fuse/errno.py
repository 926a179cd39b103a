"""The one place where an exception becomes the errno that a reader of a mount gets."""

from __future__ import annotations

import errno

from ..errors import RafsError


def errno_of(error: BaseException) -> int:
    """Return the errno for an error met while serving a request: the class's own, EIO for anything unexpected."""
    if isinstance(error, RafsError):
        return error.errno
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return errno.EIO
