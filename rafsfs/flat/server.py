"""The flat server: data-space files of one image as a folder, over /dev/fuse, for the kernel's EROFS alone.

Decided here: what each FUSE request means. Rules: bytes of a data file are sent only after its presence map says that all their chunks
are there; whatever else happens the answer is an errno, never zeros, never silence: a request leaves this module answered or waiting
in the loop, which has a deadline. Nothing on the way of a hit waits, hops to a thread or allocates by the byte.

Node numbers are slot + 2 (1 is the folder), so that a successor serves what was opened before it came.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Sequence
from typing import Final

from ..errors import CacheError, FormatError
from ..store.space_view import SpaceView
from ..types import BLOCK_SIZE, align_up
from . import wire
from .loop import Loop, Served

_log = logging.getLogger(__name__)

_GONE: Final = frozenset({errno.ENODEV, errno.ENOTCONN})
_RETRY: Final = frozenset({errno.EAGAIN, errno.ENOENT, errno.EINTR})


class FlatServer:
    """Answers requests. `loop` is set before the first `serve`."""

    loop: Loop

    def __init__(self, fuse_fd: int, views: Sequence[SpaceView]) -> None:
        self._fd = fuse_fd
        self._views = views
        self._sizes = [align_up(view.table.size, BLOCK_SIZE) for view in views]
        self._numbers = {view.space_id.hex().encode(): number for number, view in enumerate(views)}
        self._request = bytearray(wire.REQUEST_BUFFER)
        self._buffer = memoryview(bytearray(wire.MAX_PAGES * 4096))
        self._handlers: dict[int, Callable[[int, int, memoryview], bytes | None]] = {
            wire.READ: self._read,
            wire.LOOKUP: self._lookup,
            wire.GETATTR: lambda unique, node, request: wire.reply(unique, wire.attr_out(self._attributes(node))),
            wire.OPEN: self._open,
            wire.OPENDIR: lambda unique, node, request: wire.reply(unique, wire.open_out(node)),
            wire.INIT: self._init,
            wire.STATFS: lambda unique, node, request: wire.reply(unique, wire.statfs_out()),
            **dict.fromkeys(
                (wire.RELEASE, wire.RELEASEDIR, wire.FLUSH, wire.DESTROY, wire.ACCESS),
                lambda unique, node, request: wire.reply(unique),
            ),
        }

    def take_over(self) -> None:
        """Ask the kernel for what an earlier server had read and not answered. Before the first request it does nothing."""
        try:
            os.write(self._fd, wire.resend())
        except OSError as error:
            _log.debug("nothing to be sent again: %s", error)

    def serve(self) -> Served:
        """Handle one request, if there is one."""
        try:
            length = os.readv(self._fd, [self._request])
        except OSError as error:
            if error.errno in _GONE:
                return Served.OVER
            if error.errno in _RETRY:
                return Served.NOTHING
            raise
        request = memoryview(self._request)[:length]
        opcode, unique, node = wire.parse(request)
        if opcode in wire.NO_REPLY:
            return Served.ONE
        handler = self._handlers.get(opcode)
        try:
            answer = handler(unique, node, request) if handler else wire.reply_error(unique, errno.ENOSYS)
        except (CacheError, FormatError, OSError) as error:
            _log.warning("request failed: opcode=%d node=%d cause=%s", opcode, node, error)
            answer = wire.reply_error(unique)
        if answer is not None:
            self._send([answer])
        return Served.ONE

    def _init(self, unique: int, node: int, request: memoryview) -> bytes:
        major, minor, readahead = wire.parse_init(request)
        if major != wire.MAJOR or minor < wire.MINOR:
            return wire.reply_error(unique, errno.EPROTO)
        return wire.reply(unique, wire.init_out(minor, readahead))

    def _lookup(self, unique: int, node: int, request: memoryview) -> bytes:
        number = self._numbers.get(wire.parse_name(request)) if node == wire.ROOT else None
        if number is None:
            return wire.reply_error(unique, errno.ENOENT)
        return wire.reply(unique, wire.entry_out(number + 2, self._attributes(number + 2)))

    def _open(self, unique: int, node: int, request: memoryview) -> bytes:
        self._space(node)
        return wire.reply(unique, wire.open_out(node))

    def _read(self, unique: int, node: int, request: memoryview) -> bytes | None:
        space = self._space(node)
        offset, size = wire.parse_read(request)
        size = min(size, self._sizes[space] - offset)
        if size <= 0:
            return wire.reply(unique)
        view = self._views[space]
        chunks = view.covering(offset, size)
        if view.is_present(chunks.start, chunks.stop):
            self._answer(unique, view, offset, size)
            self.loop.hit(space, chunks, size)
        else:
            reader = wire.parse_thread(request)
            self.loop.want(space, chunks, reader, lambda ok: self._finish(unique, view, offset, size, ok))
        return None

    def _finish(self, unique: int, view: SpaceView, offset: int, size: int, ok: bool) -> None:
        if not ok:
            self._send([wire.reply_error(unique)])
            return
        try:
            self._answer(unique, view, offset, size)
        except CacheError as error:
            _log.warning("read failed: space=%s cause=%s", view.space_id.hex()[:16], error)
            self._send([wire.reply_error(unique)])

    def _answer(self, unique: int, view: SpaceView, offset: int, size: int) -> None:
        """Send bytes that are present. Raises CacheError before anything is sent."""
        data = self._buffer[:size]
        view.read_into(data, offset)
        self._send([wire.reply_header(unique, size), data])

    def _send(self, parts: Sequence[bytes | memoryview]) -> None:
        try:
            os.writev(self._fd, parts)
        except OSError as error:
            if error.errno not in _RETRY | _GONE:  # ENOENT: the reader was killed and waits no longer
                _log.warning("answer refused by the kernel: %s", error)

    def _space(self, node: int) -> int:
        if not 2 <= node < len(self._views) + 2:
            raise FormatError(f"no file has node number {node}")
        return node - 2

    def _attributes(self, node: int) -> bytes:
        if node == wire.ROOT:
            return wire.attributes(node, stat.S_IFDIR | 0o500, 0)
        return wire.attributes(node, stat.S_IFREG | 0o400, self._sizes[self._space(node)])
