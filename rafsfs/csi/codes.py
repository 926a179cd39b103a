"""What a call of the Container Storage Interface can fail with, and which of our errors is which. Pure.

Decided here: the code of every error. Codes are gRPC's, by number, so that nothing but the server needs grpcio. Source of when
which code is due: CSI specification 1.12, error scheme of each call.
"""

from __future__ import annotations

from enum import IntEnum

from ..errors import (
    AccessDeniedError,
    CacheFullError,
    DaemonError,
    DeadlineError,
    FormatError,
    MountpointError,
    NotFoundError,
    RafsError,
    UnavailableError,
    UsageError,
)


class Code(IntEnum):
    """gRPC status codes that the driver answers with."""

    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class CsiError(RafsError):
    """A call fails with a code that the specification names."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


_CODES: tuple[tuple[type[RafsError], Code], ...] = (
    (AccessDeniedError, Code.UNAUTHENTICATED),
    (NotFoundError, Code.NOT_FOUND),
    (DeadlineError, Code.DEADLINE_EXCEEDED),
    (UnavailableError, Code.UNAVAILABLE),
    (CacheFullError, Code.RESOURCE_EXHAUSTED),
    (DaemonError, Code.UNAVAILABLE),
    (FormatError, Code.FAILED_PRECONDITION),
    (MountpointError, Code.FAILED_PRECONDITION),
    (UsageError, Code.INVALID_ARGUMENT),
)


def code_of(error: RafsError) -> Code:
    """Return the code of an error."""
    if isinstance(error, CsiError):
        return error.code
    return next((code for kind, code in _CODES if isinstance(error, kind)), Code.INTERNAL)
