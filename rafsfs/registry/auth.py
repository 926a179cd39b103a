"""Which Authorization header goes with a request to one registry, and how it is got.

Decided here: a header per scope (repository and actions: pull and push differ), learned from the registry's 401 and
kept until it expires. Concurrency: renewals of one scope take turns under a lock of that scope, so that a hundred
ranged GETs that meet a 401 together fetch one token; the caches are changed without a checkpoint between look and
write. A cancelled renewal leaves the caches as they were and the next in line fetches. Rule: headers made here go to
the registry's own origin only, and credentials over plain HTTP only where the registry itself is plain HTTP or the
token server is on loopback.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from ..errors import AccessDeniedError, RemoteError, UnavailableError
from ..net.origin import Target, parse_url
from ..net.retry import RETRYABLE_STATUSES
from .challenge import Challenge, parse_challenges
from .credentials import Credential, config_path, find_credential

DEFAULT_LIFE_S: Final = 60.0
"""Life of a token that does not say (distribution token specification)."""
EARLY_S: Final = 5.0
"""A token is not used in its last seconds: the request takes its time too."""
MAX_TOKEN: Final = 64 << 10
_CLIENT_ID: Final = "rafs"


@dataclass(frozen=True, slots=True)
class Scope:
    """What a request wants to do: `resources` are (repository, actions) pairs, actions like `pull` or `pull,push`."""

    resources: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, repository: str, actions: str) -> Scope:
        """Return the scope of `actions` on one repository."""
        return cls(((repository, actions),))

    def widened(self, asked: str) -> list[str]:
        """Return scope texts: these, and what the registry's challenge asks for (hub and proxies know other names)."""
        merged: dict[str, list[str]] = {}
        texts = [f"repository:{repository}:{actions}" for repository, actions in self.resources]
        for text in [*texts, *asked.split()]:
            name, colon, actions = text.rpartition(":")
            if colon and name.count(":"):
                known = merged.setdefault(name, [])
                known += [action for action in actions.split(",") if action and action not in known]
        return [f"{name}:{','.join(actions)}" for name, actions in merged.items()]


class TokenClient(Protocol):
    """Sends one request to a token server, without retries and redirects."""

    async def ask_token(
        self, target: Target, *, authorization: str | None, form: Mapping[str, str] | None
    ) -> tuple[int, bytes]:
        """GET, or POST a form; return status and bounded body. Raises UnavailableError."""


@dataclass(frozen=True, slots=True)
class _Grant:
    header: str
    good_until: float


