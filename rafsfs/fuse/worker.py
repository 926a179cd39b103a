"""The process of one mount: `python -m rafsfs.fuse.worker SPEC.json`.

Serves the image by pyfuse3; hits from the node's data spaces, misses by asking the daemon over its socket. It outlives the daemon: it
connects again when the socket comes back, and when a read waits and no daemon answers it starts one.

Concurrency: pyfuse3's session loop and the tasks of ours share one trio run. `_keep_connected` owns the connection and replaces it;
`_report` tells the daemon what was served. Reads wait in `ensure` for a connection. SIGTERM ends the session loop. If the mount is
taken away from outside, the session loop ends by itself and so does the process.
"""

from __future__ import annotations

import logging
import mmap
import os
import random
import signal
import sys
from contextlib import suppress
from typing import Any, Final

import pyfuse3
import trio

from .. import logs
from ..daemon.connection import Connection, open_connection
from ..daemon.launch import start_daemon
from ..daemon.pulse import BEAT_S
from ..errors import CacheError, DaemonError, DeadlineError, RafsError
from ..format.bootstrap import Bootstrap
from ..store.space_view import SpaceView
from .operations import ImageOperations
from .spec import MountSpec, load_spec

_log = logging.getLogger("rafsfs.fuse.worker")

_RECONNECT_S: Final = (0.1, 1.0)
"""First and longest pause between attempts to find the daemon."""
_REPORT_S: Final = 0.5
_HINTS: Final = 8
"""Hints on their way at once; the next read brings another chance."""
_SECOND_DEADLINE_S: Final = 0.5
_SECOND_CHANCE_S: Final = 0.1
"""How long after a failed read the next one of the same chunk is taken for the kernel's, which asks again within milliseconds
and once. A reader who tries again of his own will gets the full deadline, since the registry may be back."""


