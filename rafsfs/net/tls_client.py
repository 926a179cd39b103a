"""The client's side of TLS over one TCP connection, read into the caller's buffer.

Decided here: how encrypted bytes leave the socket. trio.SSLStream returns one record of 16 KiB per call, with two checkpoints and a copy
each; here up to SCRATCH bytes come at once and are decrypted record by record straight into the buffer. Rule: an end without TLS's
own farewell counts as an end (as with https everywhere); whoever reads knows by the framing above whether it came too soon.

Concurrency: one task at a time, but that `close` of the stream below is somebody else's. After an error or a cancellation of no more use.
"""

from __future__ import annotations

import ssl
from typing import Final

import trio

SCRATCH: Final = 256 << 10
RECORD: Final = 17 << 10
"""A record is no longer than this; the library holds as much of one back until all of it is there."""


class TlsClient:
    """TLS over a connected stream."""

    def __init__(self, stream: trio.SocketStream, context: ssl.SSLContext, host: str) -> None:
        self._stream = stream
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._ssl = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._scratch = memoryview(bytearray(SCRATCH))

    async def do_handshake(self) -> None:
        """Do the handshake. Raises ssl.SSLError, OSError, trio.BrokenResourceError."""
        while True:
            try:
                self._ssl.do_handshake()
            except ssl.SSLWantReadError:
                await self._exchange()
                continue
            finally:
                # Also after a failure: the alert tells the other side why.
                await self._flush()
            return

    async def send_all(self, data: bytes) -> None:
        """Send all of `data`. Raises ssl.SSLError, OSError, trio.BrokenResourceError."""
        self._ssl.write(data)
        await self._flush()

    def has_ahead(self) -> int:
        """Return how many encrypted bytes have been received and not been decrypted."""
        return self._incoming.pending

    async def receive_into(self, buffer: memoryview) -> int:
        """Read what there is, at least a byte, into `buffer`; return how many, 0 at the end. Raises ssl.SSLError, OSError."""
        while True:
            done = 0
            try:
                while done < len(buffer):
                    got: int = self._ssl.read(len(buffer) - done, buffer[done:])  # type: ignore[assignment] # given a buffer it counts
                    if not got:
                        return done
                    done += got
            except ssl.SSLWantReadError:
                if not done:
                    await self._exchange()
                    continue
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                pass
            return done

    async def _exchange(self) -> None:
        """Send what is to be sent, receive something."""
        await self._flush()
        got = await self._stream.socket.recv_into(self._scratch)
        if got:
            self._incoming.write(self._scratch[:got])
        else:
            self._incoming.write_eof()

    async def _flush(self) -> None:
        data = self._outgoing.read()
        if data:
            await self._stream.send_all(data)
