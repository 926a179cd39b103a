"""Registry credentials that come with a volume: from a pod's pull secret or its service account, to files that the node reads.

Decided here: what of a secret is believed, and where it lies. Rule: only `auths` of a docker config is taken: a `credsStore` or
`credHelpers` of a pod would start a program on the node. Files are 0600 in directories of 0700, replaced as a whole; nothing
here is logged. Blocking, small.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import shutil
from collections.abc import Mapping
from typing import Any, Final

from .codes import Code, CsiError
from .volume import VolumeSpec

_MOST: Final = 1 << 20
_DOCKER_JSON: Final = ".dockerconfigjson"
_TOKENS: Final = "csi.storage.k8s.io/serviceAccount.tokens"


def docker_auths(spec: VolumeSpec, secrets: Mapping[str, str], attributes: Mapping[str, str]) -> dict[str, Any]:
    """Return the `auths` of a docker config for what Kubernetes handed over with a volume. Raises CsiError without quoting it."""
    auths: dict[str, Any] = {}
    text = secrets.get(_DOCKER_JSON)
    if text is not None:
        auths = _auths(text)
    elif "username" in secrets and "password" in secrets and spec.ref:
        pair = f"{secrets['username']}:{secrets['password']}".encode()
        auths = {spec.reference.registry: {"auth": base64.b64encode(pair).decode()}}
    elif secrets:
        raise _bad(f"the volume's secret has neither {_DOCKER_JSON} nor username and password")
    if spec.token_audience and spec.ref:
        token = _token(attributes.get(_TOKENS, ""), spec.token_audience)
        auths[spec.reference.registry] = {"identitytoken": token}
    return auths


def _auths(text: str) -> dict[str, Any]:
    if len(text) > _MOST:
        raise _bad("the volume's secret is larger than 1 MiB")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        raise _bad(f"{_DOCKER_JSON} of the volume's secret is not JSON") from None
    auths = config.get("auths") if isinstance(config, dict) else None
    if not isinstance(auths, dict):
        raise _bad(f"{_DOCKER_JSON} of the volume's secret has no auths")
    return {str(key): value for key, value in auths.items() if isinstance(value, dict)}


def _token(text: str, audience: str) -> str:
    try:
        token = json.loads(text)[audience]["token"]
    except (ValueError, KeyError, TypeError):
        token = None
    if not isinstance(token, str) or not token:
        raise _bad(
            f"no service account token for the audience {audience[:80]!r} came with the volume; list it in tokenRequests of the CSIDriver"
        )
    return token


def write_auths(directory: str, auths: Mapping[str, Any]) -> bool:
    """Write a docker config with these `auths`; return whether that changed it."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    data = json.dumps({"auths": auths}, sort_keys=True).encode()
    path = os.path.join(directory, "config.json")
    try:
        with open(path, "rb") as file:
            if file.read() == data:
                return False
    except FileNotFoundError:
        pass
    temporary = f"{path}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
    os.rename(temporary, path)
    return True


def read_auths(directory: str) -> dict[str, Any]:
    """Return the `auths` that were written; none if there are none."""
    try:
        with open(os.path.join(directory, "config.json"), "rb") as file:
            return dict(json.loads(file.read(_MOST))["auths"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def remove_auths(directory: str) -> None:
    """Forget them."""
    shutil.rmtree(directory, ignore_errors=True)


class Grants:
    """Which credentials have been accepted for which repository: so that what is cached can be had while the registry is away, but not by
    somebody whom it never let in. Holds keyed hashes only.
    """

    _MOST: Final = 10_000

    def __init__(self, path: str) -> None:
        self._path = path
        self._known: list[str] = []
        self._key = os.urandom(32)
        try:
            with open(path, "rb") as file:
                data = json.loads(file.read(_MOST))
            self._key = bytes.fromhex(data["key"])
            self._known = [str(item) for item in data["known"]][-self._MOST :]
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def _name(self, repository: str, auths: Mapping[str, Any]) -> str:
        text = json.dumps([repository, auths], sort_keys=True).encode()
        return hmac.new(self._key, text, hashlib.sha256).hexdigest()[:32]

    def has(self, repository: str, auths: Mapping[str, Any]) -> bool:
        """Tell whether a registry has accepted these for a repository."""
        return self._name(repository, auths) in self._known

    def add(self, repository: str, auths: Mapping[str, Any]) -> None:
        """Note that it has."""
        name = self._name(repository, auths)
        if name in self._known:
            return
        self._known = [*self._known, name][-self._MOST :]
        temporary = f"{self._path}.new"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump({"key": self._key.hex(), "known": self._known}, file)
        os.rename(temporary, self._path)


def _bad(message: str) -> CsiError:
    return CsiError(Code.INVALID_ARGUMENT, message)
