"""The node's part of the driver: publish, unpublish, figures and condition of volumes.

Decided here: in which order a volume comes and goes, and that every call may be repeated, in any order, after a crash of
anybody. Publish mounts metadata and returns; bytes follow. A record is written first and removed last (`records`), so unpublish
and `sweep` find what a crash left. Rule: what a pod may read is decided by the registry with the pod's own credentials, never
by what another pod has fetched.

Concurrency: calls run as trio tasks. A second call for a volume in flight gets ABORTED; one that meets `heal` waits for it. Per
shared mount a lock (`mounts`), taken after the volume is claimed; no other locks. A cancelled publish leaves a record and at
most a mount; the next call or `sweep` goes on from there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import trio

from ..errors import MountError, RafsError, UnavailableError
from ..registry.store import open_store
from . import binds, secrets
from .codes import Code, CsiError, code_of
from .dynamic import DynamicVolumes
from .events import UNREADABLE, Events
from .mounts import SharedMounts
from .records import Records, VolumeRecord
from .resolve import pin
from .secrets import Grants
from .volume import POD_KEYS, VolumeSpec, digest_of_id, key_of, mount_key

_log = logging.getLogger(__name__)

_RESOLVE_S: Final = 20.0
HEAL_S: Final = 10.0
"""Between two looks at all mounts."""
PATIENCE: Final = 3
"""A mount that does not answer this many times in a row is aborted."""
_INLINE: Final = "csi.storage.k8s.io/ephemeral"
_HEALTHY: Final = frozenset({"ready", "serving", "mounted"})


@dataclass(frozen=True, slots=True)
class VolumeState:
    """How far a volume is, as `rafs status` has it."""

    volume_id: str
    ref: str
    digest: str
    state: str
    reason: str
    present_bytes: int
    total_bytes: int
    pod: dict[str, str]
    devices: tuple[str, ...] = ()
    """`major:minor` of the mounts that show it: what stat says of a path in it, in the pod too."""
    models: tuple[dict[str, Any], ...] = ()
    """Of a dynamic volume: its models, each as `rafs models ls` has it, with `devices`."""

    @property
    def is_healthy(self) -> bool:
        """Whether pods can read it."""
        return self.state in _HEALTHY


class Node:
    """Volumes of this node. `directory`: the driver's own part of the cache directory."""

    def __init__(
        self, directory: str, mounts: SharedMounts, *, loopback: bool = False, events: Events | None = None
    ) -> None:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self.records = Records(os.path.join(directory, "volumes"))
        self.mounts = mounts
        self.events = events or Events(None, "", "")
        self._grants = Grants(os.path.join(directory, "grants.json"))
        self._directory = directory
        self._dynamic = DynamicVolumes(
            directory, self.records, mounts, self.resolve, self._fill_later, loopback=loopback
        )
        self._busy: set[str] = set()
        self._healing: dict[str, trio.Event] = {}
        self._missed: dict[str, int] = {}
        self._fills: set[str] = set()
        self._nursery: trio.Nursery | None = None

    # ---- calls ---------------------------------------------------------------------------------------------------

    async def publish(
        self,
        volume_id: str,
        target: str,
        spec: VolumeSpec,
        secret: Mapping[str, str],
        attributes: Mapping[str, str],
        *,
        exclusive: bool = False,
    ) -> None:
        """Make a volume appear at `target`; again is fine, with new credentials too. `exclusive`: nowhere else. Raises RafsError."""
        async with self._claim(volume_id):
            old = self._check_others(volume_id, target, spec, exclusive=exclusive)
            auths = secrets.docker_auths(spec, secret, attributes)
            own = self._auth_dir(volume_id)
            changed = await trio.to_thread.run_sync(secrets.write_auths, own, auths)
            pod = {name: attributes[key] for name, key in POD_KEYS.items() if key in attributes}
            if old is not None and not changed and await self._is_good(old):
                return
            pinned = digest_of_id(volume_id)
            known = old.digest if old else (pinned.text if pinned else "")
            try:
                digest = await self.resolve(spec, known, own, auths)
            except BaseException:
                if old is None:  # nothing names it, so nothing would ever remove it
                    secrets.remove_auths(own)
                raise
            key = mount_key(digest, spec.reference.store_name, spec)
            record = VolumeRecord(volume_id, target, spec, digest, key, pod, exclusive=exclusive)
            await trio.to_thread.run_sync(self.records.save, record)
            await self._bring_up(record, auths)
            _log.info("volume published: id=%s target=%s ref=%s digest=%s", volume_id, target, spec.ref, digest)

    def _check_others(self, volume_id: str, target: str, spec: VolumeSpec, *, exclusive: bool) -> VolumeRecord | None:
        """Return the record of a volume at a target, if it is there already. Raises CsiError where it may not be published."""
        old = self.records.find(volume_id, target)
        if old is not None and old.spec != spec:
            raise CsiError(Code.ALREADY_EXISTS, f"volume {volume_id} is at {target} already, with other attributes")
        for other in self.records.of_volume(volume_id):
            if other.target != target and (exclusive or other.exclusive):
                raise CsiError(
                    Code.FAILED_PRECONDITION,
                    f"volume {volume_id} is at {other.target}, and for one pod only (ReadWriteOncePod)",
                )
        return old

    async def publish_dynamic(
        self,
        volume_id: str,
        target: str,
        spec: VolumeSpec,
        secret: Mapping[str, str],
        attributes: Mapping[str, str],
        *,
        exclusive: bool = False,
    ) -> None:
        """Make a volume appear whose pod adds models by itself. Raises RafsError."""
        async with self._claim(volume_id):
            old = self._check_others(volume_id, target, spec, exclusive=exclusive)
            auths = secrets.docker_auths(spec, secret, attributes)
            await trio.to_thread.run_sync(secrets.write_auths, self._auth_dir(volume_id), auths)
            pod = {name: attributes[key] for name, key in POD_KEYS.items() if key in attributes}
            record = old or VolumeRecord(volume_id, target, spec, pod=pod)
            await trio.to_thread.run_sync(self.records.save, record)
            assert self._nursery is not None
            await self._dynamic.publish(record, self._nursery)

    async def unpublish(self, volume_id: str, target: str) -> None:
        """Take a volume away from `target`. Nothing there is fine. Raises RafsError."""
        async with self._claim(volume_id):
            record = self.records.find(volume_id, target)
            await trio.to_thread.run_sync(binds.detach, target)
            await trio.to_thread.run_sync(binds.remove_target, target)
            await trio.to_thread.run_sync(self.records.remove, volume_id, target)
            if not self.records.of_volume(volume_id):
                secrets.remove_auths(self._auth_dir(volume_id))
            if record is None:
                return
            used = await self._dynamic.unpublish(record) if record.spec.dynamic else [record.mount_key]
            for key in used:
                await self.let_go(key)
            _log.info("volume unpublished: id=%s target=%s", volume_id, target)

    async def state(self, volume_id: str, path: str | None = None) -> VolumeState:
        """Return how a volume is. `path`: where it must be published. Raises CsiError NOT_FOUND."""
        records = [r for r in self.records.of_volume(volume_id) if path is None or r.target == os.path.abspath(path)]
        if not records:
            raise CsiError(Code.NOT_FOUND, f"volume {volume_id} is not published {'at ' + path if path else 'here'}")
        return (await self.states(records[:1]))[0]

    async def states(self, records: Iterable[VolumeRecord]) -> list[VolumeState]:
        """Return how volumes are; the daemon is asked once."""
        mounts = await self.mounts.status()
        devices = await trio.to_thread.run_sync(binds.mount_devices)
        return [self._state_of(record, mounts, devices) for record in records]

    def _state_of(
        self, record: VolumeRecord, mounts: Mapping[str, Mapping[str, Any]], devices: Mapping[str, str]
    ) -> VolumeState:
        if record.spec.dynamic:
            return self._dynamic_state_of(record, self._dynamic.described(record, mounts, devices), devices)
        path = self.mounts.path(record.mount_key)
        found = self.mounts.described(path, mounts, devices)
        return VolumeState(record.volume_id, record.spec.ref, record.digest, pod=record.pod, **found)

    def _dynamic_state_of(
        self, record: VolumeRecord, models: Sequence[dict[str, Any]], devices: Mapping[str, str]
    ) -> VolumeState:
        """Return how a volume is whose pod adds models: as its worst model, and well while it has none."""
        device = devices.get(record.target)
        state, reason = ("ready", "") if device else ("lost", "nothing is mounted there")
        for model in models:
            if model["state"] not in _HEALTHY:
                state, reason = model["state"], f"model {model['name']}: {model['reason'] or model['state']}"
        present, total = (sum(model[key] for model in models) for key in ("present_bytes", "total_bytes"))
        return VolumeState(
            record.volume_id, "", "", state, reason, present, total, record.pod,
            (device,) if device else (), tuple(models),
        )  # fmt: skip

    # ---- steps ---------------------------------------------------------------------------------------------------

    async def resolve(self, spec: VolumeSpec, known: str, auth_dir: str, auths: Mapping[str, Any]) -> str:
        """Return the digest of what a volume holds, after the registry has let these credentials see it.

        While the registry is away, credentials that it has accepted before are enough for what is pinned. Raises RemoteError.
        """
        reference = spec.reference
        wanted = known or (reference.digest.text if reference.digest else "")
        try:
            with trio.fail_after(_RESOLVE_S):
                options = self.mounts.registry(auth_dir)
                async with open_store(reference, options) as store:
                    found = (await pin(store, wanted or reference.reference, spec.platform)).text
        except (UnavailableError, trio.TooSlowError) as error:
            if wanted and self._grants.has(reference.store_name, auths):
                _log.warning("registry away, volume is as before: ref=%s digest=%s cause=%s", spec.ref, wanted, error)
                return wanted
            raise UnavailableError(
                f"registry of {spec.ref} does not answer, and these credentials are not known here: {str(error) or 'too slow'}"
            ) from None
        self._grants.add(reference.store_name, auths)
        return found

    async def _bring_up(self, record: VolumeRecord, auths: Mapping[str, Any]) -> None:
        spec = record.spec
        async with self.mounts.lock(record.mount_key):
            path = await self.mounts.ensure(record.mount_key, spec, record.digest, auths)
            if not await self.mounts.is_alive(path):
                raise MountError(f"{path} does not answer; it is made anew, try again")
            if not await self._is_bound(record):
                await trio.to_thread.run_sync(binds.detach, record.target)
                await trio.to_thread.run_sync(
                    lambda: binds.bind(path, spec.sub_path, record.target, executable=spec.executable)
                )
        self._fill_later(spec, record.digest, record.mount_key)

    async def _is_bound(self, record: VolumeRecord) -> bool:
        devices = await trio.to_thread.run_sync(binds.mount_devices)
        there, path = devices.get(record.target), self.mounts.path(record.mount_key)
        if there is None or there == devices.get(path):
            return there is not None
        # The mount was promoted since: what the pod has is as good as long as somebody serves it, and taking it away would show.
        mount = (await self.mounts.status()).get(path)
        return mount is not None and there in mount.get("devices", ())

    async def _is_good(self, record: VolumeRecord) -> bool:
        if not await self._is_bound(record):
            return False
        # The mount first: what hangs is found there once, not by every pod that has it.
        return await self.mounts.is_alive(self.mounts.path(record.mount_key)) and await self.mounts.is_alive(
            record.target
        )

    async def let_go(self, key: str) -> None:
        """Release a shared mount unless another volume uses it; hand it the credentials of one that does."""
        if not key:
            return
        async with self.mounts.lock(key):
            users = self.records.users_of(key)
            if self.records.is_unused(key):
                await self.mounts.release(key)
            elif users:
                auths = await trio.to_thread.run_sync(secrets.read_auths, self._auth_dir(users[0].volume_id))
                await trio.to_thread.run_sync(secrets.write_auths, self.mounts.auth_dir(key), auths)

    def _fill_later(self, spec: VolumeSpec, digest: str, key: str) -> None:
        """See to it that what wants all of its image gets it, also where another volume's mount was there first."""
        if spec.prefetch != "all" or spec.include or spec.exclude:  # a part is filled by its own mount alone
            return
        if self._nursery is not None and key not in self._fills:
            self._fills.add(key)
            self._nursery.start_soon(self._fill, spec, digest, key)

    async def _fill(self, spec: VolumeSpec, digest: str, key: str) -> None:
        try:
            await self.mounts.fill(spec, digest, key)
        except* RafsError as group:
            _log.warning("image is not complete: ref=%s digest=%s cause=%s", spec.ref, digest, group.exceptions[0])
        finally:
            self._fills.discard(key)

    def _auth_dir(self, volume_id: str) -> str:
        return os.path.join(self._directory, "auth", f"volume-{key_of(volume_id)}")

    @asynccontextmanager
    async def _claim(self, volume_id: str) -> AsyncIterator[None]:
        while volume_id in self._healing:  # our own doing is not a call in flight: whoever calls waits for it
            await self._healing[volume_id].wait()
        if volume_id in self._busy:
            raise CsiError(Code.ABORTED, f"another call for volume {volume_id} is in flight")
        self._busy.add(volume_id)
        try:
            yield
        finally:
            self._busy.discard(volume_id)

    @asynccontextmanager
    async def _heal_one(self, volume_id: str) -> AsyncIterator[None]:
        done = self._healing[volume_id] = trio.Event()
        try:
            yield
        finally:
            del self._healing[volume_id]
            done.set()

    # ---- by itself -----------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look after mounts for ever: unused ones go, dead ones are bound anew, hung ones are aborted."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self.events.run)
            await self._dynamic.restore(nursery)
            task_status.started()
            while True:
                try:
                    await self.heal()
                    if self.records.is_whole:
                        await self.mounts.sweep(self.records.mount_keys())
                except RafsError as error:
                    _log.warning("mounts cannot be looked after now: %s", error)
                await trio.sleep(HEAL_S)

    async def heal(self) -> None:
        """Bind volumes anew whose mount has been replaced; abort the FUSE connection of a mount that hangs."""
        for key in self.records.mount_keys():
            path = self.mounts.path(key)
            if await self.mounts.is_alive(path):
                self._missed.pop(key, None)
                continue
            self._missed[key] = self._missed.get(key, 0) + 1
            if self._missed[key] >= PATIENCE and not self.mounts.lock(key).locked():
                async with self.mounts.lock(key):
                    if await self.mounts.abort(key):
                        self._missed.pop(key)
                        _log.error("mount hangs and is aborted: path=%s", path)
        for record in self.records:
            if record.volume_id in self._busy or record.volume_id in self._healing:
                continue
            try:
                await self._heal_volume(record)
            except RafsError as error:
                _log.warning("volume is not readable: id=%s target=%s cause=%s", record.volume_id, record.target, error)
                if code_of(error) is not Code.ABORTED:
                    self.events.post(record.pod, UNREADABLE, f"{record.spec.ref or 'a model'} cannot be read: {error}")

    async def _heal_volume(self, record: VolumeRecord) -> None:
        if record.spec.dynamic:
            await self._dynamic.heal(record)
        elif record.mount_key and not self.mounts.lock(record.mount_key).locked() and not await self._is_good(record):
            async with self._heal_one(record.volume_id):
                auths = await trio.to_thread.run_sync(secrets.read_auths, self._auth_dir(record.volume_id))
                await self._bring_up(record, auths)
                _log.info("volume bound anew: id=%s target=%s", record.volume_id, record.target)


def is_inline(attributes: Mapping[str, str]) -> bool:
    """Tell whether a volume is written in its pod."""
    return attributes.get(_INLINE, "false") == "true"
