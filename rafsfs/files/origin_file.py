"""One file of a web server: what it says of it, and ranges of one version of it.

Decided here: redirects (bounded; never from https to http), who sees credentials (the host of the URL alone), retries of opening, and that
bytes of another version are never delivered: each range is asked for with If-Range, and an answer that is whole, of another length or under
another validator ends the download. Reading that breaks off is the caller's to go on with.

Concurrency: any number of tasks; the remembered redirect changes between checkpoints. Cancelled, a response is closed.
"""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from ..errors import AccessDeniedError, NotFoundError, RemoteError, UnavailableError
from ..interfaces import BlobStream, BlockingRead
from ..net.http1 import HttpPool, Response
from ..net.http_head import Head, ProtocolError
from ..net.origin import Target, resolve_url
from ..net.ranges import RangeRefusedError, format_range, parse_content_range, plan_delivery
from ..net.retry import RETRYABLE_STATUSES, RetryPolicy, next_wait, parse_retry_after
from ..types import Digest
from .identity import Validator, strong_validator

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS: Final = 8
_EXPIRED: Final = frozenset({400, 401, 403, 404, 410})
"""What a redirect's end answers when it was good only for a while."""


class Origin(Protocol):
    """Where the bytes of one version of a file are; named by `str`."""

    def open_range(self, digest: Digest | None, offset: int, length: int) -> AbstractAsyncContextManager[BlobStream]:
        """Open bytes [offset, offset+length)."""


class ChangedError(RemoteError):
    """The server has another version of the file than the one that was begun."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a server says of a file."""

    length: int | None
    """Bytes, None if it does not say."""
    has_ranges: bool
    validator: Validator | None
    last_modified: str | None
    disposition: str | None
    cache_control: str | None


