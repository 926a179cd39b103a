"""A file that appears in a directory complete, or not at all.

Decided here: it is written without a name where the file system can (a process that is killed leaves nothing), else under a hidden one; a
name that is taken is replaced only if that is wanted, in one step. Rule: the name is one component, made through a descriptor of its
directory, and no link is followed. Blocking calls.
"""

from __future__ import annotations

import contextlib
import errno
import os
from types import TracebackType
from typing import Self

from rafsfs.errors import RafsError, UsageError

_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL})


class NewFile:
    """One file in the making; a context manager. Raises UsageError if the name is taken and `replace` is false."""

    def __init__(self, directory: str, name: str, *, replace: bool) -> None:
        self.path = os.path.join(directory, name)
        self._name = name
        self._replace = replace
        self._hidden = ""
        try:
            os.makedirs(directory, exist_ok=True)
            self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"{directory} cannot be written to: {error.strerror}") from error
        try:
            self._check_name()
            self.fd = self._create()
        except BaseException:
            os.close(self._directory)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self.fd)
        if self._hidden:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._hidden, dir_fd=self._directory)
        os.close(self._directory)

    def appear(self, mtime_s: float | None) -> None:
        """Bring the file to the disk and give it its name. Raises UsageError if somebody else has taken it, RafsError."""
        try:
            if mtime_s is not None:
                os.utime(self.fd, (mtime_s, mtime_s))
            os.fsync(self.fd)
            if not self._hidden and not self._replace:
                self._link(self._name)
            else:
                if not self._hidden:
                    self._hidden = self._hidden_name()
                    self._link(self._hidden)
                if self._replace:
                    os.rename(self._hidden, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
                else:
                    os.link(self._hidden, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            os.fsync(self._directory)
        except FileExistsError:
            raise self._taken() from None
        except OSError as error:
            raise RafsError(f"{self.path} cannot be written: {error.strerror}") from error

    def _link(self, name: str) -> None:
        os.link(f"/proc/self/fd/{self.fd}", name, dst_dir_fd=self._directory, follow_symlinks=True)

    def _create(self) -> int:
        try:
            return os.open(f"/proc/self/fd/{self._directory}", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise UsageError(f"{self.path} cannot be written: {error.strerror}") from error
        self._hidden = self._hidden_name()
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(self._hidden, flags, 0o666, dir_fd=self._directory)
        except OSError as error:
            raise UsageError(f"{self.path} cannot be written: {error.strerror}") from error

    def _check_name(self) -> None:
        try:
            found = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return
        except OSError as error:
            raise UsageError(f"{self.path} cannot be written: {error.strerror}") from error
        if not self._replace or (found.st_mode & 0o170000) == 0o040000:
            raise self._taken()

    def _taken(self) -> UsageError:
        return UsageError(f"{self.path} is there already; give --force to replace a file, or --name another name")

    def _hidden_name(self) -> str:
        return f".rafs-{os.urandom(8).hex()}.part"
