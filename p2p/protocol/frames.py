"""Frames over a stream: a length, u32 big-endian, and so many bytes. Bounded; the shell that both ends share.

Concurrency: a `FrameStream` may be read by one task and written by several: writes queue behind a lock. A cancelled write leaves the stream
unusable, and closes it.
"""

from __future__ import annotations

import trio

from rafsfs.errors import FormatError, UnavailableError

from .messages import MAX_FRAME


class FrameStream:
    """Frames of at most `limit` bytes over a trio stream."""

    def __init__(self, stream: trio.abc.HalfCloseableStream | trio.abc.Stream, limit: int = MAX_FRAME) -> None:
        self._stream = stream
        self._limit = limit
        self._buffer = bytearray()
        self._sending = trio.Lock()

    async def send(self, frame: bytes) -> None:
        """Send one frame, its length included. Raises UnavailableError when the other side is gone."""
        async with self._sending:
            done = False
            try:
                await self._stream.send_all(frame)
                done = True
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise UnavailableError("the connection is closed") from error
            finally:
                if not done:
                    await trio.aclose_forcefully(self._stream)

    async def receive(self) -> bytes | None:
        """Return the body of the next frame, None at the end. Raises FormatError, UnavailableError."""
        if not await self._fill(4):
            return None
        length = int.from_bytes(self._buffer[:4], "big")
        if length > self._limit:
            raise FormatError(f"frame of {length} bytes, expected at most {self._limit}")
        if not await self._fill(4 + length):
            raise UnavailableError("the connection ended in the middle of a frame")
        body = bytes(self._buffer[4 : 4 + length])
        del self._buffer[: 4 + length]
        return body

    async def _fill(self, length: int) -> bool:
        while len(self._buffer) < length:
            try:
                data = await self._stream.receive_some(64 << 10)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise UnavailableError("the connection broke") from error
            if not data:
                if self._buffer and length > 4:
                    raise UnavailableError("the connection ended in the middle of a frame")
                return False
            self._buffer += data
        return True

    async def aclose(self) -> None:
        """Close."""
        await trio.aclose_forcefully(self._stream)
