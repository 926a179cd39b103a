"""Every error that a user, a program or a reader can meet, with its exit code.

    RafsError                     1   anything of ours that has no better class
    ├── UsageError                2   a command, option, reference or config file is wrong
    ├── FormatError              10   bytes are not what the format says (corrupt or hostile)
    │   └── UnsupportedError     11   a version or feature this program does not know
    ├── IntegrityError           12   bytes do not match the digest they were promised under
    ├── RemoteError              20   a registry answered something that we cannot use
    │   ├── NotFoundError        21   the registry (or layout) does not have it
    │   ├── AccessDeniedError    22   credentials are missing, wrong or not sufficient
    │   └── UnavailableError     23   not reachable, overloaded or cut off: worth another try
    │       └── DeadlineError    24   it took longer than the caller would wait
    ├── SourceError              30   a file to be built is unreadable, vanished or changed
    ├── CacheError               40   the node's cache directory cannot do its work
    │   ├── CacheBusyError       41   another daemon holds this cache directory
    │   └── CacheFullError       42   no space left for the bytes to be cached
    ├── MountError               50   a mount could not be made, found or removed
    │   ├── MountpointError      51   the directory to mount on is missing, busy or not empty
    │   └── FuseError            52   /dev/fuse or fusermount3 is missing or refuses
    └── DaemonError              60   the node daemon cannot be started or reached, or went away

Rules. A message is one line: what failed, expected and got, where, what to do next. It never holds a secret.
FormatError, IntegrityError and RemoteError blame the other side; the rest blame this machine or its user.
`docs/errors.md` is generated from this module.
"""

from __future__ import annotations

import errno as _errno

__all__ = [
    "AccessDeniedError",
    "CacheBusyError",
    "CacheError",
    "CacheFullError",
    "DaemonError",
    "DeadlineError",
    "FormatError",
    "FuseError",
    "IntegrityError",
    "MountError",
    "MountpointError",
    "NotFoundError",
    "RafsError",
    "RemoteError",
    "SourceError",
    "UnavailableError",
    "UnsupportedError",
    "UsageError",
]


class RafsError(Exception):
    """Base of all errors of this distribution; `str(error)` is the line shown to the user."""

    exit_code = 1
    errno = _errno.EIO
    """What a reader of a mounted file gets when this error stands between it and the bytes."""


class UsageError(RafsError):
    """A command, option, reference or configuration file is wrong."""

    exit_code = 2
    errno = _errno.EINVAL


class FormatError(RafsError):
    """Bytes are not what the format says: corrupt, truncated or hostile."""

    exit_code = 10


class UnsupportedError(FormatError):
    """The bytes name a version, feature or codec that this program does not know."""

    exit_code = 11


class IntegrityError(RafsError):
    """Bytes do not match the digest or size they were promised under."""

    exit_code = 12


class RemoteError(RafsError):
    """A registry answered something that we cannot use."""

    exit_code = 20


class NotFoundError(RemoteError):
    """The registry or layout does not have the manifest, blob or repository."""

    exit_code = 21


class AccessDeniedError(RemoteError):
    """Credentials are missing, wrong or not sufficient."""

    exit_code = 22


class UnavailableError(RemoteError):
    """The remote is not reachable, overloaded or cut the connection: worth another try."""

    exit_code = 23


class UploadLostError(UnavailableError):
    """The registry has forgotten an upload whose beginning is no longer here: the blob has to be sent from its start."""


class DeadlineError(UnavailableError):
    """It took longer than the caller was ready to wait."""

    exit_code = 24


class SourceError(RafsError):
    """A file to be built is unreadable, vanished or changed while it was read."""

    exit_code = 30


class CacheError(RafsError):
    """The node's cache directory cannot do its work."""

    exit_code = 40


class CacheBusyError(CacheError):
    """Another daemon holds this cache directory."""

    exit_code = 41


class CacheFullError(CacheError):
    """There is no space left for the bytes to be cached."""

    exit_code = 42
    errno = _errno.ENOSPC


class MountError(RafsError):
    """A mount could not be made, found or removed."""

    exit_code = 50


class MountpointError(MountError):
    """The directory to mount on is missing, busy or not empty."""

    exit_code = 51


class FuseError(MountError):
    """FUSE is missing on this machine or refuses this user."""

    exit_code = 52


class DaemonError(RafsError):
    """The node daemon cannot be started or reached, or went away."""

    exit_code = 60
