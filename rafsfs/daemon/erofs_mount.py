"""A mount that the kernel's EROFS reads, as the daemon sees it: its generations, and when one follows another. See serving.py.

Decided here: the order of steps, of which every prefix is safe to die in. Rules. A data file becomes a plain device only while its data
space is settled (complete and on the disk), through the descriptor that the presence map speaks of. What a worker serves is with the
holder before the superblock exists. A generation is in the record before it is attached. A group of kernel mode is let go of only after its
superblock has gone or its last mark was taken away; as long as somebody has a generation open, its data spaces count as in use.

Concurrency: `supervise` owns the nursery of `Serving`, and is the only task that makes, replaces and ends generations;
`look` and the workers' calls only wake it. Waiting for the kernel happens in threads; nothing here touches the mount itself.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

import trio

from ..erofs import superblock, syscalls
from ..erofs.file_map import FileMap, map_files
from ..erofs.generation import Generation, from_record, promotion
from ..erofs.holdings import Holdings
from ..erofs.keepers import keepers
from ..errors import MountError, RafsError
from ..fetch.source import Source
from ..fuse.mountpoint import is_mounted, unmount
from ..fuse.spec import MountSpec
from ..store.boot import boot_id
from ..store.cache import CachedImage
from ..store.data_space import DataSpace
from .mounts import Mount, rss_bytes
from .serving import Running, Serving

_log = logging.getLogger(__name__)
T = TypeVar("T")

_KERNEL_S: Final = 30.0
"""Longest wait for a mount whose files a worker of ours serves."""
_LET_GO_S: Final = (0.3, 1.7)
"""How long `rafs umount` waits for the kernel to let a superblock go: before it asks whether somebody keeps it; if nobody does, again."""
_AGAIN_S: Final = 30.0
"""Before a promotion that failed is tried again."""


class ErofsMount(Mount):
    """A mount of rung erofs, lazy or kernel."""

    def __init__(
        self,
        spec: MountSpec,
        source: Source,
        data_bytes: int,
        log_path: str,
        *,
        image: CachedImage,
        spaces: Sequence[DataSpace],
        holdings: Holdings,
    ) -> None:
        super().__init__(spec, source, data_bytes, log_path)
        self._image = image
        self._spaces = spaces
        self._holdings = holdings
        self._running: list[Running] = []
        self._changed = trio.Event()
        self._serving = Serving(
            spec,
            spaces,
            holdings,
            self._running,
            changed=self.look,
            worker_died=self._note_death,
            failed=self._note_failure,
        )
        self._promoted_at = -_AGAIN_S
        self._files: FileMap | None = None
        self._numbers = {space.space_id: number for number, space in enumerate(spaces)}

    # ---- what others call ----------------------------------------------------------------------------------------

    def look(self) -> None:
        """See whether something is to be done: something may be complete now, or gone. No checkpoint."""
        self._changed.set()

    def worker_ready(self, generation: int) -> None:
        """Note that a worker is connected."""
        self.look()

    def served(self, cache_bytes: int, generation: int = 0) -> int:
        """Note what the worker of a generation has served from present data since it started; return what is new."""
        fresh = 0
        for running in self._running:
            if running.record.number == generation:
                fresh = max(0, cache_bytes - running.cache_bytes)
                running.cache_bytes = cache_bytes
        self.cache_bytes = sum(running.cache_bytes for running in self._running)
        return fresh

    def heard(self, generation: int = 0) -> None:
        """Note that the worker of a generation spoke, as it does every BEAT_S."""
        for running in self._running:
            if running.record.number == generation:
                running.pulse.heard()

    def own_chunks(self, space: DataSpace, chunks: range) -> range:
        """Return the chunks of the file that `chunks` belong to; just those while that is not known."""
        number = self._numbers.get(space.space_id)
        return chunks if self._files is None or number is None else self._files.own(number, space.table, chunks)

    def status(self) -> dict[str, Any]:
        """Return the mount's part of `rafs status --json`, but for present_bytes."""
        workers = [running for running in self._running if running.worker_alive()]
        attached = workers[-1].record.worker_pid if workers else 0
        return super().status() | {
            "worker": {"pid": attached, "rss_bytes": sum(rss_bytes(running.record.worker_pid) for running in workers)},
            "generations": [
                {"number": running.record.number, "mode": running.record.rung, "worker": running.record.worker_pid}
                for running in self._running
            ],
            "devices": [running.record.device for running in self._running if self._serving.is_served(running)],
            "breached": any(running.record.breached for running in self._running),
        }

    async def stop(self, *, lazy: bool) -> None:
        """Take the mount away. Raises MountError if it is busy and not `lazy`; it then stays.

        Returns when the kernel has let go of it, when somebody keeps it, or after two seconds: what somebody still has open is
        served on, and `supervise` ends later.
        """
        attached = self._attached()
        top = await trio.to_thread.run_sync(superblock.topmost, self.spec.mountpoint)
        if top and attached is not None and top not in {running.record.mount_id for running in self._running}:
            raise MountError(f"something else is mounted on {self.spec.mountpoint}; take it away first")
        was, self.stopping = self.stopping, True
        try:
            await trio.to_thread.run_sync(lambda: unmount(self.spec.mountpoint, lazy=lazy))
        except MountError:
            self.stopping = was
            raise
        self.spec.detached = True
        self.state = "detached"
        if self.ended.is_set():
            self.spec.remove()
            return
        self.spec.save()
        for wait_s in _LET_GO_S:
            with trio.move_on_after(wait_s):
                while not self.ended.is_set():  # the kernel sends no event when a superblock goes
                    self.look()
                    await trio.sleep(0.01)
            if self.ended.is_set() or len(await trio.to_thread.run_sync(self.kept_by)):
                break

    def kept_by(self) -> list[str]:
        """Return who keeps the kernel from letting go of a mount that was taken away, some words for each. Blocking."""
        records = [running.record for running in self._running]
        return keepers([record.device for record in records], [record.mount_id for record in records])

    async def supervise(self) -> None:
        """Keep the mount as good as it can be, until it is unmounted and the kernel has let go of it."""
        try:
            async with trio.open_nursery() as nursery:
                self._serving.nursery = nursery
                nursery.start_soon(self._map_files)
                try:
                    await self._begin()
                except (RafsError, OSError) as error:
                    self._fail(str(error))
                    await self._end_all()
                    nursery.cancel_scope.cancel()
                    return
                if not self.spec.detached:
                    self.mark_ready()
                while True:
                    self._changed = trio.Event()
                    await self._review()
                    if self.spec.detached and not self._running:
                        break
                    await self._changed.wait()
                self.spec.remove()
                nursery.cancel_scope.cancel()
        finally:
            self.ended.set()

    # ---- life of the mount -----------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        """Take over what an earlier daemon left, or make the first generation."""
        for data in self.spec.generations:
            record = from_record(data)
            if record is not None and record.boot_id == boot_id() and superblock.is_alive(record.superblocks):
                self._running.append(Running(record))
        for running in self._running:
            await self._serving.adopt(running)
        if self.spec.detached:
            self.state = "detached"
            return
        attached = self._attached()
        if attached is not None:
            await trio.to_thread.run_sync(self._finish_replacing, attached)
            top = await trio.to_thread.run_sync(superblock.topmost, self.spec.mountpoint)
            if top == attached.record.mount_id and not attached.record.breached and self._serving.is_served(attached):
                _log.info(
                    "mount adopted: mountpoint=%s mode=%s generation=%d worker=%d",
                    self.spec.mountpoint, attached.record.rung, attached.record.number, attached.record.worker_pid,
                )  # fmt: skip
                return
            if top == attached.record.mount_id:
                await self._make(attached)
                return
        elif await trio.to_thread.run_sync(is_mounted, self.spec.mountpoint):
            await trio.to_thread.run_sync(self._detach)
        await self._make(None)

    def _finish_replacing(self, newest: Running) -> None:
        """Take away what an earlier daemon had mounted ours beneath, and not got to."""
        older = {running.record.mount_id for running in self._running} - {newest.record.mount_id}
        for _ in older:
            if superblock.topmost(self.spec.mountpoint) in older:
                with suppress(OSError):
                    syscalls.detach(self.spec.mountpoint)

    async def _review(self) -> None:
        """Let go of what has gone, mount again what was taken away, promote what is complete."""
        for running in list(self._running):
            if not running.alive:
                await self._end(running)
        if self._is_stopping():
            return
        attached = self._attached()
        if attached is not None:
            self._serving.take_marks_away(attached)
            if attached.record.rung == "kernel" and all(attached.record.plain):
                await self._serving.dismiss_guard(attached)
        top = await trio.to_thread.run_sync(superblock.topmost, self.spec.mountpoint)
        if self._is_stopping():  # `stop` came while this task was in the thread
            return
        if top == 0:
            _log.warning("mount was taken away by somebody else, mounting again: mountpoint=%s", self.spec.mountpoint)
            await self._try(partial(self._make, None))
        elif attached is not None and top == attached.record.mount_id:
            now = trio.current_time()
            settled = [space.settled for space in self._spaces]
            wanted = promotion(attached.record, settled, alive=len(self._running), since_last_s=now - self._promoted_at)
            failed = self.state == "degraded" and now - self._promoted_at < _AGAIN_S
            if wanted.replace and not failed:
                _log.info("mount replaced: mountpoint=%s because=%s", self.spec.mountpoint, wanted.because)
                self._promoted_at = now
                await self._try(partial(self._make, attached))
            elif not self._serving.is_served(attached) and now - self._promoted_at >= _AGAIN_S:
                self._promoted_at = now
                await self._try(partial(self._make, attached))

    async def _try(self, step: Callable[[], Any]) -> None:
        try:
            await step()
        except (RafsError, OSError) as error:
            _log.error("mount cannot be renewed: mountpoint=%s cause=%s", self.spec.mountpoint, error)
            self.reason = str(error)
            self.state = "degraded"
        else:
            self.reason = ""
            self.state = "ready"

    async def _make(self, replaced: Running | None) -> None:
        """Make a generation and attach it, in the place of another or where nothing is. Raises MountError; nothing is left then."""
        settled = [space.settled for space in self._spaces]
        rung = "erofs" if all(settled) else self.spec.mode if self.spec.mode == "kernel" else "lazy"
        number = 1 + max((running.record.number for running in self._running), default=0)
        running = Running(Generation(number, rung, [], 0, boot_id(), settled))
        self._running.append(running)
        try:
            if rung == "lazy":
                await self._serving.start_flat(running)
            elif rung == "kernel":
                await self._serving.start_guard(running)
            if rung == "lazy":
                direct = not any(settled)
            else:
                direct = await self._in_thread(self._is_cold)
            mount = await self._in_thread(
                partial(superblock.create, self._image.bootstrap_path, self._devices(running), direct=direct)
            )
            try:
                running.record.superblocks = list(mount.superblocks)
                running.record.mount_id = mount.mount_id
                running.record.device = mount.device
                self._serving.save()
                # Each read past the page cache of a guarded file is an event, and nothing else reads ahead: half as many, twice as long.
                factor = 2 if rung == "kernel" and direct else 1
                superblock.set_read_ahead(mount.superblocks, factor * self.spec.read_ahead_kb)
                replacing = replaced.record.mount_id if replaced is not None else 0
                await trio.to_thread.run_sync(
                    partial(superblock.attach, mount, self.spec.mountpoint, replacing=replacing)
                )
                if self._is_stopping():  # `stop` unmounted while this task was in the thread
                    await trio.to_thread.run_sync(lambda: unmount(self.spec.mountpoint, lazy=True))
                    raise MountError(f"{self.spec.mountpoint} is being unmounted")
            finally:
                mount.close()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._end(running)
            raise
        finally:
            if running.flat_mount >= 0:
                os.close(running.flat_mount)
                running.flat_mount = -1
        self.spec.rung = rung
        self._serving.save()
        _log.info(
            "mounted: mountpoint=%s mode=%s generation=%d superblock=%s",
            self.spec.mountpoint, rung, number, ",".join(running.record.superblocks),
        )  # fmt: skip

    def _is_cold(self) -> bool:
        """Tell whether half of the data is here, and less than half of that in the page cache: else it is the longer way. Blocking."""
        try:
            cached = sum(syscalls.cached_pages(space.data_fd) for space in self._spaces if space.data_fd >= 0)
        except OSError:
            return False
        here = sum(space.present_bytes for space in self._spaces)
        return 2 * here >= sum(space.size for space in self._spaces) and 2 * cached * mmap.PAGESIZE < here

    def _devices(self, running: Running) -> list[str]:
        """Return the device paths. A plain file is named by the descriptor whose presence map was looked at."""
        found = []
        for space, plain in zip(self._spaces, running.record.plain, strict=True):
            if plain or running.record.rung == "kernel":
                found.append(f"/proc/self/fd/{space.data_fd}")
            else:
                found.append(f"/proc/self/fd/{running.flat_mount}/{space.space_id.hex()}")
        return found

    async def _in_thread(self, work: Callable[[], T]) -> T:
        with trio.move_on_after(_KERNEL_S):
            return await trio.to_thread.run_sync(work, abandon_on_cancel=True)
        raise MountError(f"the kernel does not finish mounting {self.spec.mountpoint} within {_KERNEL_S:g} s")

    async def _end(self, running: Running) -> None:
        """Let go of a generation whose superblock has gone, or was never made."""
        await self._serving.stop_worker(running)
        await self._serving.release_all(running.record)
        if running in self._running:
            self._running.remove(running)
        self._served_before += running.cache_bytes
        self._serving.save()

    async def _end_all(self) -> None:
        """After a beginning that failed: keep what is alive guarded, let go of the rest."""
        for running in list(self._running):
            if not running.record.superblocks or not running.alive:
                await self._end(running)

    def _note_death(self, running: Running) -> None:
        self._served_before += running.cache_bytes
        running.cache_bytes = 0

    def _note_failure(self, reason: str) -> None:
        self.reason = reason

    # ---- small things ------------------------------------------------------------------------------------------------

    def _is_stopping(self) -> bool:
        return self.stopping or self.spec.detached  # read anew: `stop` sets both while this task waits

    def _attached(self) -> Running | None:
        """Return the newest generation: the one that is attached, unless somebody has taken it away."""
        return self._running[-1] if self._running else None

    async def _map_files(self) -> None:
        """Learn which chunks belong to one file, so that reading ahead stays inside it."""
        try:
            self._files = await trio.to_thread.run_sync(
                lambda: map_files(self._image.bootstrap()), abandon_on_cancel=True
            )
        except (RafsError, OSError) as error:
            _log.warning("no reading ahead by files: mountpoint=%s cause=%s", self.spec.mountpoint, error)
