"""The daemon's end of the holder: descriptors that must outlive whoever uses them, by name.

Decided here: that a descriptor is with the holder before anything depends on it, and that a holder which dies is replaced and given
everything again. The daemon keeps a copy of each, so holder and daemon must die together before the worker's own copy is the last.

Concurrency: trio tasks of the daemon. `_turn` keeps conversations apart. `keep` is the one task that replaces a dead holder. The
holder answers at once and the socket has a timeout, so a conversation is a matter of microseconds and is done in place.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from ..daemon.spawn import spawn_detached
from ..errors import MountError
from .holder_line import HolderLine

_log = logging.getLogger(__name__)

_START_S: Final = 10.0


class Holdings:
    """What the daemon has given into the holder's keeping."""

    def __init__(self, cache_dir: str, daemon_argv: Sequence[str], *, may_start: bool = True) -> None:
        """`may_start`: a holder is started when there is none; else somebody else runs it (`rafs holder`), and it is waited for."""
        self._cache_dir = cache_dir
        self._may_start = may_start
        self._argv = list(daemon_argv)
        self._line: HolderLine | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = trio.Lock()
        self._connected = trio.Event()
        self._held: dict[str, int] = {}

    def get(self, name: str) -> int | None:
        """Return the daemon's own copy of a descriptor, which stays ours; None if nothing is held under the name."""
        return self._held.get(name)

    def data_file(self, space_id: bytes) -> int | None:
        """Return a held descriptor of a data file that is or was guarded, None if there is none. From any thread."""
        wanted = f"/{space_id.hex()}"
        for name, descriptor in list(self._held.items()):
            if name.startswith("file/") and name.endswith(wanted):
                return descriptor
        return None

    def names(self) -> list[str]:
        """Return the names of all that is held."""
        return sorted(self._held)

    async def recover(self) -> None:
        """Take copies of everything that a holder of an earlier daemon has, if there is one."""
        async with self._turn:
            try:
                self._connect()
                names = [name for name in self._ask("list")[0].split("\n") if name]
                for name in names:
                    _, descriptors = self._ask(f"get {name}")
                    if descriptors:
                        self._held[name] = descriptors[0]
            except OSError as error:
                _log.debug("no holder: %s", error)
            if not self._held:
                self._lost()

    async def hold(self, name: str, descriptor: int) -> None:
        """Give a descriptor into keeping; the daemon's copy is taken over from the caller. Raises MountError."""
        async with self._turn:
            old = self._held.pop(name, -1)
            self._held[name] = descriptor
            try:
                if self._line is None:
                    await self._renew()
                else:
                    self._ask(f"put {name}", descriptor)
            except OSError:
                # It has just died: what was to be held is held by the next one.
                await self._renew()
            finally:
                if old >= 0:
                    os.close(old)

    async def release(self, name: str) -> None:
        """Close a descriptor everywhere but in the worker that uses it."""
        async with self._turn:
            descriptor = self._held.pop(name, -1)
            if descriptor < 0:
                return
            os.close(descriptor)
            if self._line is not None:
                try:
                    self._ask(f"drop {name}")
                except OSError:
                    self._lost()
            if not self._held and self._line is not None:
                self._lost()  # a holder that holds nothing ends when nobody is connected

    async def keep(self) -> None:
        """Replace a holder that dies, for ever."""
        while True:
            await self._connected.wait()
            line = self._line
            if line is not None:
                with suppress(trio.ClosedResourceError, OSError):
                    await trio.lowlevel.wait_readable(line.socket)  # it never speaks first: it has ended
            async with self._turn:
                if not self._held or (self._line is not None and self._line is not line):
                    continue  # let go of on purpose, or replaced already
                _log.warning("holder died, starting another: descriptors=%d", len(self._held))
                try:
                    await self._renew()
                    _log.info("another holder has the descriptors: number=%d", len(self._held))
                except MountError as error:
                    _log.error("no holder: %s", error)
                    self._connected.set()  # try again
            await trio.sleep(0.2)

    def rest(self) -> None:
        """Tell the holder that this daemon goes on purpose, and let go of it. Called last."""
        if self._line is not None:
            with suppress(OSError):
                self._ask("rest")
        self._lost()
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()

    async def _renew(self) -> None:
        """Start a holder and give it everything. `_turn` is held. Raises MountError."""
        self._lost()
        try:
            await self._start()
            for name, descriptor in self._held.items():
                self._ask(f"put {name}", descriptor)
        except OSError as error:
            self._lost()
            raise MountError(f"the holder of {self._cache_dir} does not answer: {error}") from error

    async def _start(self) -> None:
        with suppress(OSError):
            self._connect()
            return
        if not self._may_start:
            await self._wait_for_one()
            return
        path = os.path.join(self._cache_dir, "holder.sock")
        with suppress(FileNotFoundError):
            os.unlink(path)
        self._reap()
        log = os.path.join(self._cache_dir, "daemon.log")
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("holder.py")), path, log]
        self._process = spawn_detached(command, log)
        with trio.move_on_after(_START_S):
            while self._process.poll() is None:
                with suppress(OSError):
                    self._connect()
                    return
                await trio.sleep(0.005)
        raise MountError(f"the holder of {self._cache_dir} does not start; see {log}")

    async def _wait_for_one(self) -> None:
        with trio.move_on_after(_START_S):
            while True:
                with suppress(OSError):
                    self._connect()
                    return
                await trio.sleep(0.1)
        raise MountError(
            f"no holder of {self._cache_dir} answered within {_START_S:g} s; this daemon was told not to start one: run `rafs holder`"
        )

    def _connect(self) -> None:
        self._line = HolderLine(self._cache_dir, self._argv)
        self._connected.set()

    def _ask(self, message: str, *descriptors: int) -> tuple[str, list[int]]:
        if self._line is None:
            raise ConnectionError("not connected")
        return self._line.ask(message, *descriptors)

    def _lost(self) -> None:
        if self._line is not None:
            trio.lowlevel.notify_closing(self._line.socket)
            self._line.close()
        self._line = None
        if self._connected.is_set():
            self._connected = trio.Event()  # one that is not set has `keep` waiting for it
        self._reap()

    def _reap(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            self._process = None
