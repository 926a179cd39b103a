"""pyfuse3 operations over a bootstrap and the node's data spaces: translation only.

Decided here: how inode numbers, attributes and reads of the kernel become look-ups in the bootstrap and ranges of data spaces.
Rules: the hit path has no await, no thread and no allocation per read but the reply's view; a byte is read from a data space only after
its presence map says so; no exception leaves a handler but FUSEError.

Inode numbers are nids, except that the root is FUSE's number 1 (nid 1 is never used by a writer). All attributes and names are
valid for ever: an image does not change.

Concurrency: one trio task per request, all in one thread. The reply buffer is shared: a handler fills it and returns without a
checkpoint, and pyfuse3 sends it before it gives way. A cancelled handler leaves its `ensure` with the daemon.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, cast

import pyfuse3

from ..errors import FormatError, RafsError
from ..format.bootstrap import Bootstrap
from ..format.chunk_index import Extent
from ..format.inode import Inode
from ..store.space_view import HINT_EVERY, SpaceView
from .errno import errno_of

_log = logging.getLogger(__name__)

_FOR_EVER_S: Final = 86400.0
"""Validity of attributes and names in the kernel; an image never changes, a day keeps the number small."""
_FILES: Final = 4096
"""Files whose extents are kept at hand: about 1 MiB."""

_SAME_FAILURE_S: Final = 5.0
"""Failures of one inode within this time are one line in the log."""

Ensure = Callable[[int, range, range], Awaitable[None]]
"""Asks the daemon for chunks of a data space (by its number), of a file that has the chunks of the last argument there; returns
when they are present."""

Hint = Callable[[int, range, range], None]
"""Tells the daemon that chunks were read which were present, so that it goes on ahead of the reader. Does not wait."""


class _File:
    """What reading one regular file takes."""

    __slots__ = ("extents", "hinted", "inline", "size")

    def __init__(self, size: int, inline: memoryview | None, extents: Sequence[Extent]) -> None:
        self.size = size
        self.inline = inline
        self.extents = extents
        self.hinted = (-1, -1)
        """Data space and byte of it up to which the daemon was told last."""


class ImageOperations(pyfuse3.Operations):
    """The file system of one image."""

    enable_writeback_cache = False
    supports_dot_lookup = True

    def __init__(
        self,
        bootstrap: Bootstrap,
        views: Sequence[SpaceView],
        ensure: Ensure,
        hint: Hint,
        *,
        has_xattrs: bool = True,
    ) -> None:
        super().__init__()
        self._hint = hint
        self._has_xattrs = has_xattrs
        self._bootstrap = bootstrap
        self._views = views
        self._ensure = ensure
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._buffer = memoryview(bytearray(1 << 20))
        self._failures: dict[tuple[str, int], float] = {}
        self.cache_bytes = 0
        """Bytes served from chunks that were present when they were asked for."""
        self.touched: list[tuple[int, int, int]] = []
        """Data space and chunks [first, stop) read for the first time since somebody took this list away."""

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        """Find a name in a directory; an absent one is remembered by the kernel too."""
        try:
            nid = self._bootstrap.lookup(self._nid(parent_inode), name)
            if nid is None:
                missing = pyfuse3.EntryAttributes()
                missing.st_ino = 0
                missing.entry_timeout = _FOR_EVER_S
                return missing
            return self._attributes(nid)
        except (RafsError, OSError) as error:
            raise self._failed(error, "lookup") from error

    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        """Return the attributes of an inode."""
        try:
            return self._attributes(self._nid(inode))
        except (RafsError, OSError) as error:
            raise self._failed(error, "getattr") from error

    async def readlink(self, inode: int, ctx: Any) -> bytes:
        """Return a symlink's target."""
        try:
            return self._bootstrap.readlink(self._nid(inode))
        except (RafsError, OSError) as error:
            raise self._failed(error, "readlink") from error

    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        """Return one extended attribute.

        ENOSYS, where no file has any, tells the kernel not to ask again: `ls -l` asks for every file.
        """
        if not self._has_xattrs:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        try:
            value = self._bootstrap.xattrs(self._nid(inode)).get(name)
        except (RafsError, OSError) as error:
            raise self._failed(error, "getxattr") from error
        if value is None:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return value

    async def listxattr(self, inode: int, ctx: Any) -> Sequence[bytes]:
        """Return the names of the extended attributes; `trusted` ones only to who may see them."""
        try:
            names = list(self._bootstrap.xattrs(self._nid(inode)))
        except (RafsError, OSError) as error:
            raise self._failed(error, "listxattr") from error
        return names if ctx is None or ctx.uid == 0 else [name for name in names if not name.startswith(b"trusted.")]

    async def opendir(self, inode: int, ctx: Any) -> int:
        """Directories need no state: the handle is the nid."""
        return self._nid(inode)

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        """Send entries from position `start_id` on, with their attributes, as many as the kernel takes."""
        try:
            for entry in self._bootstrap.entries(fh, start_id):
                attributes = self._attributes(entry.nid)
                if not pyfuse3.readdir_reply(token, entry.name, attributes, entry.position + 1):
                    break
        except (RafsError, OSError) as error:
            raise self._failed(error, "readdir") from error

    async def releasedir(self, fh: int) -> None:
        """Nothing to let go of."""

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        """Open a file for reading; its pages stay in the kernel's cache from one open to the next."""
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC):
            raise pyfuse3.FUSEError(errno.EROFS)
        nid = self._nid(inode)
        try:
            self._file(nid)
        except (RafsError, OSError) as error:
            raise self._failed(error, "open") from error
        return pyfuse3.FileInfo(fh=nid, keep_cache=True)

    async def release(self, fh: int) -> None:
        """Nothing to let go of."""

    async def flush(self, fh: int) -> None:
        """Nothing is ever written."""

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Inode numbers are positions in the bootstrap: nothing is counted."""

    async def access(self, inode: int, mode: int, ctx: Any) -> bool:
        """The kernel checks permissions itself (default_permissions)."""
        return True

    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        """Return the size of the image; nothing is free."""
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = sum(slot.blocks for slot in self._bootstrap.spaces) + self._bootstrap.size // 4096
        data.f_bfree = data.f_bavail = 0
        data.f_files = self._bootstrap.inode_count
        data.f_ffree = data.f_favail = 0
        data.f_namemax = 255
        return data

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Return bytes [off, off+size) of a file, fewer at its end: any buffer, whatever pyfuse3's annotation says."""
        try:
            file = self._file(fh)
            size = min(size, file.size - off)
            if size <= 0:
                return b""
            if file.inline is not None:
                return bytes(file.inline[off : off + size])
            missed = False
            for space, chunks, own in self._missing(file, off, size):
                missed = True
                await self._ensure(space, chunks, own)
            if not missed:
                self.cache_bytes += size
            return cast(bytes, self._fill(file, off, size))
        except (RafsError, OSError, MemoryError) as error:
            raise self._failed(error, "read", fh) from error

    def _missing(self, file: _File, off: int, size: int) -> list[tuple[int, range, range]]:
        """Return (data space, chunks, all chunks of the file there) for what is not present of a range; [] on a hit."""
        missing = []
        for extent, start, length in _parts(file.extents, off, size):
            if extent.space is None:
                continue
            view = self._views[extent.space]
            chunks = view.covering(extent.offset + start, length)
            if view.touch(chunks.start, chunks.stop):
                self.touched.append((extent.space, chunks.start, chunks.stop))
            if not view.is_present(chunks.start, chunks.stop):
                missing.append((extent.space, chunks, view.covering(extent.offset, extent.length)))
            elif file.hinted[0] != extent.space or not 0 <= extent.offset + start - file.hinted[1] < HINT_EVERY:
                own = view.covering(extent.offset, extent.length)
                if view.lacks_ahead(extent.offset + start + length, own.stop):
                    file.hinted = (extent.space, extent.offset + start)
                    self._hint(extent.space, chunks, own)
        return missing

    def _fill(self, file: _File, off: int, size: int) -> memoryview:
        """Read a range that is present into the reply buffer. No checkpoint from here to the reply."""
        if size > len(self._buffer):
            self._buffer = memoryview(bytearray(size))
        out = self._buffer[:size]
        at = 0
        for extent, start, length in _parts(file.extents, off, size):
            piece = out[at : at + length]
            if extent.space is None:
                piece[:] = bytes(length)
            else:
                self._views[extent.space].read_into(piece, extent.offset + start)
            at += length
        if at != size:
            raise FormatError(f"file extents cover {at} of {size} bytes")
        return out

    def _file(self, nid: int) -> _File:
        file = self._files.get(nid)
        if file is None:
            inode = self._bootstrap.inode(nid)
            if not stat.S_ISREG(inode.mode):
                raise FormatError(f"inode {nid} is not a regular file")
            inline = self._bootstrap.inline_data(nid)
            file = _File(inode.size, inline, [] if inline is not None else self._bootstrap.extents(nid))
            self._files[nid] = file
            if len(self._files) > _FILES:
                self._files.popitem(last=False)
        return file

    def _nid(self, inode: int) -> int:
        return self._bootstrap.root_nid if inode == pyfuse3.ROOT_INODE else inode

    def _attributes(self, nid: int) -> pyfuse3.EntryAttributes:
        inode: Inode = self._bootstrap.inode(nid)
        found = pyfuse3.EntryAttributes()
        if nid == self._bootstrap.root_nid:
            found.st_ino = pyfuse3.ROOT_INODE
        elif nid <= pyfuse3.ROOT_INODE:
            raise FormatError(f"inode number {nid} is reserved")
        else:
            found.st_ino = nid
        found.st_mode = inode.mode
        found.st_nlink = inode.nlink
        found.st_uid = inode.uid
        found.st_gid = inode.gid
        found.st_rdev = inode.rdev
        found.st_size = inode.size
        found.st_blksize = 4096
        found.st_blocks = self._bootstrap.allocated_bytes(nid) // 512
        found.st_atime_ns = found.st_mtime_ns = found.st_ctime_ns = inode.mtime_ns
        found.entry_timeout = found.attr_timeout = _FOR_EVER_S
        return found

    def _failed(self, error: BaseException, what: str, inode: int = 0) -> pyfuse3.FUSEError:
        """Log an error and return it as the kernel wants it. One failing read is one line: the kernel asks again by the page."""
        code = errno_of(error)
        now = time.monotonic()
        if now - self._failures.get((what, inode), -_SAME_FAILURE_S) >= _SAME_FAILURE_S:
            place = f" of inode {inode}" if inode else ""
            _log.warning("%s%s failed with %s: %s", what, place, errno.errorcode.get(code, code), error)
            if len(self._failures) > 1000:
                self._failures.clear()
            self._failures[what, inode] = now
        return pyfuse3.FUSEError(code)


def _parts(extents: Sequence[Extent], off: int, size: int) -> list[tuple[Extent, int, int]]:
    """Return (extent, start inside it, length) of the extents that cover [off, off+size), in order."""
    low, high = 0, len(extents)
    while low < high:
        middle = (low + high) // 2
        if extents[middle].file_offset + extents[middle].length <= off:
            low = middle + 1
        else:
            high = middle
    found = []
    end = off + size
    while low < len(extents) and extents[low].file_offset < end:
        extent = extents[low]
        start = max(off, extent.file_offset)
        stop = min(end, extent.file_offset + extent.length)
        found.append((extent, start - extent.file_offset, stop - start))
        low += 1
    return found
