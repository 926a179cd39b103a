"""Requests to one repository of a registry: authentication, retries, errors, redirects. Used by client.py and upload.py.

Decided here: which answers are retried, which become which error, what crosses to another origin (never Authorization). Small
control requests go through httpx; ranges of blobs through net/http1.py. Every wait has a limit: `timeout_s` without a byte, and
`retries` attempts.
"""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import urljoin

import httpx
import trio

from ..errors import AccessDeniedError, NotFoundError, RemoteError, UnavailableError, UsageError
from ..net.http1 import HttpPool, Response, Target, display_url
from ..net.ranges import check_content_range, format_range
from ..net.retry import RETRY_STATUSES, backoff, retry_after
from ..types import Digest
from .auth import Authorizer
from .reference import Reference

_REDIRECTS: Final = 5
_REDIRECT_LIFE_S: Final = 60.0
"""How long a blob's redirect target is used again: signed URLs live minutes at least."""
_SKIP_LIMIT: Final = 8 << 20
"""Bytes thrown away to reach the offset when a server ignores Range; beyond that the range cannot be had."""


@dataclass(frozen=True, slots=True)
class RegistryOptions:
    """How to reach a registry. `docker_config` names a directory; secrets themselves are never passed around."""

    plain_http: bool = False
    ca_file: str | None = None
    client_cert: str | None = None
    client_key: str | None = None
    docker_config: str | None = None
    timeout_s: float = 30.0
    """Longest silence on a connection, seconds."""
    retries: int = 4
    """Attempts after the first for what may pass: connection errors, 429, 5xx."""


def make_ssl_context(options: RegistryOptions) -> ssl.SSLContext:
    """Return the TLS settings: system roots or `ca_file`, host names verified, client certificate if given."""
    try:
        context = ssl.create_default_context(cafile=options.ca_file)
        if options.client_cert:
            context.load_cert_chain(options.client_cert, options.client_key)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"TLS files cannot be loaded: {error}") from error
    return context


