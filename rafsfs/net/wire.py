"""One TCP or TLS connection, read into the caller's buffer.

Decided here: how bytes leave the socket. Plain TCP in a thread: one blocking call that the kernel fills (MSG_WAITALL), so that nobody
wakes up for a part. Plain TCP on the event loop: recv_into with SO_RCVLOWAT of up to 1 MiB while a body is read (fewer wake-ups: 2.3 to
3.2 GB/s on loopback) and 1 before heads, where a higher mark would hang the tail. TLS: tls_client.py. Every wait is bounded by
`timeout_s` without progress. Rule: after an error or a cancellation the connection is of no more use; `close` never waits.

A mark alone can stall a line for 200 ms: the kernel makes its receive buffer as large as the mark and no larger, a sender whose next
segment is larger than what is left of the window waits for its timer, and the receiver waits for the mark. (Seen for one connection in
ten, with marks of 0.7 MB, on loopback.) So room is made for ROOM marks first.
"""

from __future__ import annotations

import os
import select
import socket as stdlib_socket
import ssl
import struct
from contextlib import suppress
from typing import Final

import trio

from ..errors import UnavailableError
from .origin import Origin
from .proxy import Proxy
from .tls import explain_tls_failure
from .tls_client import RECORD, SCRATCH, TlsClient

LOW_WATER: Final = 1 << 20
"""A chunk: with 256 KiB a daemon woke up four times for each. The kernel holds it to half of the largest receive buffer."""
ROOM: Final = 4
_DRIP_S: Final = 0.05
_LOOK_S: Final = 0.25
"""How often a thread that waits for bytes looks whether anybody still wants them."""
_LOOK: Final = struct.pack("ll", 0, int(_LOOK_S * 1e6))
"""The same as a struct timeval."""