class Authorizer:
    """Authorization for one repository's registry. `docker_config` is the directory of docker's config.json."""

    def __init__(
        self, client: TokenClient, registry: str, repository: str, *, docker_config: str | None, plain_http: bool
    ) -> None:
        self._client = client
        self._registry = registry
        self._repository = repository
        self._docker_config = docker_config
        self._plain_http = plain_http
        self._grants: dict[Scope, _Grant] = {}
        self._locks: dict[Scope, trio.Lock] = {}
        self._credential: Credential | None = None
        self._look = trio.Lock()

    def header(self, scope: Scope) -> str | None:
        """Return the header to send with a request of `scope`: None until the registry has asked for one."""
        grant = self._grants.get(scope)
        if grant is None or trio.current_time() >= grant.good_until:
            return None
        return grant.header

    async def renew(self, scope: Scope, challenges: list[str], rejected: str | None) -> str:
        """Return another header than `rejected` after a 401 with these WWW-Authenticate fields.

        Raises AccessDeniedError if there is none to be had, UnavailableError if the token server cannot be reached.
        """
        async with self._locks.setdefault(scope, trio.Lock()):
            current = self.header(scope)
            if current is not None and current != rejected:
                return current
            grant = await self._obtain(scope, parse_challenges(challenges))
            if grant.header == rejected:
                self._grants.pop(scope, None)
                raise self.denied("the registry refuses them")
            self._grants[scope] = grant
            return grant.header

    def denied(self, why: str) -> AccessDeniedError:
        """Return the error of a refusal, saying which credentials were used or where none were found."""
        if self._credential is not None:
            what = f"credentials are from {self._credential.source}"
        else:
            what = (
                f"no credentials for {self._registry} were found in {config_path(self._docker_config)}; "
                f"log in with `docker login {self._registry}`"
            )
        return AccessDeniedError(f"access to {self._registry}/{self._repository} denied ({why}); {what}")

    async def look_up(self) -> Credential | None:
        """Return the configured credential as it is now: it may have been rotated since the last one. Helpers run in a thread."""
        async with self._look:
            # Abandoned on cancellation: the helper ends by its own time limit and nobody waits for it.
            self._credential = await trio.to_thread.run_sync(
                lambda: find_credential(self._registry, self._docker_config, repository=self._repository),
                abandon_on_cancel=True,
            )
            return self._credential

    async def _obtain(self, scope: Scope, challenges: list[Challenge]) -> _Grant:
        credential = await self.look_up()
        by_scheme = {challenge.scheme: challenge for challenge in reversed(challenges)}
        if "bearer" in by_scheme:
            return await self._fetch_token(scope, by_scheme["bearer"], credential)
        if "basic" in by_scheme:
            if credential is None or not credential.username:
                raise self.denied("it wants a user and password")
            return _Grant(credential.basic, math.inf)
        names = ", ".join(by_scheme)[:60] or "nothing"
        raise AccessDeniedError(
            f"{self._registry} asks for authentication by {names}, expected Bearer or Basic; is it an OCI registry?"
        )

    async def _fetch_token(self, scope: Scope, challenge: Challenge, credential: Credential | None) -> _Grant:
        realm = challenge.parameters.get("realm", "")
        try:
            target = parse_url(realm)
        except ValueError as error:
            raise RemoteError(f"{self._registry} names a token server that is none: {error}") from None
        origin = target.origin
        if not (origin.is_tls or self._plain_http or origin.is_loopback):
            raise RemoteError(
                f"{self._registry} sends us to the token server {target} without TLS; credentials are not sent there"
            )
        service = challenge.parameters.get("service", "")
        scopes = scope.widened(challenge.parameters.get("scope", ""))
        if credential is not None and credential.identity_token:
            form = {
                "grant_type": "refresh_token",
                "service": service,
                "client_id": _CLIENT_ID,
                "scope": " ".join(scopes),
                "refresh_token": credential.identity_token,
            }
            status, body = await self._client.ask_token(target, authorization=None, form=form)
        else:
            asked = target.with_query([("service", service), *(("scope", text) for text in scopes)])
            basic = credential.basic if credential is not None and credential.username else None
            status, body = await self._client.ask_token(asked, authorization=basic, form=None)
        return self._read_answer(target, status, body)

    def _read_answer(self, target: Target, status: int, body: bytes) -> _Grant:
        if status in RETRYABLE_STATUSES:
            raise UnavailableError(f"the token server {target} answered {status}")
        if status in {400, 401, 403}:
            raise self.denied(f"the token server {target} answered {status}")
        if status != 200:
            raise RemoteError(f"the token server {target} answered {status}, expected 200")
        try:
            answer = json.loads(body)
            token = answer.get("token") or answer.get("access_token")
            life = answer.get("expires_in")
        except (ValueError, RecursionError, AttributeError):
            token = life = None
        if not isinstance(token, str) or not token or len(token) > MAX_TOKEN or not _is_header_text(token):
            raise RemoteError(f"the token server {target} gave no token that we can use")
        life_s = DEFAULT_LIFE_S
        if isinstance(life, int | float) and not isinstance(life, bool) and math.isfinite(life) and life > 0:
            life_s = float(life)
        return _Grant(f"Bearer {token}", trio.current_time() + max(life_s - EARLY_S, life_s / 2))


def _is_header_text(text: str) -> bool:
    return all(0x21 <= ord(c) <= 0x7E for c in text)