class Worker:
    """State of one mount's process."""

    def __init__(self, spec: MountSpec) -> None:
        self.spec = spec
        directory = os.path.join(spec.cache_dir, "images", spec.digest.removeprefix("sha256:"))
        path = spec.view or os.path.join(directory, "bootstrap.erofs")
        try:
            with open(path, "rb") as file:
                self.bootstrap = Bootstrap(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        except (OSError, ValueError) as error:
            raise CacheError(f"{path} cannot be opened: {error}") from error
        spaces = os.path.join(spec.cache_dir, "spaces")
        self.views = [SpaceView(os.path.join(spaces, slot.tag.decode())) for slot in self.bootstrap.spaces]
        self.operations = ImageOperations(
            self.bootstrap, self.views, self.ensure, self.hint, has_xattrs=spec.has_xattrs
        )
        self._connection: Connection | None = None
        self._changed = trio.Event()
        self._wanted = trio.Event()
        self._failed: dict[tuple[int, int], float] = {}
        self._nursery: trio.Nursery | None = None
        self._hints = 0

    async def ensure(self, space: int, chunks: range, own: range) -> None:
        """Return when the chunks are present. Waits for a daemon if there is none, until the mount's deadline.

        Raises what the daemon says, DeadlineError after the deadline. The kernel asks for one page again when a larger read has
        failed: what has just failed gets one short second chance, so that the reader waits one deadline and not two.
        """
        failed = self._failed.pop((space, chunks.start), -_SECOND_CHANCE_S)
        if trio.current_time() - failed < _SECOND_CHANCE_S:
            await self._ensure(space, chunks, own, min(_SECOND_DEADLINE_S, self.spec.deadline_s))
            return
        try:
            await self._ensure(space, chunks, own, self.spec.deadline_s)
        except RafsError:
            if len(self._failed) > 1000:
                self._failed.clear()
            self._failed[space, chunks.start] = trio.current_time()
            raise

    async def _ensure(self, space: int, chunks: range, own: range, deadline_s: float) -> None:
        view = self.views[space]
        cause: RafsError | None = None
        with trio.move_on_after(deadline_s) as scope:
            while not view.is_present(chunks.start, chunks.stop):
                connection = await self._connected()
                left = scope.deadline - trio.current_time()
                try:
                    await connection.call("ensure", self._parameters(space, chunks, own, max(0.1, left - 0.2)))
                except DaemonError as error:
                    cause = error
                    await trio.sleep(0.02)  # the connection is being replaced; do not spin on the broken one
        if scope.cancelled_caught:
            raise DeadlineError(
                f"chunks {chunks.start} to {chunks.stop - 1} of data space {view.space_id.hex()[:16]} did not come within "
                f"{deadline_s:g} s: {cause or 'no daemon answers'}"
            )

    def hint(self, space: int, chunks: range, own: range) -> None:
        """Tell the daemon of a hit, in a task of its own; one that cannot be told now is not told."""
        if self._nursery is not None and self._connection is not None and self._hints < _HINTS:
            self._hints += 1
            self._nursery.start_soon(self._tell, self._connection, self._parameters(space, chunks, own, 1.0))

    async def _tell(self, connection: Connection, parameters: dict[str, Any]) -> None:
        try:
            with suppress(RafsError):
                await connection.call("ensure", parameters)
        finally:
            self._hints -= 1

    def _parameters(self, space: int, chunks: range, own: range, deadline_s: float) -> dict[str, Any]:
        return {
            "space": self.views[space].space_id,
            "first": chunks.start,
            "stop": chunks.stop,
            "own_first": own.start,
            "own_stop": own.stop,
            "deadline_s": deadline_s,
        }

    async def _connected(self) -> Connection:
        while self._connection is None or self._connection.closed.is_set():
            self._wanted.set()
            await self._changed.wait()
        return self._connection

    def _set_connection(self, connection: Connection | None) -> None:
        self._connection = connection
        self._changed.set()
        self._changed = trio.Event()

    async def keep_connected(self) -> None:
        """Hold a connection to the daemon, for ever; start a daemon only when a read waits for one."""
        pause = _RECONNECT_S[0]
        while True:
            try:
                async with open_connection(self.spec.cache_dir, mount=self.spec.id) as connection:
                    await connection.call("ready", {"mount": self.spec.id})
                    self._wanted = trio.Event()
                    self._set_connection(connection)
                    pause = _RECONNECT_S[0]
                    await connection.closed.wait()
                    self._set_connection(None)
            except* RafsError as group:
                _log.debug("no daemon: %s", group.exceptions[0])
            self._set_connection(None)
            if self._wanted.is_set():
                with suppress(RafsError):
                    # many workers may be here at once: spread them, the directory's lock decides
                    await trio.sleep(random.random() * 0.05)
                    await start_daemon(self.spec.cache_dir, self.spec.daemon_argv or None)
                    continue
            with trio.move_on_after(pause):
                await self._wanted.wait()
            pause = min(pause * 2, _RECONNECT_S[1])

    async def report(self) -> None:
        """Tell the daemon how much was served from present data and what was read, at most every half second; at least every BEAT_S."""
        told, beat_at = 0, 0.0
        while True:
            await trio.sleep(_REPORT_S)
            if self._connection is None:
                continue
            if self.operations.cache_bytes == told and not self.operations.touched and trio.current_time() < beat_at:
                continue
            beat_at = trio.current_time() + BEAT_S
            touched, self.operations.touched = self.operations.touched, []
            with suppress(RafsError):
                served = self.operations.cache_bytes
                read = [(self.views[space].space_id, first, stop) for space, first, stop in touched]
                word = {"mount": self.spec.id, "cache_bytes": served, "read": read, "beats": True}
                await self._connection.call("served", word)
                told = served

    async def run(self) -> None:
        """Serve until the mount is taken away or SIGTERM comes."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self.keep_connected)
            nursery.start_soon(self.report)
            nursery.start_soon(_end_on_signal)
            await pyfuse3.main()
            nursery.cancel_scope.cancel()


async def _end_on_signal() -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            pyfuse3.terminate()


def mount_options(spec: MountSpec) -> set[str]:
    """Return the options of the FUSE mount."""
    options = set(pyfuse3.default_options)
    options |= {"ro", "default_permissions", f"fsname=rafs:{_option_text(spec.ref)}", "subtype=rafs"}
    if spec.allow_other:
        options.add("allow_other")
    return options


def _option_text(text: str) -> str:
    return "".join(character if character.isalnum() or character in "-._/:@" else "_" for character in text)


def main(arguments: list[str]) -> int:
    """Run the worker of a spec file; return the exit code."""
    logs.configure()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        spec = load_spec(arguments[0])
        worker = Worker(spec)
    except RafsError as error:
        _log.error("mount failed: %s", error)
        return error.exit_code
    try:
        pyfuse3.init(worker.operations, spec.mountpoint, mount_options(spec))
    except RuntimeError as error:
        _log.error("mount failed: FUSE refuses %s: %s", spec.mountpoint, error)
        return 52
    try:
        trio.run(worker.run)
    finally:
        with suppress(Exception):
            pyfuse3.close(unmount=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
