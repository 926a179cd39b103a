"""Requests to one repository of a registry: authentication, redirects, retries, errors.

Decided here: which answers are tried again, which become which error, and what crosses to another origin: never an
Authorization header, never from TLS to plain HTTP. Small control requests go through httpx; ranges of blobs through
net/http1.py (blob_range.py). Every wait has a bound: `timeout_s` without a byte, the retry policy for the rest.

Concurrency: no task of its own; all methods may run side by side and may be cancelled.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Final, Self

import httpx
import trio

from .. import __version__
from ..errors import RemoteError, UnavailableError, UsageError
from ..net.http1 import HttpPool
from ..net.http_head import Headers
from ..net.origin import Target, parse_url, resolve_url
from ..net.pace import Pace
from ..net.proxy import proxy_for
from ..net.retry import RETRYABLE_STATUSES, RetryPolicy
from ..net.tls import client_context, explain_tls_failure
from .answer import Answer, error_detail
from .auth import Authorizer, Scope
from .credentials import DOCKER_HUB
from .options import RegistryOptions

MAX_REDIRECTS: Final = 5
REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_ERROR_LIMIT: Final = 64 << 10
"""Bytes read of an answer that is not the one wanted."""
_PIECE: Final = 1 << 20
"""Request bodies are handed over in pieces of this size: the time limit is on each."""
_USER_AGENT: Final = f"rafs/{__version__}"


class Remote:
    """One repository of a registry, below the level of manifests and blobs."""

    def __init__(self, registry: str, repository: str, options: RegistryOptions) -> None:
        self.name = f"{registry}/{repository}"
        self.repository = repository
        host = registry
        if registry in DOCKER_HUB:
            # The hub's API lives elsewhere, and its official images below `library`.
            host = "registry-1.docker.io"
            self.repository = repository if "/" in repository else f"library/{repository}"
        try:
            self.base = parse_url(f"https://{host}/v2/{self.repository}/")
            plain = options.plain_http or (self.base.origin.is_loopback and not options.asks_for_tls)
            if plain:
                self.base = parse_url(f"http://{host}/v2/{self.repository}/")
        except ValueError as error:
            raise UsageError(f"registry {registry!r} cannot be addressed: {error}") from None
        self.origin = self.base.origin
        self.plain = plain
        self.rng = random.Random()
        self._timeout_s = options.timeout_s
        self._policy = RetryPolicy(retries=options.retries)
        self._context = client_context(
            ca_file=options.ca_file, client_cert=options.client_cert, client_key=options.client_key
        )
        self._clients: dict[str | None, httpx.AsyncClient] = {}
        self.pool = HttpPool(ssl_context=self._context, timeout_s=options.timeout_s, user_agent=_USER_AGENT)
        self.auth = Authorizer(self, registry, self.repository, docker_config=options.docker_config, plain_http=plain)

    def scope(self, actions: str, *, also_pull: str | None = None) -> Scope:
        """Return the scope of `actions` here, and of pulling from another repository if named."""
        own = Scope.of(self.repository, actions)
        return own if also_pull is None else Scope((*own.resources, (also_pull, "pull")))

    def target(self, path: str) -> Target:
        """Return the URL of a path below this repository, e.g. `manifests/v1`."""
        return Target(self.origin, self.base.path + path)

    def pace(self) -> Pace:
        """Return the retry state for one operation."""
        return Pace(self._policy, self.rng)

    async def call(
        self,
        method: str,
        target: Target,
        *,
        what: str,
        scope: Scope,
        headers: Mapping[str, str] | None = None,
        body: bytes | bytearray | memoryview | None = None,
        limit: int = _ERROR_LIMIT,
        follow: bool = True,
        retry: bool = True,
        patience_s: float = 0.0,
    ) -> Answer:
        """Send a request and return its answer, whatever its status but for those that are errors here.

        A 2xx body over `limit` bytes is refused. `what` names the thing in messages. `patience_s` is added to the wait
        for the answer, for requests that make the registry work. With `retry` off one try is made.
        Raises UnavailableError (after the retries; also for 429 and 5xx), AccessDeniedError (401, 403), RemoteError.
        """
        pace = self.pace()
        while True:
            asked = None
            try:
                answer = await self._authorized(
                    method, target, scope, dict(headers or {}), body, limit, follow, patience_s, what
                )
                if answer.status not in RETRYABLE_STATUSES:
                    return answer
                asked = answer.headers.get("retry-after")
                _, detail = error_detail(answer.body)
                failure = UnavailableError(f"{self.name}: {what}: the registry answered {answer.status}{detail}")
            except UnavailableError as error:
                failure = error
            if not retry:
                raise failure
            await pace.again(failure, asked)

    async def ask_token(
        self, target: Target, *, authorization: str | None, form: Mapping[str, str] | None
    ) -> tuple[int, bytes]:
        """Send a request to a token server. Raises UnavailableError, RemoteError."""
        headers = {"Authorization": authorization} if authorization is not None else {}
        if form is None:
            answer = await self._exchange("GET", target, headers, None, _ERROR_LIMIT * 4, 0.0, "token")
        else:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            encoded = str(httpx.QueryParams(form)).encode("ascii")
            answer = await self._exchange("POST", target, headers, encoded, _ERROR_LIMIT * 4, 0.0, "token")
        return answer.status, answer.body

    def redirected(self, target: Target, location: str | None, what: str) -> Target:
        """Return where a redirect leads. Raises RemoteError for one that must not be followed."""
        try:
            found = resolve_url(target, location or "")
        except ValueError as error:
            raise RemoteError(f"{self.name}: {what} is redirected to nowhere: {error}") from None
        if location is None or (target.origin.is_tls and not found.origin.is_tls):
            raise RemoteError(f"{self.name}: {what} is redirected from TLS to {found}, which is not followed")
        return found

    async def aclose(self) -> None:
        """Close all connections. Idempotent."""
        self.pool.close()
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await client.aclose()

    async def _authorized(
        self,
        method: str,
        target: Target,
        scope: Scope,
        headers: dict[str, str],
        body: bytes | bytearray | memoryview | None,
        limit: int,
        follow: bool,
        patience_s: float,
        what: str,
    ) -> Answer:
        for _ in range(MAX_REDIRECTS + 1):
            at_home = target.origin == self.origin
            header = self.auth.header(scope) if at_home else None
            answer = await self._exchange(method, target, _with(headers, header), body, limit, patience_s, what)
            if answer.status == 401 and at_home:
                header = await self.auth.renew(scope, answer.headers.get_all("www-authenticate"), header)
                answer = await self._exchange(method, target, _with(headers, header), body, limit, patience_s, what)
            if answer.status in {401, 403}:
                _, detail = error_detail(answer.body)
                raise self.auth.denied(f"{what}: {target.origin.netloc} answered {answer.status}{detail}")
            if answer.status not in REDIRECTS or not follow or method not in {"GET", "HEAD"}:
                return answer
            target = self.redirected(target, answer.location, what)
        raise RemoteError(f"{self.name}: {what} is redirected more than {MAX_REDIRECTS} times, last to {target}")

    async def _exchange(
        self,
        method: str,
        target: Target,
        headers: Mapping[str, str],
        body: bytes | bytearray | memoryview | None,
        limit: int,
        patience_s: float,
        what: str,
    ) -> Answer:
        """Send one request and read its answer. Raises UnavailableError when there is none to be had this time."""
        request = httpx.Request(
            method,
            target.url,
            headers={"Host": target.origin.netloc, "User-Agent": _USER_AGENT, "Accept": "*/*", **headers},
            stream=_Pieces(body) if body is not None else None,
            extensions={"timeout": httpx.Timeout(self._timeout_s, read=self._timeout_s + patience_s).as_dict()},
        )
        if body is not None:
            request.headers["Content-Length"] = str(len(body))
        try:
            response = await self._client_for(target).send(request, stream=True)
            try:
                received, is_whole = await _read(response, limit if response.is_success else _ERROR_LIMIT)
            finally:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                    await response.aclose()
        except httpx.HTTPError as error:
            raise self._failure(error, target) from error
        except httpx.InvalidURL as error:
            raise RemoteError(f"{self.name}: {target} cannot be asked: {error}") from None
        if response.is_success and not is_whole:
            raise RemoteError(f"{self.name}: {what} is larger than {limit} bytes, the most accepted")
        raw = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in response.headers.raw]
        return Answer(response.status_code, Headers(raw), received, target)

    def _client_for(self, target: Target) -> httpx.AsyncClient:
        proxy = proxy_for(target.origin)
        url = proxy.url if proxy is not None else None
        if url not in self._clients:
            self._clients[url] = httpx.AsyncClient(
                verify=self._context,
                trust_env=False,  # proxies are chosen by net/proxy.py, the same way for both clients
                proxy=url,
                headers={"User-Agent": _USER_AGENT},
                limits=httpx.Limits(max_connections=32, max_keepalive_connections=8, keepalive_expiry=20.0),
            )
        return self._clients[url]

    def _failure(self, error: httpx.HTTPError, target: Target) -> RemoteError:
        server = target.origin.netloc
        if (told := explain_tls_failure(error, server)) is not None:
            return told
        if isinstance(error, httpx.TimeoutException):
            doing = "connecting to" if isinstance(error, httpx.ConnectTimeout) else "waiting for"
            return UnavailableError(f"{doing} {server} took over {self._timeout_s:g} s")
        if isinstance(error, httpx.ConnectError):
            return UnavailableError(f"cannot connect to {server}: {_cause(error)}")
        return UnavailableError(f"{server}: the exchange broke off: {_cause(error)}")


def _with(headers: Mapping[str, str], authorization: str | None) -> Mapping[str, str]:
    return headers if authorization is None else {**headers, "Authorization": authorization}


class _Pieces(httpx.AsyncByteStream):
    """A request body, piece by piece. No generator: one left behind by a broken request would be a warning."""

    def __init__(self, body: bytes | bytearray | memoryview) -> None:
        self._view = memoryview(body).cast("B")
        self._next = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._next >= len(self._view):
            raise StopAsyncIteration
        piece = bytes(self._view[self._next : self._next + _PIECE])
        self._next += len(piece)
        return piece


async def _read(response: httpx.Response, limit: int) -> tuple[bytes, bool]:
    """Return the body, or about its first `limit` bytes, and whether that is all of it."""
    received = bytearray()
    if response.request.method == "HEAD":
        return b"", True
    try:
        async for piece in response.aiter_bytes():
            if len(received) > limit:
                # Closing under the iteration ends it from within; to leave it would strand its generators.
                await response.aclose()
            else:
                received += piece
    except (httpx.HTTPError, httpx.StreamError):
        if len(received) <= limit:
            raise
    return bytes(received[:limit]), len(received) <= limit


def _cause(error: BaseException) -> str:
    """Return the innermost reason in words: httpx and its parts wrap it several times, trio groups all addresses tried."""
    cause: BaseException = error
    while True:
        if isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        elif cause.__cause__ is not None:
            cause = cause.__cause__
        elif cause.args and isinstance(cause.args[0], BaseException):
            cause = cause.args[0]  # httpcore's way
        else:
            break
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return "".join(c for c in str(text) if c.isprintable())[:150].lower()
