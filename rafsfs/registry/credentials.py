"""Credentials from docker's config.json: `credHelpers`, `credsStore`, `auths`.

Decided here: where is looked, in which order: the registry's own helper, the general helper, then the file, where the
most specific entry wins (`host/team/model` before `host/team` before `host`, as podman and Kubernetes have it). Rule: a
secret lives in a Credential and nowhere else; it is not part of any message, repr or log. All calls block: run them in a
thread.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ..errors import AccessDeniedError, UsageError

HELPER_TIMEOUT_S: Final = 20.0
"""Helpers may ask a cloud for a token: seconds, not minutes."""
MAX_CONFIG: Final = 4 << 20
DOCKER_HUB: Final = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_DOCKER_HUB_KEY: Final = "https://index.docker.io/v1/"
_IDENTITY_USER: Final = "<token>"
"""The user name by which a helper says that its secret is an identity token."""
_NOT_FOUND: Final = "credentials not found"


@dataclass(frozen=True, slots=True)
class Credential:
    """What may be shown to a registry or its token server: a name and password, or an identity (refresh) token."""

    source: str
    """Where it comes from, for messages."""
    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The value of a Basic Authorization header."""
        pair = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(pair).decode("ascii")


def docker_config_dir(configured: str | None) -> str:
    """Return the directory of docker's config.json: as configured, else $DOCKER_CONFIG, else ~/.docker."""
    return configured or os.environ.get("DOCKER_CONFIG") or os.path.join(os.path.expanduser("~"), ".docker")


def config_path(configured: str | None) -> str:
    """Return the path of config.json in that directory."""
    return os.path.join(docker_config_dir(configured), "config.json")


def find_credential(
    registry: str,
    configured: str | None = None,
    *,
    repository: str = "",
    helper_timeout_s: float = HELPER_TIMEOUT_S,
) -> Credential | None:
    """Return the credential for a repository, or None if there is none. Blocking, for as long as a helper may take.

    Raises UsageError for a config that cannot be used, AccessDeniedError when a helper fails.
    """
    path = config_path(configured)
    config = _read(path)
    helper = _helper_of(config, registry, path)
    if helper is not None:
        found = _ask_helper(helper, registry, path, helper_timeout_s)
        if found is not None:
            return found
    return _from_auths(config, registry, repository, path)


def _read(path: str) -> Mapping[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG + 1)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UsageError(f"cannot read the docker config {path}: {error.strerror}") from None
    try:
        config = json.loads(data) if data.strip() else {}
    except (ValueError, RecursionError):
        # The text of a JSON error may quote the file, and with it a secret.
        raise UsageError(f"the docker config {path} is not valid JSON; correct it or log in anew") from None
    if not isinstance(config, dict):
        raise UsageError(f"the docker config {path} is not a JSON object; correct it or log in anew")
    return config


def _keys(registry: str) -> tuple[str, ...]:
    """Return the names under which a registry may stand in the config, the most likely first."""
    if registry in DOCKER_HUB:
        return (_DOCKER_HUB_KEY, "docker.io", "index.docker.io", "registry-1.docker.io")
    return (registry, f"https://{registry}", f"http://{registry}")


def _helper_of(config: Mapping[str, Any], registry: str, path: str) -> str | None:
    helpers = config.get("credHelpers") or {}
    if not isinstance(helpers, dict):
        raise UsageError(f"credHelpers of the docker config {path} is not an object")
    helper = next((helpers[key] for key in _keys(registry) if helpers.get(key)), None) or config.get("credsStore")
    if helper is None or helper == "":
        return None
    # A path separator would start any program; docker's helpers are named by a suffix.
    if not isinstance(helper, str) or "/" in helper or not helper.isprintable():
        raise UsageError(f"the docker config {path} names a credential helper that is no name: {helper!r:.60}")
    return helper


