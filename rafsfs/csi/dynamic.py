"""Models that a pod adds and removes while it runs: a volume that is a directory of models and a socket to ask for them.

Layout of the volume, as the pod sees it: `rafs.sock`, and a directory per model. It is a small tmpfs, so a pod cannot fill the
node's disk, bound read-only; models are bound into it and reach the pod by mount propagation (`mountPropagation:
HostToContainer`). The API is HTTP on the socket, docs/csi.md. What a pod may add is what an inline volume may name, fetched
with the credentials of this volume.

Concurrency: a task per volume serves its socket, started by publish or, after a restart of the driver, from the records.
Changes of one volume take turns under its lock. A cancelled change leaves a record without a mount, which adding or removing
again puts right.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final
from urllib.parse import unquote

import trio

from ..errors import MountError, RafsError
from ..net.http_server import Answer, HttpServer, Request
from . import binds, secrets
from .codes import Code, CsiError, code_of
from .mounts import SharedMounts
from .records import Records, VolumeRecord
from .volume import VolumeSpec, is_name, key_of, mount_key, parse_attributes

_log = logging.getLogger(__name__)

MOST_MODELS: Final = 32
SOCKET: Final = "rafs.sock"
_STATUS: Final = {
    Code.INVALID_ARGUMENT: 400,
    Code.UNAUTHENTICATED: 403,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.ABORTED: 409,
    Code.RESOURCE_EXHAUSTED: 507,
    Code.UNAVAILABLE: 503,
    Code.DEADLINE_EXCEEDED: 504,
}
_JSON: Final = {"Content-Type": "application/json"}
_KEYS: Final = frozenset({"ref", "prefetch", "mode", "platform", "include", "exclude", "subPath"})

Resolve = Callable[[VolumeSpec, str, str, Mapping[str, Any]], Any]
Fill = Callable[[VolumeSpec, str, str], None]


class DynamicVolumes:
    """The dynamic volumes of a node. `resolve` asks a registry what a reference means, with a volume's credentials; `fill` has all of an
    image fetched, if its spec says so.
    """

    def __init__(
        self, directory: str, records: Records, mounts: SharedMounts, resolve: Resolve, fill: Fill, *, loopback: bool
    ) -> None:
        self._directory = directory
        self._records = records
        self._mounts = mounts
        self._resolve = resolve
        self._fill = fill
        self._loopback = loopback
        self._locks: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)
        self._scopes: dict[str, trio.CancelScope] = {}

    def path(self, record: VolumeRecord) -> str:
        """Return the directory that a volume's target is bound from."""
        return os.path.join(self._directory, "dynamic", record.key)

    def _auth_dir(self, record: VolumeRecord) -> str:
        return os.path.join(self._directory, "auth", f"volume-{key_of(record.volume_id)}")

    async def _auths(self, record: VolumeRecord) -> dict[str, Any]:
        return await trio.to_thread.run_sync(secrets.read_auths, self._auth_dir(record))

    async def publish(self, record: VolumeRecord, nursery: trio.Nursery) -> None:
        """Make a volume appear, its socket answering. Again is fine. Raises RafsError."""
        async with self._locks[record.key]:
            path = self.path(record)
            await trio.to_thread.run_sync(_make_directory, path)
            devices = await trio.to_thread.run_sync(binds.mount_devices)
            if devices.get(record.target) != devices[path]:
                await trio.to_thread.run_sync(binds.detach, record.target)
                await trio.to_thread.run_sync(binds.bind_tree, path, record.target)
            if record.key not in self._scopes:
                await nursery.start(self._serve, record.volume_id, record.target, record.key, path)

    async def unpublish(self, record: VolumeRecord) -> list[str]:
        """Take a volume's models and directory away; return the mounts that it used."""
        scope = self._scopes.pop(record.key, None)
        if scope is not None:
            scope.cancel()
        async with self._locks[record.key]:
            path = self.path(record)
            for name in record.models:
                await trio.to_thread.run_sync(binds.detach, os.path.join(path, name))
            await trio.to_thread.run_sync(binds.detach, path)
            with suppress(OSError):
                os.rmdir(path)
        self._locks.pop(record.key, None)
        return [model["mount_key"] for model in record.models.values()]

    async def restore(self, nursery: trio.Nursery) -> None:
        """Serve the sockets of volumes that a driver before this one published."""
        for record in self._records:
            if record.spec.dynamic:
                try:
                    await self.publish(record, nursery)
                except RafsError as error:
                    _log.warning("dynamic volume is not served: id=%s cause=%s", record.volume_id, error)

    async def _serve(
        self,
        volume_id: str,
        target: str,
        key: str,
        path: str,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        async def handle(request: Request) -> Answer:
            record = self._records.find(volume_id, target)
            if record is None:
                return _answer(404, {"error": "the volume is gone"})
            return await self._handle(record, request)

        server = HttpServer(handle, methods=frozenset({"GET", "PUT", "DELETE"}))
        with trio.CancelScope() as scope:
            self._scopes[key] = scope
            # Whoever runs in the pod may ask, root or not: the volume is seen by this pod alone.
            await server.serve_unix(os.path.join(path, SOCKET), mode=0o666, task_status=task_status)

    async def _handle(self, record: VolumeRecord, request: Request) -> Answer:
        parts = [unquote(part) for part in request.path.strip("/").split("/")]
        try:
            if parts == ["v1", "models"] and request.method == "GET":
                return _answer(200, {"models": await self._list(record)})
            if parts[:2] == ["v1", "models"] and len(parts) == 3:
                if request.method == "PUT":
                    return _answer(200, await self._add(record, parts[2], request.body))
                if request.method == "DELETE":
                    await self._remove(record, parts[2])
                    return _answer(200, {})
                found = [model for model in await self._list(record) if model["name"] == parts[2]]
                if found:
                    return _answer(200, found[0])
        except RafsError as error:
            return _answer(_STATUS.get(code_of(error), 500), {"error": str(error)})
        return _answer(404, {"error": "expected /v1/models or /v1/models/NAME of a model that is here"})

    async def _list(self, record: VolumeRecord) -> list[dict[str, Any]]:
        mounts = await self._mounts.status()
        return self.described(record, mounts, await trio.to_thread.run_sync(binds.mount_devices))

    def described(
        self, record: VolumeRecord, mounts: Mapping[str, Mapping[str, Any]], devices: Mapping[str, str]
    ) -> list[dict[str, Any]]:
        """Return the models of a volume by name, by the daemon's status and the kernel's table."""
        return [
            {
                "name": name,
                "ref": model["spec"]["ref"],
                "digest": model["digest"],
                **self._mounts.described(self._mounts.path(model["mount_key"]), mounts, devices),
            }
            for name, model in sorted(record.models.items())
        ]

    async def _add(self, record: VolumeRecord, name: str, body: bytes) -> dict[str, Any]:
        if not is_name(name) or name == SOCKET:
            raise CsiError(
                Code.INVALID_ARGUMENT, f"{name[:60]!r} cannot be the name of a model: letters, digits, . _ -"
            )
        spec = self._spec_of(body)
        async with self._locks[record.key]:
            record = self._records.find(record.volume_id, record.target) or record
            old = record.models.get(name)
            if old is not None and VolumeSpec.from_json(old["spec"]) != spec:
                raise CsiError(Code.ALREADY_EXISTS, f"model {name} is another one; remove it first")
            if old is None and len(record.models) >= MOST_MODELS:
                raise CsiError(Code.RESOURCE_EXHAUSTED, f"a volume holds at most {MOST_MODELS} models")
            auths = await self._auths(record)
            digest = await self._resolve(spec, old["digest"] if old else "", self._auth_dir(record), auths)
            key = mount_key(digest, spec.reference.store_name, spec)
            model = {"spec": spec.to_json(), "digest": digest, "mount_key": key}
            await trio.to_thread.run_sync(self._records.save, record.with_models({**record.models, name: model}))
            await self._show(record, name, model, auths)
        _log.info("model added: volume=%s name=%s ref=%s digest=%s", record.volume_id, name, spec.ref, digest)
        return {"name": name, "ref": spec.ref, "digest": digest}

    async def heal(self, record: VolumeRecord) -> None:
        """Show again the models of a volume whose mounts are gone or have been replaced. Raises RafsError."""
        async with self._locks[record.key]:
            found = self._records.find(record.volume_id, record.target)
            for name, model in found.models.items() if found else ():
                path = self._mounts.path(model["mount_key"])
                if not (await self._mounts.is_alive(path) and await self._is_shown(record, name)):
                    await self._show(record, name, model, await self._auths(record))
                    _log.info("model bound anew: volume=%s name=%s", record.volume_id, name)

    async def _is_shown(self, record: VolumeRecord, name: str) -> bool:
        place = os.path.join(self.path(record), name)
        return await trio.to_thread.run_sync(binds.device_of, place) is not None and await self._mounts.is_alive(place)

    async def _show(self, record: VolumeRecord, name: str, model: Mapping[str, Any], auths: Mapping[str, Any]) -> None:
        """Make a model appear in its volume, unless it is there and answers. The caller holds the volume's lock."""
        spec, key, digest = VolumeSpec.from_json(model["spec"]), model["mount_key"], model["digest"]
        place = os.path.join(self.path(record), name)
        async with self._mounts.lock(key):
            source = await self._mounts.ensure(key, spec, digest, auths)
            if not await self._mounts.is_alive(source):
                raise MountError(f"{source} does not answer; it is made anew, try again")
            if not await self._is_shown(record, name):
                await trio.to_thread.run_sync(binds.detach, place)
                await trio.to_thread.run_sync(lambda: binds.bind(source, spec.sub_path, place, executable=False))
        self._fill(spec, digest, key)

    def _spec_of(self, body: bytes) -> VolumeSpec:
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict) or not all(
            key in _KEYS and (isinstance(value, str) or (key in {"include", "exclude"} and isinstance(value, list)))
            for key, value in values.items()
        ):
            raise CsiError(Code.INVALID_ARGUMENT, f"the body is not a JSON object of {', '.join(sorted(_KEYS))}")
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
        return parse_attributes(texts, loopback=self._loopback)

    async def _remove(self, record: VolumeRecord, name: str) -> None:
        async with self._locks[record.key]:
            record = self._records.find(record.volume_id, record.target) or record
            model = record.models.get(name)
            if model is None:
                return
            place = os.path.join(self.path(record), name)
            await trio.to_thread.run_sync(binds.detach, place)
            await trio.to_thread.run_sync(binds.remove_target, place)
            left = {other: value for other, value in record.models.items() if other != name}
            await trio.to_thread.run_sync(self._records.save, record.with_models(left))
            key = model["mount_key"]
            async with self._mounts.lock(key):
                if self._records.is_unused(key):
                    await self._mounts.release(key)
        _log.info("model removed: volume=%s name=%s", record.volume_id, name)


def _answer(status: int, value: dict[str, Any]) -> Answer:
    return Answer(status, json.dumps(value).encode() + b"\n", _JSON)


def _make_directory(path: str) -> None:
    """Make the tmpfs of a volume, if it is not there, sharing what is mounted in it later."""
    os.makedirs(path, mode=0o755, exist_ok=True)
    if binds.device_of(path) is None:
        libc = ctypes.CDLL(None, use_errno=True)
        options = b"size=1m,mode=0755"
        if libc.mount(b"rafs-models", os.fsencode(path), b"tmpfs", ctypes.c_ulong(0x2 | 0x4 | 0x8), options):
            raise MountError(f"{path} cannot become a tmpfs: {os.strerror(ctypes.get_errno())}")
    binds.make_shared(path)