class Wire:
    """A connected socket, with TLS or without."""

    def __init__(self, stream: trio.SocketStream, server: str, timeout_s: float) -> None:
        self._stream = stream
        self._tls: TlsClient | None = None
        self._server = server
        self._timeout_s = timeout_s
        self._low_water = 1
        self._room = 0
        self._twin: stdlib_socket.socket | None = None
        """The same socket for threads: trio's own lets go of the interpreter only by way of the event loop."""

    async def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """Do the TLS handshake. Raises RemoteError in words for what is wrong with certificates or protocol."""
        self._tls = TlsClient(self._stream, context, host)
        try:
            with trio.fail_after(self._timeout_s):
                await self._tls.do_handshake()
        except trio.TooSlowError:
            raise UnavailableError(f"the TLS handshake with {self._server} took over {self._timeout_s:g} s") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            raise self._broken(error) from error

    async def send(self, data: bytes) -> None:
        """Send all of `data`. Raises UnavailableError."""
        try:
            with trio.fail_after(self._timeout_s):
                await (self._tls or self._stream).send_all(data)
        except trio.TooSlowError:
            raise UnavailableError(f"{self._server} took no request for {self._timeout_s:g} s") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            raise self._broken(error) from error

    async def receive(self, limit: int) -> bytes:
        """Return some bytes, at most `limit`, as soon as there are any; b"" at the end. Raises UnavailableError."""
        scratch = bytearray(limit)
        got = await self._receive_into(memoryview(scratch), 1)
        return bytes(scratch[:got])

    async def receive_into(self, buffer: memoryview) -> int:
        """Read into `buffer`, whose every byte is sure to come; returns how many, 0 at the end. Raises UnavailableError."""
        return await self._receive_into(buffer, min(LOW_WATER, len(buffer)))

    async def _receive_into(self, buffer: memoryview, low_water: int) -> int:
        try:
            with trio.move_on_after(self._timeout_s):
                if self._tls is not None:
                    # Encryption only adds to what is sure to come; of that, some is here, up to a record of it where nobody sees it.
                    sure = low_water - self._tls.has_ahead() - RECORD
                    self._set_low_water(max(1, min(sure, SCRATCH)))
                    return await self._tls.receive_into(buffer)
                self._set_low_water(low_water)
                return await self._stream.socket.recv_into(buffer)
            if low_water > 1:
                # A slow line may have brought less than the mark, yet something: that is not silence.
                self._set_low_water(1)
                with trio.move_on_after(_DRIP_S):
                    if self._tls is not None:
                        return await self._tls.receive_into(buffer)
                    return await self._stream.socket.recv_into(buffer)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise self._broken(error) from error
        raise UnavailableError(f"{self._server} sent nothing for {self._timeout_s:g} s")

    @property
    def is_plain(self) -> bool:
        """Whether bytes leave the socket as they are, so that a thread can read them."""
        return self._tls is None

    def receive_into_blocking(self, buffer: memoryview) -> int:
        """Do as `receive_into`, in a thread of `trio.to_thread`, while no task uses the wire: there must be no TLS.

        Raises UnavailableError, trio.Cancelled when the task that waits for the thread was cancelled.
        """
        quiet_s = 0.0
        descriptor = self._stream.socket.fileno()
        try:
            if self._twin is None:
                self._twin = stdlib_socket.socket(fileno=os.dup(descriptor))
                self._twin.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_RCVTIMEO, _LOOK)
            self._set_low_water(1)
            os.set_blocking(descriptor, True)
            try:
                while quiet_s < self._timeout_s:
                    with suppress(BlockingIOError):
                        got = self._twin.recv_into(buffer, len(buffer), stdlib_socket.MSG_WAITALL)
                        if got < len(buffer):
                            trio.from_thread.check_cancelled()
                        return got
                    trio.from_thread.check_cancelled()
                    quiet_s += _LOOK_S
            finally:
                os.set_blocking(descriptor, False)
        except OSError as error:
            raise self._broken(error) from error
        raise UnavailableError(f"{self._server} sent nothing for {self._timeout_s:g} s")

    def _set_low_water(self, mark: int) -> None:
        if mark > self._room:
            self._room = ROOM * mark
            self._stream.socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_RCVLOWAT, self._room)
            self._low_water = self._room
        if mark != self._low_water:
            self._stream.socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_RCVLOWAT, mark)
            self._low_water = mark

    def _broken(self, error: BaseException) -> Exception:
        told = explain_tls_failure(error, self._server) if self._tls is not None else None
        if told is not None:
            return told
        cause = error.__cause__ or error
        reason = getattr(cause, "strerror", None) or "the connection broke"
        return UnavailableError(f"{self._server}: {str(reason)[:100].lower()}")

    def is_quiet(self) -> bool:
        """Tell whether an idle connection is still good: open, and with nothing to read. Does not wait."""
        descriptor = self._stream.socket.fileno()
        if descriptor < 0:
            return False
        # Readable means more than asked for, or the end. The socket itself would have to be duplicated to be asked without waiting.
        probe = select.poll()
        probe.register(descriptor, select.POLLIN)
        return not probe.poll(0)

    def close(self) -> None:
        """Close at once, without a TLS farewell."""
        self._stream.socket.close()
        if self._twin is not None:
            self._twin.close()


async def connect(origin: Origin, proxy: Proxy | None, timeout_s: float) -> Wire:
    """Open a TCP connection to an origin, or to the proxy before it. Raises UnavailableError."""
    host, port = (proxy.host, proxy.port) if proxy is not None else (origin.host, origin.port)
    server = origin.netloc if proxy is None else f"{origin.netloc} by proxy {proxy}"
    try:
        with trio.fail_after(timeout_s):
            stream = await trio.open_tcp_stream(host, port)
    except trio.TooSlowError:
        raise UnavailableError(f"connecting to {server} took over {timeout_s:g} s") from None
    except OSError as error:
        raise UnavailableError(f"cannot connect to {server}: {_reason(error)}") from error
    return Wire(stream, server, timeout_s)


def _reason(error: OSError) -> str:
    """Return why: trio groups the failures of all addresses it tried below the error that it raises."""
    cause: BaseException = error
    while True:
        if isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        elif cause.__cause__ is not None:
            cause = cause.__cause__
        else:
            return str(getattr(cause, "strerror", None) or cause)[:100].lower()