def _ask_helper(helper: str, registry: str, path: str, timeout_s: float) -> Credential | None:
    program = f"docker-credential-{helper}"
    server = _keys(registry)[0]
    try:
        # No shell, no terminal: a helper that wants to ask a person fails instead of hanging.
        done = subprocess.run(
            [program, "get"], input=server.encode(), capture_output=True, timeout=timeout_s, check=False
        )
    except FileNotFoundError:
        raise UsageError(
            f"{program}, named as credential helper for {registry} in {path}, is not on PATH; install it or remove it there"
        ) from None
    except subprocess.TimeoutExpired:
        raise AccessDeniedError(f"{program} gave no credentials for {registry} within {timeout_s:g} s") from None
    except OSError as error:
        raise UsageError(f"{program}, named in {path}, cannot be run: {error.strerror}") from None
    if done.returncode != 0:
        told = _first_line(done.stdout) or _first_line(done.stderr)
        if _NOT_FOUND in told.lower():
            return None
        raise AccessDeniedError(
            f"{program} failed for {registry} with exit status {done.returncode}{': ' + told if told else ''}"
        )
    return _parse_helper(done.stdout, program, registry)


def _parse_helper(output: bytes, program: str, registry: str) -> Credential | None:
    try:
        answer = json.loads(output[:MAX_CONFIG])
        username, secret = answer["Username"], answer["Secret"]
    except (ValueError, RecursionError, KeyError, TypeError):
        username = secret = None
    if not isinstance(username, str) or not isinstance(secret, str):
        raise AccessDeniedError(f"{program} gave something else than credentials for {registry}; expected JSON")
    if username == _IDENTITY_USER:
        return Credential(program, identity_token=secret)
    return Credential(program, username, secret) if username or secret else None


def _first_line(output: bytes) -> str:
    """Return what a helper says went wrong; helpers say it on stdout, where they would print secrets as JSON."""
    line = output[:500].decode("utf-8", "replace").strip().splitlines()[:1]
    text = "".join(c for c in (line[0] if line else "") if c.isprintable())
    return "" if text.startswith(("{", "[")) else text[:200]


def _from_auths(config: Mapping[str, Any], registry: str, repository: str, path: str) -> Credential | None:
    auths = config.get("auths") or {}
    if not isinstance(auths, dict):
        raise UsageError(f"auths of the docker config {path} is not an object")
    by_name = {_bare(key): entry for key, entry in auths.items()}
    for name in _names(registry, repository):
        entry = auths.get(name, by_name.get(name))
        if isinstance(entry, dict):
            found = _parse_entry(entry, name, path)
            if found is not None:
                return found
    return None


def _names(registry: str, repository: str) -> list[str]:
    parts = repository.split("/") if repository else []
    scoped = [f"{registry}/{'/'.join(parts[:n])}" for n in range(len(parts), 0, -1)]
    return scoped + [_bare(key) if key != _DOCKER_HUB_KEY else key for key in _keys(registry)]


def _bare(key: str) -> str:
    """Return an `auths` key without scheme and API version: `https://reg.io/v2/` is `reg.io`."""
    bare = key.removeprefix("https://").removeprefix("http://").rstrip("/")
    return bare.removesuffix("/v1").removesuffix("/v2")


def _parse_entry(entry: Mapping[str, Any], name: str, path: str) -> Credential | None:
    source = f"the entry {name} of {path}"
    identity = entry.get("identitytoken")
    if isinstance(identity, str) and identity:
        return Credential(source, identity_token=identity)
    auth = entry.get("auth")
    if isinstance(auth, str) and auth:
        try:
            text = base64.b64decode(auth, validate=True).decode("utf-8")
        except (binascii.Error, ValueError):
            raise UsageError(f"{source} has an auth that is not base64 of user:password; log in anew") from None
        username, colon, password = text.partition(":")
        if not colon:
            raise UsageError(f"{source} has an auth without a colon between user and password; log in anew")
        return Credential(source, username, password.rstrip("\0"))
    user, secret = entry.get("username"), entry.get("password")
    if isinstance(user, str) and isinstance(secret, str) and user:
        return Credential(source, user, secret)
    return None
