"""What serves the generations of one mount: flat servers and guards, the descriptors they need, and their successors.

Decided here: what is with the holder before a worker is started, when a worker is replaced and when a flat server is given up, when a guard
is no longer needed. Rules. A data file's descriptor is with the holder before its mark, a group before the superblock; a group is let go of
only after its superblock has gone or its last mark was taken away. Which generations there are is decided by `ErofsMount`.

Concurrency: one task per worker (`_serve`), in the nursery of the mount's `supervise`, which alone calls the public methods. Nothing here
touches the mount itself.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import trio

from ..erofs import fanotify, superblock, syscalls
from ..erofs.generation import Generation
from ..erofs.holdings import Holdings
from ..errors import MountError, RafsError
from ..fuse.spec import MountSpec, process_start
from ..store.data_space import DataSpace
from .mounts import reap, waits_for_disk
from .pulse import BEAT_S, Pulse
from .worker_start import start_worker

_log = logging.getLogger(__name__)

_PAUSE_S: Final = (0.02, 2.0)
"""Before a worker that died is replaced: first, longest."""
_LIVED_S: Final = 1.0
"""A worker that lived so long was not killed by what it serves; the pause begins anew."""
_GIVE_UP: Final = 10
"""Deaths in a row, each within `_LIVED_S`, after which a flat server is given up and its readers get EIO."""


class Running:
    """A generation and what this daemon knows of it besides its record."""

    def __init__(self, generation: Generation) -> None:
        self.record = generation
        self.flat_mount = -1
        self.ending = False
        self.cache_bytes = 0
        self.pulse = Pulse()

    @property
    def alive(self) -> bool:
        """Whether the kernel still has the superblock; true as well before it was made."""
        return not self.record.superblocks or superblock.is_alive(self.record.superblocks)

    def is_ending(self) -> bool:
        """Tell whether its worker is to go; read anew after each wait."""
        return self.ending

    def worker_alive(self) -> bool:
        """Tell whether the process of its record lives."""
        pid = self.record.worker_pid
        return pid > 0 and process_start(pid) == self.record.worker_start


class Serving:
    """Serves the generations in `running`, which the mount adds to and takes from.

    `changed`: something is to be looked at; `worker_died`: of a generation that goes on; `failed`: why what is missing cannot be had.
    """

    nursery: trio.Nursery | None = None
    """Owns the tasks; set by the mount before anything is started."""

    def __init__(
        self,
        spec: MountSpec,
        spaces: Sequence[DataSpace],
        holdings: Holdings,
        running: list[Running],
        *,
        changed: Callable[[], None],
        worker_died: Callable[[Running], None],
        failed: Callable[[str], None],
    ) -> None:
        self._spec = spec
        self._spaces = spaces
        self._holdings = holdings
        self._running = running
        self._changed = changed
        self._worker_died = worker_died
        self._failed = failed

    async def start_flat(self, running: Running) -> None:
        fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = [
            ("source", "rafs-flat"),
            ("fd", str(fuse)),
            ("rootmode", "40000"),
            ("user_id", "0"),
            ("group_id", "0"),
        ]
        try:
            running.flat_mount = syscalls.create_mount("fuse", [*options, ("allow_other", None)])
        except OSError as error:
            os.close(fuse)
            raise MountError(f"no FUSE for the flat server: {error.strerror}") from error
        (name,) = running.record.held_names(self._spec.id)
        await self._holdings.hold(name, fuse)
        self._start_serving(running)

    async def start_guard(self, running: Running) -> None:
        group_name, journal_name = running.record.held_names(self._spec.id)
        try:
            group = fanotify.open_group()
            await self._holdings.hold(group_name, group)
            await self._holdings.hold(journal_name, fanotify.make_journal())
            guarded = [space for space, plain in zip(self._spaces, running.record.plain, strict=True) if not plain]
            for space in guarded:  # before the mark: through these the next daemon reads and writes without being asked
                name = running.record.file_name(self._spec.id, space.space_id.hex())
                await self._holdings.hold(name, space.duplicate())
            for space in guarded:
                fanotify.add_mark(group, space.data_fd)
        except OSError as error:
            raise MountError(f"fanotify does not guard the data files: {error.strerror}") from error
        self._start_serving(running)

    def take_marks_away(self, running: Running) -> None:
        """Take away the marks of what is settled; with the last one nobody needs to serve the generation. No checkpoint."""
        record = running.record
        if record.rung != "kernel":
            return
        group = self._holdings.get(record.held_names(self._spec.id)[0])
        if group is None:
            return
        before = list(record.plain)
        for number, space in enumerate(self._spaces):
            if not record.plain[number] and space.settled:
                with suppress(OSError):
                    fanotify.remove_mark(group, space.data_fd)
                    record.plain[number] = True
        if record.plain != before:
            self.save()

    async def dismiss_guard(self, running: Running) -> None:
        """End what serves a generation whose marks are all gone: what still waits is allowed by the kernel, and is there."""
        record = running.record
        await self.stop_worker(running)
        await self.release_all(record)
        record.rung = self._spec.rung = "erofs"
        self.save()
        _log.info("guard dismissed, the image is complete: mountpoint=%s", self._spec.mountpoint)

    def is_served(self, running: Running) -> bool:
        """Tell whether what is not plain in a generation has somebody who answers for it, now or in a moment."""
        names = running.record.held_names(self._spec.id)
        return running.record.rung == "erofs" or (
            not running.ending and all(self._holdings.get(name) is not None for name in names)
        )

    def _start_serving(self, running: Running) -> None:
        assert self.nursery is not None
        self.nursery.start_soon(self._serve, running)

    async def _serve(self, running: Running) -> None:
        """Keep a worker for a generation, as long as the kernel has it."""
        deaths = 0
        try:
            while not running.is_ending() and running.alive:
                if not running.worker_alive():
                    if running.record.rung == "kernel" and not self.is_served(running):
                        await self._mend_breach(running)
                        return
                    await self._spawn_worker(running)
                started = trio.current_time()
                await self._ended_or_hung(running)
                if running.is_ending() or not running.alive:
                    break
                deaths = 0 if trio.current_time() - started >= _LIVED_S else deaths + 1
                if running.record.rung == "lazy" and deaths >= _GIVE_UP:
                    await self._give_up(running)
                    return
                _log.warning(
                    "worker died, replacing it: mountpoint=%s generation=%d pid=%d",
                    self._spec.mountpoint, running.record.number, running.record.worker_pid,
                )  # fmt: skip
                self._worker_died(running)
                await trio.sleep(0 if not deaths else min(_PAUSE_S[0] * 2**deaths, _PAUSE_S[1]))
        except (RafsError, OSError) as error:
            self._failed(f"what is missing cannot be served: {error}")
            _log.error("worker cannot be started: mountpoint=%s cause=%s", self._spec.mountpoint, error)
        finally:
            self._changed()

    async def _ended_or_hung(self, running: Running) -> None:
        """Return when the worker has ended; kill one that hangs. Its successor gets what it has not answered."""
        pid, running.pulse = running.record.worker_pid, Pulse()

        async def look_after() -> None:
            while True:
                await trio.sleep(BEAT_S)
                if running.pulse.look() and not waits_for_disk(pid):
                    break
            _log.error("worker hangs and is killed: mountpoint=%s pid=%d", self._spec.mountpoint, pid)
            if running.worker_alive():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look_after)
            await _ended(pid)
            nursery.cancel_scope.cancel()

    async def _give_up(self, running: Running) -> None:
        """Cut the connection of a flat server that dies of what it is asked: its readers get EIO and not silence."""
        _log.error(
            "flat server given up after %d deaths, its readers get EIO: mountpoint=%s", _GIVE_UP, self._spec.mountpoint
        )
        self._failed(f"the flat server died {_GIVE_UP} times in a row; see the log")
        running.ending = True
        await self.release_all(running.record)

    async def release_all(self, record: Generation) -> None:
        """Close everywhere what was held for a generation; the group of kernel mode before its data files."""
        files = [name for name in self._holdings.names() if name.startswith(record.file_name(self._spec.id, ""))]
        for name in [*record.held_names(self._spec.id), record.pid_name(self._spec.id), *files]:
            await self._holdings.release(name)

    async def _spawn_worker(self, running: Running) -> None:
        record = running.record
        start_worker(self._spec, [one.record for one in self._running], record, self._holdings.get)
        with suppress(ProcessLookupError, MountError):
            await self._holdings.hold(record.pid_name(self._spec.id), os.pidfd_open(record.worker_pid))

    async def adopt(self, running: Running) -> None:
        """Go on serving what an earlier daemon's generation needs, whose descriptors were recovered before any data file was opened."""
        record = running.record
        if record.rung == "erofs":
            return
        names = record.held_names(self._spec.id)
        if running.worker_alive() or all(self._holdings.get(name) is not None for name in names):
            self._start_serving(running)
        elif record.rung == "kernel":
            await self._mend_breach(running)
        else:
            _log.error(
                "nobody serves a generation any more, its readers get EIO: mountpoint=%s generation=%d",
                self._spec.mountpoint, record.number,
            )  # fmt: skip

    async def _mend_breach(self, running: Running) -> None:
        """Guard a generation again whose group has died: from now on its holes ask, but what was read meanwhile may have been zeros."""
        _log.error(
            "BREACH: holder, worker and daemon of kernel mode were all gone; holes of the data files may have been read as zeros since. "
            "New opens are right; restart what has had files open: mountpoint=%s generation=%d",
            self._spec.mountpoint, running.record.number,
        )  # fmt: skip
        running.record.breached = True
        self._spec.why = (
            "kernel mode was without a guard for a while: restart what has had files open, see docs/operations.md"
        )
        # Marks of data spaces that have completed since are not needed; the rest is guarded before anything else happens.
        running.record.plain = [
            plain or space.settled for plain, space in zip(running.record.plain, self._spaces, strict=True)
        ]
        await self.start_guard(running)
        self.save()

    async def stop_worker(self, running: Running) -> None:
        running.ending = True
        if not running.worker_alive():
            return
        with suppress(ProcessLookupError):
            os.kill(running.record.worker_pid, signal.SIGTERM)
        with trio.move_on_after(1) as scope:
            await _ended(running.record.worker_pid)
        if scope.cancelled_caught:
            with suppress(ProcessLookupError):
                os.kill(running.record.worker_pid, signal.SIGKILL)

    def save(self) -> None:
        """Write down which generations there are."""
        self._spec.generations = [running.record.as_dict() for running in self._running]
        self._spec.save()


async def _ended(pid: int) -> None:
    """Return when a process has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except (ProcessLookupError, ValueError):
        return
    try:
        await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)
        reap(pid)