class OriginFile:
    """A file at a URL. `headers` are secret: they go to the origin of `target` and nowhere else."""

    def __init__(
        self,
        target: Target,
        headers: Mapping[str, str],
        *,
        home: ssl.SSLContext,
        elsewhere: ssl.SSLContext,
        timeout_s: float,
        version: tuple[Validator, int] | None = None,
        policy: RetryPolicy | None = None,
    ) -> None:
        self.target = target
        self._headers = dict(headers)
        self._home = HttpPool(ssl_context=home, timeout_s=timeout_s)
        self._elsewhere = HttpPool(ssl_context=elsewhere, timeout_s=timeout_s)
        self._policy = policy or RetryPolicy()
        self._version = version
        self._end: Target | None = None
        """Where the last redirects led."""

    def __str__(self) -> str:
        return str(self.target)

    def close(self) -> None:
        """Close idle connections."""
        self._home.close()
        self._elsewhere.close()

    async def probe(self) -> Probe:
        """Ask for the first byte, to learn what there is. Raises RemoteError and what is below it."""
        async with self._request({"Range": "bytes=0-0"}) as response:
            return _read_probe(response.head)

    @asynccontextmanager
    async def whole(self) -> AsyncIterator[Response]:
        """Open all of the file, from a server that can do no better."""
        async with self._request({}) as response:
            coding = response.headers.get("content-encoding")
            if response.status != 200 or (coding or "identity").strip().lower() not in {"", "identity"}:
                raise RemoteError(
                    f"{self}: answered {response.status} with encoding {(coding or 'none')[:20]!r}, expected 200 with none"
                )
            yield response

    @asynccontextmanager
    async def open_range(self, digest: Digest | None, offset: int, length: int) -> AsyncIterator[BlobStream]:
        """Open bytes [offset, offset+length) of the version that was begun. `digest` is a name for the fetch pipeline, no promise.

        Raises ChangedError, NotFoundError, AccessDeniedError, UnavailableError, RemoteError.
        """
        assert self._version is not None
        validator, total = self._version
        fields = {"Range": format_range(offset, length), "If-Range": validator.value}
        async with self._request(fields) as response:
            try:
                self._check_version(response.head, validator, total)
                plan_delivery(response.head, offset, length)
            except (RangeRefusedError, ProtocolError) as error:
                raise RemoteError(f"{self}: {error}") from None
            yield _Stream(response, str(self))

    def _check_version(self, head: Head, validator: Validator, total: int) -> None:
        now = head.headers.get(validator.name)
        if now is not None and now.strip() != validator.value:
            raise ChangedError(
                f"{self} changed while it was fetched: {validator.name} was {validator.value[:60]}, is {now.strip()[:60]}; run again"
            )
        if head.status == 200:
            raise ChangedError(
                f"{self} changed while it was fetched: it was answered whole, not from where it was; run again"
            )
        got = parse_content_range(head.headers.get("content-range")).total
        if got is not None and got != total:
            raise ChangedError(f"{self} changed while it was fetched: it had {total} bytes, has {got}; run again")

    # ---- requests ------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _request(self, fields: Mapping[str, str]) -> AsyncIterator[Response]:
        response = await self._open(fields)
        try:
            yield response
        finally:
            response.close()

    async def _open(self, fields: Mapping[str, str]) -> Response:
        """Return the response to a GET, redirects followed; a failure that may pass is tried again."""
        failures, waited = 0, 0.0
        while True:
            retry_after = None
            try:
                response = await self._follow(fields)
                if response.status not in RETRYABLE_STATUSES:
                    return response
                failure = UnavailableError(f"{self}: answered {response.status}")
                retry_after = parse_retry_after(response.headers.get("retry-after"), now=time.time())
                response.close()
            except UnavailableError as error:
                failure = UnavailableError(f"{self}: {error}")
            failures += 1
            wait = next_wait(
                self._policy, failures=failures, waited_s=waited, left_s=float("inf"), retry_after_s=retry_after,
                jitter=random.random(),
            )  # fmt: skip
            if wait is None:
                raise failure
            waited += wait
            await trio.sleep(wait)

    async def _follow(self, fields: Mapping[str, str]) -> Response:
        target, remembered = self._end or self.target, self._end
        for _ in range(MAX_REDIRECTS + 2):
            at_home = target.origin == self.target.origin
            pool = self._home if at_home else self._elsewhere
            response = await pool.open(target, {**(self._headers if at_home else {}), **fields})
            try:
                status = response.status
                if status in {200, 206, 416} or status in RETRYABLE_STATUSES:
                    self._end = target
                    return response
                if status in _REDIRECTS:
                    target = self._redirected(target, response.headers.get("location"))
                elif status in _EXPIRED and target == remembered and target != self.target:
                    target, remembered, self._end = self.target, None, None
                else:
                    raise self._refused(target, status)
            except BaseException:
                response.close()
                raise
            response.close()
        raise RemoteError(f"{self} is redirected more than {MAX_REDIRECTS} times, last to {target}")

    def _redirected(self, target: Target, location: str | None) -> Target:
        try:
            following = resolve_url(target, location or "")
        except ValueError as error:
            raise RemoteError(f"{self} is redirected to where we cannot go: {error}") from None
        if target.origin.is_tls and not following.origin.is_tls:
            raise RemoteError(f"{self} is redirected from https to {following}, which is refused")
        return following

    def _refused(self, target: Target, status: int) -> RemoteError:
        where = f"{self}" if target.origin == self.target.origin else f"{self} (redirected to {target})"
        if status in {404, 410}:
            return NotFoundError(f"{where}: answered {status}, there is no such file")
        if status in {401, 403, 407}:
            return AccessDeniedError(f"{where}: answered {status}; give credentials with --header or --netrc")
        return RemoteError(f"{where}: answered {status}, expected 200 or 206")


class _Stream:
    """BlobStream over one response."""

    def __init__(self, response: Response, what: str) -> None:
        self._response = response
        self._what = what

    async def readinto(self, buffer: memoryview) -> None:
        try:
            await self._response.readinto(buffer)
        except RemoteError as error:
            raise UnavailableError(f"{self._what}: {error}") from error

    def blocking(self) -> BlockingRead | None:
        return self._readinto_blocking if self._response.can_block else None

    def _readinto_blocking(self, buffer: memoryview) -> None:
        try:
            self._response.readinto_blocking(buffer)
        except RemoteError as error:
            raise UnavailableError(f"{self._what}: {error}") from error


def _read_probe(head: Head) -> Probe:
    """Judge the answer to a request for the first byte."""
    headers = head.headers
    length, has_ranges = head.length, False
    coding = (headers.get("content-encoding") or "").strip().lower()
    if head.status == 206:
        try:
            got = parse_content_range(headers.get("content-range"))
        except ProtocolError as error:
            raise RemoteError(f"the server does not know ranges: {error}") from None
        length, has_ranges = got.total, (got.start, got.stop) == (0, 1)
    elif head.status == 416:
        length = 0 if (headers.get("content-range") or "").replace(" ", "").lower() == "bytes*/0" else None
    if coding not in {"", "identity"}:
        length, has_ranges = None, False
    return Probe(
        length=length,
        has_ranges=has_ranges,
        validator=strong_validator(headers.get("etag"), headers.get("last-modified"), headers.get("date")),
        last_modified=headers.get("last-modified"),
        disposition=headers.get("content-disposition"),
        cache_control=headers.get("cache-control"),
    )
