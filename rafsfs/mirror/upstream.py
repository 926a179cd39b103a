"""A registry as the mirror's clients would see it: their credentials, its answers.

Decided here: what crosses. A client's Authorization goes to the registry that it named and along no redirect; of the registry's
answer status, challenge and a few fields go back. Nothing is learned of credentials and nothing is kept. Concurrency: any
number of tasks.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

from ..errors import RemoteError, UnavailableError
from ..interfaces import BlobStream
from ..net.http1 import HttpPool, Response
from ..net.http_head import ProtocolError
from ..net.origin import Target, parse_url, resolve_url
from ..net.ranges import RangeRefusedError, format_range, parse_content_range, plan_delivery
from ..net.tls import client_context
from ..registry.credentials import DOCKER_HUB
from ..registry.manifests import ACCEPT, MAX_DOCUMENT
from ..registry.options import RegistryOptions
from ..types import Digest
from .request import MirrorRequest

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS: Final = 5
_PASSED: Final = (
    "www-authenticate",
    "docker-content-digest",
    "content-type",
    "retry-after",
    "docker-distribution-api-version",
)
"""Fields of a registry's answer that its client needs."""
_MOST_ERROR: Final = 64 << 10


class RefusedError(RemoteError):
    """The registry answered something else than what was asked for: it goes back to the client as it is."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes, what: str) -> None:
        super().__init__(f"{what}: the registry answered {status}")
        self.status = status
        self.headers = headers
        self.body = body


class Upstreams:
    """The registries. One pool of connections for all of them."""

    def __init__(self, options: RegistryOptions) -> None:
        context = client_context(
            ca_file=options.ca_file, client_cert=options.client_cert, client_key=options.client_key
        )
        self._options = options
        self._pool = HttpPool(ssl_context=context, timeout_s=options.timeout_s)
        self._elsewhere = HttpPool(ssl_context=client_context(ca_file=options.ca_file), timeout_s=options.timeout_s)

    def close(self) -> None:
        """Close idle connections."""
        self._pool.close()
        self._elsewhere.close()

    def target(self, wanted: MirrorRequest) -> Target:
        """Return the URL of what is wanted. Raises ValueError."""
        repository = wanted.repository
        if wanted.registry in DOCKER_HUB and "/" not in repository:
            repository = f"library/{repository}"
        return self._url(
            wanted.registry, f"{repository}/{'blobs' if wanted.is_blob else 'manifests'}/{wanted.reference}"
        )

    def base(self, registry: str) -> Target:
        """Return the URL of a registry's API. Raises ValueError."""
        return self._url(registry, "")

    async def check(self, target: Target, authorization: str | None) -> None:
        """Ask whether a registry's API may be used. Raises RefusedError, RemoteError."""
        async with self.ask(target, _auth(authorization)):
            pass

    def _url(self, registry: str, rest: str) -> Target:
        path = f"{'registry-1.docker.io' if registry in DOCKER_HUB else registry}/v2/{rest}"
        target = parse_url(f"https://{path}")
        if self._options.plain_http or (target.origin.is_loopback and not self._options.asks_for_tls):
            target = parse_url(f"http://{path}")
        return target

    @asynccontextmanager
    async def ask(self, target: Target, headers: Mapping[str, str]) -> AsyncIterator[Response]:
        """Open a GET with a client's fields, redirects followed. Raises RefusedError for what is not 200 or 206."""
        at, home = target, target.origin
        for _ in range(_MOST_REDIRECTS + 1):
            is_home = at.origin == home
            fields = {name: value for name, value in headers.items() if is_home or name.lower() != "authorization"}
            response = await (self._pool if is_home else self._elsewhere).open(at, fields)
            try:
                if response.status in {200, 206}:
                    yield response
                    return
                if response.status not in _REDIRECTS:
                    passed = {name: response.headers.get(name) for name in _PASSED}
                    body = await response.read_text(_MOST_ERROR)
                    raise RefusedError(
                        response.status, {name: value for name, value in passed.items() if value}, body, str(target)
                    )
                following = resolve_url(at, response.headers.get("location") or "")
            except ValueError as error:
                raise RemoteError(f"{target} is redirected to where we cannot go: {error}") from None
            finally:
                response.close()
            if at.origin.is_tls and not following.origin.is_tls:
                raise RemoteError(f"{target} is redirected from https to {following}, which is refused")
            at = following
        raise RemoteError(f"{target} is redirected more than {_MOST_REDIRECTS} times")

    async def blob_length(self, target: Target, authorization: str | None) -> int | None:
        """Return the length of a blob that the client may read, None if its registry knows no ranges. Raises RefusedError, RemoteError."""
        async with self.ask(target, {**_auth(authorization), "Range": "bytes=0-0"}) as response:
            if response.status == 206:
                try:
                    return parse_content_range(response.headers.get("content-range")).total
                except ProtocolError as error:
                    raise RemoteError(f"{target}: {error}") from None
            return response.head.length if response.head.length == 0 else None

    async def manifest(
        self, target: Target, authorization: str | None, accept: str | None
    ) -> tuple[bytes, dict[str, str]]:
        """Return a manifest and the fields that go with it. Raises RefusedError, RemoteError."""
        fields = {**_auth(authorization), "Accept": accept or ACCEPT}
        async with self.ask(target, fields) as response:
            body = await response.read_text(MAX_DOCUMENT)
            passed = {name: response.headers.get(name) for name in _PASSED}
            return body, {name: value for name, value in passed.items() if value}


class BlobOrigin:
    """One blob of a registry, read with one client's credentials: what sections are fetched from. No bytes are believed."""

    def __init__(self, upstreams: Upstreams, target: Target, authorization: str | None, length: int) -> None:
        self._upstreams = upstreams
        self._target = target
        self._authorization = authorization
        self._length = length

    def __str__(self) -> str:
        return str(self._target)

    @property
    def name(self) -> str:
        """How messages call it."""
        return str(self._target)

    @asynccontextmanager
    async def open_range(self, digest: Digest | None, offset: int, length: int) -> AsyncIterator[BlobStream]:
        """Open bytes [offset, offset+length). Raises UnavailableError, RemoteError."""
        fields = {**_auth(self._authorization), "Range": format_range(offset, length)}
        async with self._upstreams.ask(self._target, fields) as response:
            try:
                plan_delivery(response.head, offset, length)
            except (RangeRefusedError, ProtocolError) as error:
                raise RemoteError(f"{self}: {error}") from None
            yield _Stream(response, str(self))


class _Stream:
    def __init__(self, response: Response, what: str) -> None:
        self._response = response
        self._what = what

    async def readinto(self, buffer: memoryview) -> None:
        try:
            await self._response.readinto(buffer)
        except RemoteError as error:
            raise UnavailableError(f"{self._what}: {error}") from error


def _auth(authorization: str | None) -> dict[str, str]:
    return {"Authorization": authorization} if authorization else {}


def error_body(code: str, message: str) -> bytes:
    """Return an error as the distribution specification writes it."""
    return json.dumps({"errors": [{"code": code, "message": message}]}).encode() + b"\n"
