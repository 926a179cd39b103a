"""One mount as the daemon sees it: its image, its worker process, its state.

Decided here: how a worker is started, watched and replaced. A worker is watched by a pidfd, so one that an earlier daemon
started is watched just as well. Rule: a dead worker's mount is detached before a new one is made, so nobody hangs on it.

Concurrency: `supervise` is the only task that starts workers and changes `state`; it belongs to the daemon's nursery. `umount`
sets `stopping` first, so that the death it causes is not taken for a crash. `ready` is set by the worker's own call.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from typing import Any, Final

import trio

from ..errors import FuseError, MountError, RafsError
from ..fetch.source import Source
from ..fuse.mountpoint import is_mounted, set_read_ahead, unmount
from ..fuse.spec import MountSpec, process_start
from ..store.data_space import DataSpace
from .pulse import BEAT_S, Pulse
from .spawn import spawn_detached

_log = logging.getLogger(__name__)

_READY_S: Final = 30.0
"""A worker that has not mounted by then is given up."""
_RESTARTS: Final = 5
"""Deaths in a row, each soon after the start, after which a mount is left failed: it would only burn the node."""
_LIVED_S: Final = 1.0
"""A worker that served so long before it died does not count as one of those."""


class Mount:
    """A mount and its worker."""

    def __init__(self, spec: MountSpec, source: Source, data_bytes: int, log_path: str) -> None:
        self.spec = spec
        self.source = source
        self.data_bytes = data_bytes
        self.state = "starting"
        self.reason = ""
        self.sources: Counter[str] = Counter()
        self.cache_bytes = 0
        self.ready = trio.Event()
        self.ended = trio.Event()
        self.stopping = False
        self._log_path = log_path
        self._served_before = 0
        self._ready_at = 0.0
        self._pulse = Pulse()

    async def supervise(self) -> None:
        """Keep a worker running until `stop`, or until it dies too often."""
        deaths = 0
        try:
            while not self.stopping:
                if self.spec.worker_alive():
                    _log.info("mount adopted: mountpoint=%s worker=%d", self.spec.mountpoint, self.spec.worker_pid)
                else:
                    await self._start()
                await self._watch()
                if self._is_stopping():
                    break
                lived_s = trio.current_time() - self._ready_at if self.ready.is_set() else 0.0
                deaths = 1 if lived_s >= _LIVED_S else deaths + 1
                await trio.to_thread.run_sync(self._detach)
                if not self.ready.is_set():
                    self._fail(f"the worker ended before it had mounted: {self._last_words()}")
                    return
                if deaths >= _RESTARTS:
                    self._fail(f"the worker died {deaths} times in a row: {self._last_words()}")
                    return
                _log.warning(
                    "worker died, mounting again: mountpoint=%s pid=%d", self.spec.mountpoint, self.spec.worker_pid
                )
                self.state = "restarting"
                self._served_before += self.cache_bytes
                self.cache_bytes = 0
                await trio.sleep(0.05 * 2 ** (deaths - 1))
        except RafsError as error:
            self._fail(str(error))
        finally:
            self.ended.set()

    def _is_stopping(self) -> bool:
        return self.stopping  # read anew: `stop` sets it while this task waits

    def look(self) -> None:
        """See whether something is to be done; of a FUSE mount nothing ever is."""

    def worker_ready(self, generation: int) -> None:
        """Note that the worker serves the mount."""
        self.mark_ready()

    def own_chunks(self, space: DataSpace, chunks: range) -> range:
        """Return the chunks of the file that `chunks` belong to, if the worker has not said so; here it always does."""
        return chunks

    def served(self, cache_bytes: int, generation: int = 0) -> int:
        """Note what the worker says it has served from present data since it started; return what is new."""
        fresh = max(0, cache_bytes - self.cache_bytes)
        self.cache_bytes = cache_bytes
        return fresh

    def heard(self, generation: int = 0) -> None:
        """Note that the worker spoke, as it does every BEAT_S."""
        self._pulse.heard()

    def mark_ready(self) -> None:
        """Note that the worker serves the mount."""
        self.state = "ready"
        self._ready_at = trio.current_time()
        self.ready.set()

    async def stop(self, *, lazy: bool) -> None:
        """Take the mount away and end its worker. Raises MountError if it is busy and not `lazy`; it then stays."""
        was = self.stopping
        self.stopping = True
        try:
            await trio.to_thread.run_sync(lambda: unmount(self.spec.mountpoint, lazy=lazy))
        except MountError:
            self.stopping = was
            raise
        self.signal(signal.SIGTERM)
        with trio.move_on_after(5):
            await self.ended.wait()
        if not self.ended.is_set():
            self.signal(signal.SIGKILL)
            with trio.move_on_after(5):
                await self.ended.wait()
        self.spec.remove()

    def kept_by(self) -> list[str]:
        """Return who keeps the kernel from letting go of a mount that was taken away, some words for each. Blocking."""
        return []

    def signal(self, number: int) -> None:
        """Send a signal to the worker, if it is still ours."""
        if self.spec.worker_alive():
            with suppress(ProcessLookupError):
                os.kill(self.spec.worker_pid, number)

    def status(self) -> dict[str, Any]:
        """Return the mount's part of `rafs status --json`, but for present_bytes, which the daemon knows."""
        return {
            "ref": self.spec.ref,
            "digest": self.spec.digest,
            "mountpoint": self.spec.mountpoint,
            "mode": self.spec.rung,
            "asked": self.spec.mode,
            "why": self.spec.why,
            "state": self.state,
            "reason": self.reason,
            "prefetch": self.spec.prefetch,
            "data_bytes": self.data_bytes,
            "sources": {
                "cache": self._served_before + self.cache_bytes,
                "local": self.sources["local"],
                "peer": self.sources["peer"],
                "origin": self.sources["origin"],
            },
            "peers": {
                name.removeprefix("peer "): count for name, count in self.sources.items() if name.startswith("peer ")
            },
            "worker": {
                "pid": self.spec.worker_pid if self.spec.worker_alive() else 0,
                "rss_bytes": rss_bytes(self.spec.worker_pid) if self.spec.worker_alive() else 0,
            },
        }

    async def _start(self) -> None:
        if is_mounted(self.spec.mountpoint):
            await trio.to_thread.run_sync(self._detach)
        process = await trio.to_thread.run_sync(self._spawn)
        self.spec.worker_pid = process.pid
        self.spec.worker_start = process_start(process.pid)
        self.spec.save()

    def _spawn(self) -> subprocess.Popen[bytes]:
        try:
            return spawn_detached([sys.executable, "-m", "rafsfs.fuse.worker", self.spec.path], self._log_path)
        except OSError as error:
            raise MountError(f"the worker of {self.spec.mountpoint} cannot be started: {error}") from error

    async def _watch(self) -> None:
        """Return when the worker has ended; set the kernel's read-ahead once it serves; give up on one that never does."""
        try:
            pidfd = os.pidfd_open(self.spec.worker_pid)
        except ProcessLookupError:
            return
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tune)
                nursery.start_soon(self._look_after)
                await trio.lowlevel.wait_readable(pidfd)
                nursery.cancel_scope.cancel()
        finally:
            os.close(pidfd)
            reap(self.spec.worker_pid)

    async def _look_after(self) -> None:
        """Kill a worker that hangs: whoever reads gets ENOTCONN, and a new one mounts."""
        self._pulse = Pulse()
        while True:
            await trio.sleep(BEAT_S)
            if self._pulse.look() and not waits_for_disk(self.spec.worker_pid):
                break
        _log.error("worker hangs and is killed: mountpoint=%s pid=%d", self.spec.mountpoint, self.spec.worker_pid)
        self.signal(signal.SIGKILL)

    async def _tune(self) -> None:
        with trio.move_on_after(_READY_S) as scope:
            await self.ready.wait()
        if scope.cancelled_caught:
            self.signal(signal.SIGKILL)
            return
        await trio.to_thread.run_sync(
            set_read_ahead, self.spec.mountpoint, self.spec.read_ahead_kb, abandon_on_cancel=True
        )

    def _detach(self) -> None:
        with suppress(MountError):
            unmount(self.spec.mountpoint, lazy=True)

    def _fail(self, reason: str) -> None:
        self.state = "failed"
        self.reason = reason
        _log.error("mount failed: mountpoint=%s reason=%s", self.spec.mountpoint, reason)

    def _last_words(self) -> str:
        try:
            with open(self._log_path, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
                lines = file.read().decode("utf-8", "replace").strip().splitlines()
        except OSError:
            return "it left no log"
        words = [line for line in lines if "rafsfs.fuse.worker" in line or "fuse" in line.lower()]
        return words[-1].split(" ", 3)[-1] if words else "it left no log"

    def raise_if_failed(self) -> None:
        """Raise why the mount could not be made."""
        if self.state == "failed" or self.ended.is_set():
            raise FuseError(f"{self.spec.mountpoint} could not be mounted: {self.reason or 'the worker ended'}")


def reap(pid: int) -> None:
    """Collect a worker that has ended, if it was this process's child."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def waits_for_disk(pid: int) -> bool:
    """Tell whether a process is in the kernel where no signal reaches it: it does not hang, its disk does."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"D"
    except (OSError, IndexError):
        return False


def rss_bytes(pid: int) -> int:
    """Return the resident memory of a process, bytes; 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
