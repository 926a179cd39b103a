"""The controller's part of the driver: it provisions names, not bytes. CreateVolume asks the registry what a tag means now.

Decided here: a provisioned volume's id holds the digest that its tag had, so every node mounts the same content for as long as
the volume lives, and needs to ask nobody. What is kept on disk is only what idempotency asks for: which name was created with
which size and content. Concurrency: trio tasks; one call per name at a time, the second gets ABORTED. Blocking writes are one
small file, replaced as a whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import trio

from ..errors import CacheError, UnavailableError
from ..format.manifest import parse_manifest
from ..registry.options import RegistryOptions
from ..registry.store import open_store
from ..types import Digest
from . import secrets
from .codes import Code, CsiError
from .resolve import pin
from .volume import VolumeSpec, digest_of_id, key_of, volume_id

_RESOLVE_S: Final = 30.0
_MOST: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Provisioned:
    """A volume that has been created."""

    id: str
    ref: str
    capacity: int
    """What was asked for, bytes; images have the size that they have."""
    attributes: dict[str, str]


class Controller:
    """Creates and forgets volumes."""

    def __init__(self, directory: str, registry: RegistryOptions) -> None:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._directory = directory
        self._registry = registry
        self._path = os.path.join(directory, "provisioned.json")
        self._busy: set[str] = set()
        self._volumes: dict[str, Provisioned] = self._load()

    def _load(self) -> dict[str, Provisioned]:
        try:
            with open(self._path, "rb") as file:
                return {name: Provisioned(**values) for name, values in json.loads(file.read(_MOST)).items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            raise CacheError(
                f"{self._path} cannot be read: {error}; volumes that exist do not need it, remove it"
            ) from None

    def _save(self) -> None:
        fields = ("id", "ref", "capacity", "attributes")
        data = {name: {key: getattr(volume, key) for key in fields} for name, volume in self._volumes.items()}
        fd = os.open(f"{self._path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(data, file, indent=1, sort_keys=True)
        os.rename(f"{self._path}.new", self._path)

    async def create(
        self,
        name: str,
        spec: VolumeSpec,
        parameters: Mapping[str, str],
        secret: Mapping[str, str],
        *,
        required: int,
        limit: int,
    ) -> Provisioned:
        """Return the volume of a name, its tag resolved once. Raises RafsError; NOT_FOUND for an image that is not there."""
        async with self._claim(name):
            old = self._volumes.get(name)
            if old is not None:
                if old.capacity < required or (limit and old.capacity > limit) or old.ref != spec.ref:
                    raise CsiError(
                        Code.ALREADY_EXISTS,
                        f"volume {name} exists with {old.capacity} bytes of {old.ref}, asked for {required} of {spec.ref}",
                    )
                if {**old.attributes, "ref": ""} != {**parameters, "ref": ""}:
                    raise CsiError(Code.ALREADY_EXISTS, f"volume {name} exists with other parameters")
                return old
            digest, size = await self._look(name, spec, secret)
            if limit and size > limit:
                raise CsiError(Code.OUT_OF_RANGE, f"{spec.ref} has {size} bytes, at most {limit} are asked for")
            attributes = {**parameters, "ref": f"{spec.ref.partition('@')[0]}@{digest.text}"}
            volume = Provisioned(volume_id(name, digest), spec.ref, max(required, size), attributes)
            self._volumes[name] = volume
            await trio.to_thread.run_sync(self._save)
            return volume

    async def _look(self, name: str, spec: VolumeSpec, secret: Mapping[str, str]) -> tuple[Digest, int]:
        directory = os.path.join(self._directory, f"auth-{key_of(name)}")
        secrets.write_auths(directory, secrets.docker_auths(spec, secret, {}))
        options = RegistryOptions(
            plain_http=self._registry.plain_http,
            ca_file=self._registry.ca_file,
            client_cert=self._registry.client_cert,
            client_key=self._registry.client_key,
            docker_config=directory,
            timeout_s=self._registry.timeout_s,
        )
        try:
            with trio.fail_after(_RESOLVE_S):
                async with open_store(spec.reference, options) as store:
                    digest = await pin(store, spec.reference.reference, spec.platform)
                    _, data = await store.get_manifest(digest.text)
        except trio.TooSlowError:
            raise UnavailableError(f"registry of {spec.ref} did not answer within {_RESOLVE_S:g} s") from None
        finally:
            secrets.remove_auths(directory)
        return digest, sum(blob.size for blob in parse_manifest(data).blobs)

    async def delete(self, identity: str) -> None:
        """Forget a volume. One that is not known is fine: nothing of it is anywhere but on nodes, which look after themselves."""
        names = [name for name, volume in self._volumes.items() if volume.id == identity]
        for name in names:
            async with self._claim(name):
                self._volumes.pop(name, None)
                await trio.to_thread.run_sync(self._save)

    def exists(self, identity: str) -> bool:
        """Tell whether an id is that of a provisioned volume."""
        return digest_of_id(identity) is not None

    @asynccontextmanager
    async def _claim(self, name: str) -> AsyncIterator[None]:
        if name in self._busy:
            raise CsiError(Code.ABORTED, f"another call for volume {name} is in flight")
        self._busy.add(name)
        try:
            yield
        finally:
            self._busy.discard(name)
