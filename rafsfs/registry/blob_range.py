"""Ranges of blobs, straight from the socket into the caller's buffer.

Decided here: how a range is opened: with authorization at the registry, without it at the storage that the registry
redirects to; where a blob's storage is remembered for a minute, since asking the registry for each of a thousand ranges
would double the round trips. Rule: bytes of another range than asked are never delivered; a blob is never asked past
its end (docker-registry answers that with a body length that is not there).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import trio

from ..errors import NotFoundError, RemoteError, UnavailableError
from ..interfaces import BlockingRead
from ..net.http1 import Response
from ..net.http_head import ProtocolError
from ..net.origin import Target
from ..net.ranges import RangeRefusedError, format_range, plan_delivery
from ..net.retry import RETRYABLE_STATUSES
from ..types import Digest
from .answer import Answer, error_detail, refusal
from .remote import MAX_REDIRECTS, REDIRECTS, Remote

REMEMBER_S: Final = 60.0
"""How long a redirect is used again: signed addresses live for minutes at least."""
_REMEMBER_MAX: Final = 4096
_REFUSAL_TEXT: Final = 16 << 10
_SCRATCH: Final = 256 << 10
_EXPIRED: Final = frozenset({400, 401, 403, 404, 410})
"""What storage answers to an address that was good once."""


@dataclass(frozen=True, slots=True)
class _Redirect:
    target: Target
    good_until: float


class _TryAgain(Exception):  # noqa: N818 - a signal inside this module, not an error
    """Opening failed in a way that may pass."""

    def __init__(self, failure: UnavailableError, retry_after: str | None) -> None:
        self.failure = failure
        self.retry_after = retry_after


class RangeStream:
    """BlobStream over one response. `total` is the size of the whole blob, if the server said it."""

    def __init__(self, response: Response, length: int, total: int | None, what: str) -> None:
        self._response = response
        self._left = length
        self._what = what
        self.total = total

    async def readinto(self, buffer: memoryview) -> None:
        """Fill `buffer` with the next bytes of the range. Raises UnavailableError, ValueError (see BlobStream)."""
        if len(buffer) > self._left:
            raise ValueError(f"{len(buffer)} bytes asked, {self._left} left in the range")
        try:
            await self._response.readinto(buffer)
            self._left -= len(buffer)
            if self._left == 0:
                await self._response.finish()
        except RemoteError as error:
            # Also broken framing counts as cut off: the rest can be asked for again.
            raise UnavailableError(f"{self._what}: {error}") from error

    def blocking(self) -> BlockingRead | None:
        """Return what reads the stream in a thread (see ThreadedStream)."""
        return self._readinto_blocking if self._response.can_block else None

    def _readinto_blocking(self, buffer: memoryview) -> None:
        if len(buffer) > self._left:
            raise ValueError(f"{len(buffer)} bytes asked, {self._left} left in the range")
        try:
            self._response.readinto_blocking(buffer)
        except RemoteError as error:
            raise UnavailableError(f"{self._what}: {error}") from error
        self._left -= len(buffer)


class BlobRanges:
    """Opens ranges of one repository's blobs."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._redirects: dict[Digest, _Redirect] = {}

    @asynccontextmanager
    async def open(self, digest: Digest, offset: int, length: int) -> AsyncIterator[RangeStream]:
        """Open bytes [offset, offset+length) of a blob. Opening is retried, reading is not.

        Raises NotFoundError, AccessDeniedError, UnavailableError, RemoteError (the range cannot be had from this server).
        """
        if offset < 0 or length <= 0:
            raise ValueError(f"range of {length} bytes at {offset}")
        response, stream = await self._open(digest, offset, length)
        try:
            yield stream
        finally:
            response.close()

    async def _open(self, digest: Digest, offset: int, length: int) -> tuple[Response, RangeStream]:
        pace = self._remote.pace()
        while True:
            try:
                return await self._attempt(digest, offset, length)
            except _TryAgain as again:
                failure, asked = again.failure, again.retry_after
            except UnavailableError as error:
                failure, asked = UnavailableError(f"{self._what(digest)}: {error}"), None
            self._redirects.pop(digest, None)
            await pace.again(failure, asked)

    async def _attempt(self, digest: Digest, offset: int, length: int) -> tuple[Response, RangeStream]:
        home = self._remote.target(f"blobs/{digest}")
        remembered = self._remembered(digest)
        target = remembered or home
        renewed = False
        for _ in range(MAX_REDIRECTS + 3):
            used = self._header_for(target)
            response = await self._ask(target, offset, length, used)
            try:
                status = response.status
                if status in {200, 206}:
                    return response, await self._deliver(response, digest, offset, length)
                told = await self._read_refusal(response)
                if status in REDIRECTS:
                    target = self._remote.redirected(target, response.headers.get("location"), self._what(digest))
                    self._remember(digest, target)
                elif status in _EXPIRED and target == remembered:
                    target, remembered = home, None
                    self._redirects.pop(digest, None)
                elif status == 401 and target.origin == self._remote.origin and not renewed:
                    await self._renew(response, used)
                    renewed = True
                else:
                    raise self._refused(digest, target, response, told, offset + length)
            except BaseException:
                response.close()
                raise
            response.close()
        raise RemoteError(f"{self._what(digest)} is redirected in circles, last to {target}")

    def _header_for(self, target: Target) -> str | None:
        """Return the Authorization for a request: only ever the registry's own origin gets one."""
        at_home = target.origin == self._remote.origin
        return self._remote.auth.header(self._remote.scope("pull")) if at_home else None

    async def _ask(self, target: Target, offset: int, length: int, authorization: str | None) -> Response:
        headers = {"Range": format_range(offset, length)}
        if authorization is not None:
            headers["Authorization"] = authorization
        return await self._remote.pool.open(target, headers)

    async def _renew(self, response: Response, rejected: str | None) -> None:
        challenges = response.headers.get_all("www-authenticate")
        response.close()  # its slot may be the last one, and another task may hold the lock of the renewal
        await self._remote.auth.renew(self._remote.scope("pull"), challenges, rejected)

    async def _deliver(self, response: Response, digest: Digest, offset: int, length: int) -> RangeStream:
        try:
            plan = plan_delivery(response.head, offset, length)
        except (RangeRefusedError, ProtocolError) as error:
            raise RemoteError(f"{self._what(digest)}: {error}") from None
        scratch = memoryview(bytearray(min(plan.skip, _SCRATCH)))
        left = plan.skip
        while left:
            piece = scratch[: min(left, len(scratch))]
            await response.readinto(piece)
            left -= len(piece)
        return RangeStream(response, length, plan.total, self._what(digest))

    async def _read_refusal(self, response: Response) -> bytes:
        # 416 of docker-registry announces the length of the whole blob and sends less: its body is left alone.
        return b"" if response.status == 416 else await response.read_text(_REFUSAL_TEXT)

    def _refused(self, digest: Digest, target: Target, response: Response, told: bytes, end: int) -> Exception:
        status, what = response.status, self._what(digest)
        _, detail = error_detail(told)
        at_home = target.origin == self._remote.origin
        if status in RETRYABLE_STATUSES:
            failure = UnavailableError(f"{what}: {target.origin.netloc} answered {status}{detail}")
            return _TryAgain(failure, response.headers.get("retry-after"))
        if status == 416:
            return RemoteError(f"{what} ends before byte {end}, which the image says it has (answer 416)")
        if status == 404:
            where = "" if at_home else f" in its storage at {target.origin.netloc}"
            return NotFoundError(f"{self._remote.name} has no blob {digest}{where}{detail}")
        if status in {401, 403} and at_home:
            return self._remote.auth.denied(f"blob {digest}: {target.origin.netloc} answered {status}{detail}")
        if status in {401, 403}:
            # The registry let us through and its storage does not: an address gone stale, which the registry renews.
            return _TryAgain(UnavailableError(f"{what}: its storage at {target} answered {status}"), None)
        return refusal(self._remote.name, f"blob {digest}", Answer(status, response.headers, told, target))

    def _remembered(self, digest: Digest) -> Target | None:
        found = self._redirects.get(digest)
        if found is None or trio.current_time() >= found.good_until:
            return None
        return found.target

    def _remember(self, digest: Digest, target: Target) -> None:
        if len(self._redirects) >= _REMEMBER_MAX:
            self._redirects.pop(next(iter(self._redirects)))
        self._redirects[digest] = _Redirect(target, trio.current_time() + REMEMBER_S)

    def _what(self, digest: Digest) -> str:
        return f"{self._remote.name}: blob {digest}"