class Remote:
    """One repository of a registry, below the level of manifests and blobs."""

    def __init__(self, reference: Reference, options: RegistryOptions) -> None:
        self.name = f"{reference.registry}/{reference.repository}"
        self.registry = reference.registry
        self.repository = reference.repository
        plain = options.plain_http or (reference.is_loopback and not (options.ca_file or options.client_cert))
        host = "registry-1.docker.io" if reference.registry in {"docker.io", "index.docker.io"} else reference.registry
        self.base = f"{'http' if plain else 'https'}://{host}/v2/"
        self._options = options
        context = make_ssl_context(options)
        self._client = httpx.AsyncClient(
            verify=context,
            timeout=options.timeout_s,
            trust_env=not reference.is_loopback,
            limits=httpx.Limits(max_connections=32, max_keepalive_connections=16),
            headers={"User-Agent": "rafs"},
        )
        self._auth = Authorizer(self._client, self.registry, self.repository, options.docker_config)
        self._pool = HttpPool(ssl_context=context, timeout_s=options.timeout_s)
        self._redirects: dict[Digest, tuple[str, float]] = {}
        self._rng = random.Random()

    def url(self, path: str) -> str:
        """Return the URL of a path below this repository, e.g. `manifests/v1`."""
        return f"{self.base}{self.repository}/{path}"

    async def request(
        self,
        method: str,
        url: str,
        *,
        actions: str = "pull",
        headers: Mapping[str, str] | None = None,
        content: bytes | memoryview | None = None,
        limit: int = 1 << 20,
        retry: bool = True,
        extra_scope: str | None = None,
    ) -> httpx.Response:
        """Send a control request and return the answer, its body read up to `limit` bytes; redirects of GET and HEAD are
        followed. Raises UnavailableError after the last attempt, AccessDeniedError for 401 and 403.
        """
        delays = backoff(self._options.retries if retry else 0, self._rng)
        while True:
            failure: UnavailableError
            wait: float | None = None
            try:
                response = await self._once(method, url, actions, dict(headers or {}), content, limit, extra_scope)
                if response.status_code not in RETRY_STATUSES:
                    return response
                wait = retry_after(response.headers.get("retry-after"), time.time())
                failure = UnavailableError(f"{self.name}: {method} {display_url(url)} answered {response.status_code}")
            except UnavailableError as error:
                failure = error
            delay = next(delays, None)
            if delay is None:
                raise failure
            await trio.sleep(delay if wait is None else wait)

    async def _once(
        self,
        method: str,
        url: str,
        actions: str,
        headers: dict[str, str],
        content: bytes | memoryview | None,
        limit: int,
        extra_scope: str | None,
    ) -> httpx.Response:
        origin = Target.parse(url).origin
        header = None if extra_scope else self._auth.header(actions)
        authenticated = False
        for _ in range(_REDIRECTS + 2):
            at_home = Target.parse(url).origin == origin
            if header and at_home:
                headers["Authorization"] = header
            else:
                headers.pop("Authorization", None)
            response = await self._send(method, url, headers, content, limit)
            if response.status_code == 401 and at_home and not authenticated:
                challenge = response.headers.get("www-authenticate", "")
                header = await self._auth.answer(actions, challenge, header, extra_scope)
                authenticated = True
            elif response.status_code in {301, 302, 303, 307, 308} and method in {"GET", "HEAD"}:
                url = urljoin(url, response.headers.get("location", ""))
            elif response.status_code in {401, 403}:
                raise await self._denied(response.status_code)
            else:
                return response
        raise RemoteError(f"{self.name}: more than {_REDIRECTS} redirects, at {display_url(url)}")

    async def _send(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | memoryview | None, limit: int
    ) -> httpx.Response:
        body = bytes(content) if isinstance(content, memoryview) else content
        try:
            async with self._client.stream(method, url, headers=headers, content=body) as response:
                collected = bytearray()
                if method != "HEAD":
                    async for part in response.aiter_bytes():
                        collected += part
                        if len(collected) > limit:
                            raise RemoteError(f"{self.name}: answer of {display_url(url)} is over {limit} bytes")
                return httpx.Response(
                    response.status_code,
                    headers=[(k, v) for k, v in response.headers.raw if k.lower() != b"content-encoding"],
                    content=bytes(collected),
                )
        except httpx.HTTPError as error:
            raise UnavailableError(f"{self.name}: {method} {display_url(url)}: {_describe(error)}") from error

    async def _denied(self, status: int) -> AccessDeniedError:
        if await self._auth.has_credential():
            why = "the credentials of the docker config are not sufficient"
        else:
            why = f"no credentials for {self.registry} in the docker config; log in with `docker login {self.registry}`"
        return AccessDeniedError(f"{self.name}: access denied ({status}), {why}")

    @asynccontextmanager
    async def open_blob_range(self, digest: Digest, offset: int, length: int) -> AsyncIterator[Response]:
        """Open bytes [offset, offset+length) of a blob, at the place where its first byte is. Opening is retried."""
        delays = backoff(self._options.retries, self._rng)
        while True:
            failure: UnavailableError
            wait: float | None = None
            try:
                async with self._open_once(digest, offset, length) as (response, status):
                    if response is not None:
                        yield response
                        return
                    wait = retry_after(status[1], time.time())
                    failure = UnavailableError(f"{self.name}: blob {digest} answered {status[0]}")
            except _OpenError as error:
                failure = error.cause
            delay = next(delays, None)
            if delay is None:
                raise failure
            await trio.sleep(delay if wait is None else wait)

    @asynccontextmanager
    async def _open_once(
        self, digest: Digest, offset: int, length: int
    ) -> AsyncIterator[tuple[Response | None, tuple[int, str | None]]]:
        home = self.url(f"blobs/{digest}")
        origin = Target.parse(home).origin
        remembered = self._redirects.get(digest)
        url = remembered[0] if remembered and remembered[1] > trio.current_time() else home
        header = self._auth.header("pull")
        for _ in range(_REDIRECTS + 3):
            target = Target.parse(url)
            headers = {"Range": format_range(offset, length)}
            if header and target.origin == origin:
                headers["Authorization"] = header
            manager = self._pool.get(target, headers)
            try:
                response = await manager.__aenter__()
            except UnavailableError as error:
                raise _OpenError(UnavailableError(f"{self.name}: {error}")) from error
            leave = True
            try:
                status = response.status
                if status == 401 and target.origin == origin:
                    header = await self._auth.answer("pull", response.headers.get("www-authenticate", ""), header)
                elif status in {301, 302, 303, 307, 308}:
                    url = urljoin(url, response.headers.get("location", ""))
                    Target.parse(url)
                    if len(self._redirects) > 4096:
                        self._redirects.clear()
                    self._redirects[digest] = (url, trio.current_time() + _REDIRECT_LIFE_S)
                elif status in {401, 403, 404} and url != home:
                    self._redirects.pop(digest, None)  # a signed URL that has expired
                    url = home
                elif status in {401, 403}:
                    raise await self._denied(status)
                elif status == 404:
                    raise NotFoundError(f"{self.name}: blob {digest} is not there")
                elif status in RETRY_STATUSES:
                    yield None, (status, response.headers.get("retry-after"))
                    return
                else:
                    await self._position(response, digest, offset, length)
                    leave = False
                    try:
                        yield response, (status, None)
                    finally:
                        await manager.__aexit__(None, None, None)
                    return
            finally:
                if leave:
                    await manager.__aexit__(None, None, None)
        raise RemoteError(f"{self.name}: blob {digest} is redirected in circles")

    async def _position(self, response: Response, digest: Digest, offset: int, length: int) -> None:
        """Check the answer to a range request and read up to the offset if the server ignored the range."""
        if response.status == 206:
            try:
                check_content_range(response.headers.get("content-range"), offset, length)
            except RemoteError as error:
                raise RemoteError(f"{self.name}: blob {digest}: {error}") from error
        elif response.status == 200:
            if offset > _SKIP_LIMIT:
                raise RemoteError(f"{self.name}: blob {digest}: the server ignores Range requests")
            scratch = memoryview(bytearray(min(offset, 1 << 16)))
            left = offset
            while left:
                part = scratch[: min(left, len(scratch))]
                await response.readinto(part)
                left -= len(part)
        else:
            raise RemoteError(f"{self.name}: blob {digest} answered {response.status} to a range request")

    async def aclose(self) -> None:
        """Close all connections."""
        self._pool.close()
        with trio.CancelScope(shield=True), trio.move_on_after(1):
            await self._client.aclose()


class _OpenError(Exception):
    """Wraps a failure to open, so that errors of the block that reads are not taken for it."""

    def __init__(self, cause: UnavailableError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _describe(error: httpx.HTTPError) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None and not str(cause):
        cause = cause.__cause__
    text = str(cause) or type(cause).__name__
    if "CERTIFICATE_VERIFY_FAILED" in text:
        text += " (give the authority's certificate with --ca-file)"
    elif "WRONG_VERSION_NUMBER" in text or "record layer failure" in text.lower():
        text += " (the server speaks plain HTTP; use --plain-http if that is meant)"
    return text
