"""Access to one registry: which Authorization header a request carries, and how it is got.

Decided here: one token per scope with its expiry; pull and push scopes differ, so a pull token never stands in the way of a
push. Concurrency: tokens are fetched under one lock, so that a hundred range requests cost one token; the cache is a plain dict,
read and written without a checkpoint between. A cancelled fetch leaves the cache as it was.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Final

import httpx
import trio

from ..errors import AccessDeniedError, RemoteError, UnavailableError
from .challenge import Challenge, parse_challenges
from .credentials import Credential, find_credential

_EARLY_S: Final = 5.0
"""A token is renewed this long before it expires."""
_DEFAULT_LIFE_S: Final = 60.0
"""What the token specification says when the server does not."""


@dataclass(frozen=True, slots=True)
class _Token:
    header: str
    expires: float


class Authorizer:
    """Authorization headers for one repository of one registry."""

    def __init__(self, client: httpx.AsyncClient, registry: str, repository: str, docker_config: str | None) -> None:
        self._client = client
        self._registry = registry
        self._repository = repository
        self._docker_config = docker_config
        self._challenge: Challenge | None = None
        self._tokens: dict[str, _Token] = {}
        self._lock = trio.Lock()
        self._credential: Credential | None = None
        self._looked = False

    def header(self, actions: str) -> str | None:
        """Return the header known for `actions` ("pull" or "pull,push"), None if there is none or it has expired."""
        token = self._tokens.get(actions)
        return token.header if token and token.expires > trio.current_time() else None

    async def answer(self, actions: str, header: str, used: str | None, extra_scope: str | None = None) -> str:
        """Return a new header after a 401 whose WWW-Authenticate is `header`; `used` is what the request carried.

        Raises AccessDeniedError when there is nothing better to present.
        """
        async with self._lock:
            current = self.header(actions)
            if current and current != used:
                return current  # another task has just been through this
            challenges = {challenge.scheme: challenge for challenge in parse_challenges(header)}
            if "bearer" in challenges:
                token = await self._bearer(challenges["bearer"], actions, extra_scope)
            elif "basic" in challenges:
                token = await self._basic(used)
            else:
                raise AccessDeniedError(f"{self._where}: the registry asks for a way to log in that is not known here")
            if not extra_scope:
                self._tokens[actions] = token
            return token.header

    async def has_credential(self) -> bool:
        """Tell whether the docker config has a credential for this registry."""
        return await self._find() is not None

    @property
    def _where(self) -> str:
        return f"{self._registry}/{self._repository}"

    async def _find(self) -> Credential | None:
        if not self._looked:
            self._credential = await trio.to_thread.run_sync(find_credential, self._registry, self._docker_config)
            self._looked = True
        return self._credential

    async def _basic(self, used: str | None) -> _Token:
        credential = await self._find()
        if credential is None or not credential.username:
            raise AccessDeniedError(
                f"{self._where}: access denied, no credentials for {self._registry} in the docker config; "
                f"log in with `docker login {self._registry}`"
            )
        coded = base64.b64encode(f"{credential.username}:{credential.password}".encode()).decode()
        if used == f"Basic {coded}":
            raise AccessDeniedError(
                f"{self._where}: access denied, the registry refuses the docker config's credentials"
            )
        return _Token(f"Basic {coded}", float("inf"))

    async def _bearer(self, challenge: Challenge, actions: str, extra_scope: str | None) -> _Token:
        realm = challenge.parameters.get("realm", "")
        if not realm.startswith(("https://", "http://")):
            raise RemoteError(f"{self._where}: the registry names no token server")
        credential = await self._find()
        scopes = [f"repository:{self._repository}:{actions}"] + ([extra_scope] if extra_scope else [])
        service = challenge.parameters.get("service", "")
        try:
            if credential and credential.identity_token:
                form = {
                    "grant_type": "refresh_token",
                    "service": service,
                    "client_id": "rafs",
                    "scope": " ".join(scopes),
                    "refresh_token": credential.identity_token,
                }
                response = await self._client.post(realm, data=form)
            else:
                login = (credential.username, credential.password) if credential and credential.username else None
                parameters = httpx.QueryParams([("service", service), *(("scope", scope) for scope in scopes)])
                response = await self._client.get(realm, params=parameters, auth=login or httpx.USE_CLIENT_DEFAULT)
        except httpx.HTTPError as error:
            raise UnavailableError(f"{self._where}: the token server cannot be reached: {error}") from error
        return self._read_token(response, credential)

    def _read_token(self, response: httpx.Response, credential: Credential | None) -> _Token:
        if response.status_code in {400, 401, 403}:
            what = (
                "the token server refuses the docker config's credentials"
                if credential
                else f"no credentials for {self._registry} in the docker config; log in with `docker login {self._registry}`"
            )
            raise AccessDeniedError(f"{self._where}: access denied, {what}")
        if response.status_code >= 500 or response.status_code == 429:
            raise UnavailableError(f"{self._where}: the token server answered {response.status_code}")
        try:
            answer = response.json()
            text = answer.get("token") or answer.get("access_token")
            life = float(answer.get("expires_in") or _DEFAULT_LIFE_S)
        except (ValueError, AttributeError, TypeError) as error:
            raise RemoteError(f"{self._where}: the token server's answer is not JSON of a token") from error
        if response.status_code != 200 or not isinstance(text, str) or not text.isascii() or not text.isprintable():
            raise RemoteError(f"{self._where}: the token server answered {response.status_code} without a usable token")
        return _Token(f"Bearer {text}", trio.current_time() + max(life - _EARLY_S, 1.0))
