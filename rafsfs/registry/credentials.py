"""Credentials from the docker config: `auths`, `credHelpers`, `credsStore`, identity tokens.

Decided here: where credentials are looked for and in which order (helper for the registry, default helper, `auths`), as docker
does. Rule: a secret lives in a Credential object only; it is never logged, printed or written.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..errors import AccessDeniedError, UsageError

_HELPER_TIMEOUT_S: Final = 20.0
_HELPER_NAME = re.compile(r"\A[A-Za-z0-9._-]{1,64}\Z")
_HUB_KEYS: Final = ("https://index.docker.io/v1/", "docker.io", "index.docker.io", "registry-1.docker.io")


@dataclass(frozen=True, slots=True)
class Credential:
    """What to present to a registry or its token server."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    """A refresh token, exchanged for access tokens by OAuth 2; excludes the password."""


def docker_config_dir(configured: str | None) -> str:
    """Return the directory of docker's config.json: as configured, $DOCKER_CONFIG, or ~/.docker."""
    return configured or os.environ.get("DOCKER_CONFIG") or str(Path("~/.docker").expanduser())


def find_credential(registry: str, configured: str | None = None) -> Credential | None:
    """Return the credential for `registry` (host[:port]), None if there is none. Blocking (may run a helper program).

    Raises UsageError for a config that cannot be read, AccessDeniedError when a helper fails.
    """
    path = os.path.join(docker_config_dir(configured), "config.json")
    try:
        with open(path, "rb") as file:
            config = json.loads(file.read(1 << 20))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"docker config {path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"docker config {path} is not a JSON object")
    names = _names(registry)
    helpers = _section(config, "credHelpers")
    helper = next((helpers[name] for name in names if name in helpers), None) or config.get("credsStore")
    if isinstance(helper, str) and helper:
        found = _ask_helper(helper, names)
        if found:
            return found
    auths = _section(config, "auths")
    for key, entry in auths.items():
        if key in names or _bare(key) in names:
            return _from_entry(entry, path, key)
    return None


def _names(registry: str) -> tuple[str, ...]:
    if registry in _HUB_KEYS:
        return _HUB_KEYS
    return registry, f"https://{registry}", f"http://{registry}"


def _bare(key: str) -> str:
    return re.sub(r"\Ahttps?://", "", key).split("/", 1)[0]


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _from_entry(entry: object, path: str, key: str) -> Credential | None:
    if not isinstance(entry, dict):
        return None
    token = entry.get("identitytoken")
    if isinstance(token, str) and token:
        return Credential(identity_token=token)
    coded = entry.get("auth")
    if isinstance(coded, str) and coded:
        try:
            username, colon, password = base64.b64decode(coded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError) as error:
            raise UsageError(f"docker config {path}: the entry of {key} is not base64 of user:password") from error
        if colon:
            return Credential(username, password.rstrip("\0"))
    user, secret = entry.get("username"), entry.get("password")
    if isinstance(user, str) and isinstance(secret, str) and user:
        return Credential(user, secret)
    return None


def _ask_helper(helper: str, names: tuple[str, ...]) -> Credential | None:
    if not _HELPER_NAME.match(helper):
        raise UsageError(f"credential helper {helper[:64]!r} is not a plain program suffix")
    program = f"docker-credential-{helper}"
    for name in names:
        try:
            done = subprocess.run(
                [program, "get"], input=name.encode(), capture_output=True, timeout=_HELPER_TIMEOUT_S, check=False
            )
        except FileNotFoundError as error:
            raise AccessDeniedError(f"credential helper {program} is not installed or not on PATH") from error
        except subprocess.TimeoutExpired as error:
            raise AccessDeniedError(f"credential helper {program} took over {_HELPER_TIMEOUT_S:g} s") from error
        if done.returncode:
            if b"not found" in done.stdout.lower() + done.stderr.lower():
                continue
            raise AccessDeniedError(f"credential helper {program} failed with exit code {done.returncode}")
        try:
            answer = json.loads(done.stdout)
            username, secret = str(answer["Username"]), str(answer["Secret"])
        except (ValueError, KeyError, TypeError) as error:
            raise AccessDeniedError(f"credential helper {program} gave an answer that is not its protocol") from error
        return Credential(identity_token=secret) if username == "<token>" else Credential(username, secret)
    return None
