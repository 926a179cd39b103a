"""The mounts that volumes share: one per image, repository and view, made by the node daemon, used by any number of pods.

Decided here: one mount for all pods of a model rather than one each. A file system has one page cache, so ten pods that map 100
GiB of weights share the pages; with a mount each they would hold ten copies, or evict each other's. The price, that a worker
which dies takes the model from all of them, is bounded: the daemon makes the mount anew and `heal` binds it again
(docs/csi.md).

Concurrency: one trio run. A mount is made, used and released under a lock of its own; the daemon is asked over a connection per
call, each with a deadline. Cancelled, a call leaves at most a mount that nobody uses, which `sweep` finds.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

import trio

from ..daemon.connection import open_connection
from ..daemon.launch import start_daemon
from ..errors import DaemonError, DeadlineError, MountError, MountpointError, RafsError
from ..registry.options import RegistryOptions
from . import binds, secrets
from .codes import Code, CsiError
from .volume import VolumeSpec

_log = logging.getLogger(__name__)

CALL_S: Final = 60.0
"""A call of the daemon; the kubelet waits two minutes for a publish."""
AWAY_S: Final = 15.0
"""How long a daemon may be away: one that is restarted is back in two seconds."""
PROBE_S: Final = 5.0
"""A stat of a mount that takes longer counts as no answer."""


class SharedMounts:
    """Mounts below `directory`, by key."""

    def __init__(
        self, directory: str, cache_dir: str, registry: RegistryOptions, *, scheduler: str, may_start: bool
    ) -> None:
        self.directory = directory
        self._cache_dir = cache_dir
        self._registry = registry
        self._scheduler = scheduler
        self._may_start = may_start
        self._locks: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)
        self._hung: dict[str, threading.Event] = {}
        """Of paths whose last probe was not done in time: set when it is."""
        self._probes = trio.CapacityLimiter(math.inf)

    def path(self, key: str) -> str:
        """Return where a mount is."""
        return os.path.join(self.directory, "mounts", key)

    def auth_dir(self, key: str) -> str:
        """Return the directory of the docker config that a mount's fetches use."""
        return os.path.join(self.directory, "auth", f"mount-{key}")

    def lock(self, key: str) -> trio.Lock:
        """Return the lock of a mount: held while it is made, bound or released."""
        return self._locks[key]

    async def ensure(self, key: str, spec: VolumeSpec, digest: str, auths: Mapping[str, Any]) -> str:
        """Return the path of a mount, made if it is not there. The caller holds its lock. Raises RafsError."""
        path = self.path(key)
        await trio.to_thread.run_sync(secrets.write_auths, self.auth_dir(key), auths)
        status = (await self.status()).get(path)
        if status is not None and status["state"] == "failed":
            await self.call("umount", {"mountpoint": path, "lazy": True})
            status = None
        if status is None:
            await trio.to_thread.run_sync(lambda: os.makedirs(path, mode=0o700, exist_ok=True))
            params = {
                "ref": pinned(spec.ref, digest),
                "mountpoint": path,
                "mode": spec.mode,
                "prefetch": spec.prefetch,
                "scheduler": self._scheduler,
                "registry": asdict(self.registry(self.auth_dir(key))),
            }
            if spec.include or spec.exclude:
                params |= {"include": list(spec.include), "exclude": list(spec.exclude)}
            try:
                await self.call("mount", params)
            except MountpointError:
                # A leftover of a daemon that is gone: nobody of ours is behind it.
                await trio.to_thread.run_sync(binds.detach, path)
                await self.call("mount", params)
        if await trio.to_thread.run_sync(binds.device_of, path) is None:
            raise CsiError(
                Code.INTERNAL,
                f"the daemon's mount {path} is not seen here; the driver needs the cache directory with mount propagation",
            )
        return path

    def registry(self, docker_config: str) -> RegistryOptions:
        """Return how the registry is reached with the credentials in a directory."""
        return RegistryOptions(**{**asdict(self._registry), "docker_config": docker_config})

    async def release(self, key: str) -> None:
        """Take a mount away that no volume uses. The caller holds its lock. What the daemon cannot do now, `sweep` does."""
        path = self.path(key)
        try:
            await self.call("umount", {"mountpoint": path, "lazy": True})
        except MountError as error:
            _log.debug("mount is not the daemon's: path=%s cause=%s", path, error)
        await trio.to_thread.run_sync(binds.detach, path)
        await trio.to_thread.run_sync(secrets.remove_auths, self.auth_dir(key))
        try:
            os.rmdir(path)
        except OSError as error:
            _log.debug("directory of a mount stays: path=%s cause=%s", path, error)

    async def sweep(self, used: set[str]) -> None:
        """Take away the mounts that no volume uses: leftovers of calls that were cut off."""
        try:
            names = os.listdir(os.path.join(self.directory, "mounts"))
        except FileNotFoundError:
            return
        for key in names:
            if key not in used and not self.lock(key).locked():
                async with self.lock(key):
                    try:
                        await self.release(key)
                    except RafsError as error:
                        _log.warning("unused mount stays for now: path=%s cause=%s", self.path(key), error)

    async def is_alive(self, path: str) -> bool:
        """Tell whether what is mounted at a path answers within PROBE_S.

        A probe that hangs keeps its thread until the mount's connection is aborted. So there is one of a path, of no thread that others
        wait for.
        """
        before = self._hung.get(path)
        if before is not None and not before.is_set():
            return False
        done = threading.Event()

        def probe() -> bool:
            try:
                return binds.is_alive(path)
            finally:
                done.set()

        with trio.move_on_after(PROBE_S):
            alive = await trio.to_thread.run_sync(probe, abandon_on_cancel=True, limiter=self._probes)
            self._hung.pop(path, None)
            return alive
        self._hung[path] = done
        return False

    async def abort(self, key: str) -> bool:
        """End a mount that hangs: whoever waits for it gets ENOTCONN, its worker is killed, the next `ensure` makes it anew. Return
        whether there was one. Raises RafsError if the daemon does not answer.
        """
        path = self.path(key)
        device = await trio.to_thread.run_sync(binds.device_of, path)
        if device is None:
            return False
        # A worker that hangs in the kernel does not die of a signal. Aborting its connection needs fusectl, which not every node mounts.
        if not await trio.to_thread.run_sync(binds.abort_fuse, device):
            _log.debug("connection cannot be aborted: path=%s device=%s", path, device)
        await self.call("umount", {"mountpoint": path, "lazy": True})
        return True

    async def status(self) -> dict[str, dict[str, Any]]:
        """Return the daemon's mounts by mountpoint."""
        answer = await self.call("status", {})
        return {mount["mountpoint"]: mount for mount in answer["mounts"]}

    def described(
        self, path: str, mounts: Mapping[str, Mapping[str, Any]], devices: Mapping[str, str]
    ) -> dict[str, Any]:
        """Return `state`, `reason`, `present_bytes`, `total_bytes` and `devices` of a mount, by the daemon and the kernel's table."""
        mount = mounts.get(path)
        if mount is None:
            mount = {"state": "lost", "reason": "the daemon has no mount of it", "present_bytes": 0, "data_bytes": 0}
        shown = {*mount.get("devices", ()), devices.get(path)} - {None}
        return {
            "state": mount["state"],
            "reason": mount["reason"] or "",
            "present_bytes": mount["present_bytes"],
            "total_bytes": mount["data_bytes"],
            "devices": tuple(sorted(shown)),
        }

    async def fill(self, spec: VolumeSpec, digest: str, key: str) -> None:
        """Fetch all of an image, for however long that takes; for a mount that was made without."""
        params = {
            "ref": pinned(spec.ref, digest),
            "registry": asdict(self.registry(self.auth_dir(key))),
            "scheduler": self._scheduler,
        }
        async with open_connection(self._cache_dir) as connection:
            await connection.call("pull", params)

    async def call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """Call the daemon. Raises DaemonError if it is not there, DeadlineError, and what it says."""
        if self._may_start:
            await start_daemon(self._cache_dir)
        result: dict[str, Any] | None = None
        failure: RafsError | None = None
        began = trio.current_time()
        with trio.move_on_after(CALL_S):
            while True:
                try:
                    async with open_connection(self._cache_dir) as connection:
                        result = await connection.call(method, params)
                        failure = None
                except* RafsError as group:
                    failure = next(iter(_leaves(group)))
                except* OSError as group:
                    failure = DaemonError(f"the node daemon of {self._cache_dir}: {group.exceptions[0]}")
                if not isinstance(failure, DaemonError) or trio.current_time() - began > AWAY_S:
                    break
                await trio.sleep(0.2)
        if failure is not None:
            raise failure
        if result is None:
            raise DeadlineError(f"the node daemon of {self._cache_dir} did not answer {method} within {CALL_S:g} s")
        return result


def _leaves(group: BaseExceptionGroup[Any]) -> list[RafsError]:
    found: list[RafsError] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found or [DaemonError("the daemon went away")]


def pinned(ref: str, digest: str) -> str:
    """Return a reference with this digest."""
    return f"{ref.partition('@')[0]}@{digest}"
