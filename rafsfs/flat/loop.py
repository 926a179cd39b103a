"""The loop of a process that serves a kernel: one descriptor of requests, one line to the daemon, nothing else.

Decided here: how a request that misses waits while others are served, what is asked of the daemon and how failures are
remembered. Rules: nothing here blocks but the poll; a miss is answered with success only after the presence map has been read
again and says so.

Who faults pages waits for each of them, and touches the next at once. To wake a process that sleeps takes a virtual machine 20 to 40
microseconds, as long as half of a disk's answer; so after a small hit the loop looks for the next request for a moment before it sleeps.

Concurrency: one thread. Ends when the kernel's descriptor says that there is nothing left to serve (ENODEV), or on SIGTERM.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from ..daemon.link import DaemonLink
from ..daemon.pulse import BEAT_S
from ..store.space_view import HINT_EVERY, SpaceView
from .chances import Chances, Grant

_log = logging.getLogger(__name__)

_REPORT_S: Final = 0.5
_TOGETHER_S: Final = 0.1
"""How long a question may have been with the daemon for another one for the same chunks to wait with it, and with its deadline: the
kernel asks for one window in pieces of 64 KiB while its pages are small."""
_SAME_FAILURE_S: Final = 5.0
"""Failures in one data space within this time are one line in the log."""

SMALL_HIT: Final = 64 << 10
"""Bytes. Less is a page fault or a short read, whose reader comes again at once; longer ones are few, and a wake-up is little to them."""
_ATTENTION_NS: Final = 100_000
"""How long the next request is looked for after a small hit. Random pages of an incomplete image: 0.42 of ext4 without, 0.47 to 0.52
with 0.1 ms (`make bench-io`), and no better with 0.2 or 0.3."""
_ATTENTION_ALL_NS: Final = 5_000_000
"""How long the daemon's line and the timers may have to wait for that, however many requests come."""

_READERS: Final = 16
"""Of one data space, told apart: a hit that goes on where one of the latest ended is of a reader that goes on."""

Finished = Callable[[bool], None]


class Served(Enum):
    """What came of looking for a request."""

    NOTHING = 0
    ONE = 1
    OVER = 2
    """The kernel has let go of the file system."""


@dataclass(slots=True)
class _Wish:
    """Chunks that the daemon is asked for, and who waits for them."""

    asked_at: float
    grant: Grant
    readers: set[int]
    finished: list[Finished]


class Loop:
    """Serves until the kernel has nothing left. `serve` handles one read of `kernel_fd`, which must not block."""

    def __init__(
        self,
        *,
        kernel_fd: int,
        serve: Callable[[], Served],
        views: Sequence[SpaceView],
        cache_dir: str,
        mount: str,
        generation: int,
        argv: Sequence[str],
        deadline_s: float,
        daemon_came: Callable[[], None] | None = None,
    ) -> None:
        self._kernel_fd = kernel_fd
        self._serve = serve
        self._views = views
        self._mount = mount
        self._generation = generation
        self._epoll = select.epoll()
        self._epoll.register(kernel_fd, select.EPOLLIN)
        self._polled = (-1, False)
        self._chances = Chances(deadline_s)
        self._logged: dict[int, float] = {}
        self._hinted = [-HINT_EVERY] * len(views)
        self._ends: list[deque[int]] = [deque(maxlen=_READERS) for _ in views]
        """Chunks that the latest hits ended before."""
        self._wanted: dict[tuple[int, int, int], _Wish] = {}
        self._touched: list[tuple[bytes, int, int]] = []
        """Chunks read for the first time since the daemon was told."""
        self._told = 0
        self._report_at = 0.0
        self._beat_at = 0.0
        self._ending = False
        self._is_small = False
        """Whether the latest request was a small hit."""
        self._may_look = len(os.sched_getaffinity(0)) > 1  # else the reader could not run meanwhile
        self.cache_bytes = 0
        """Bytes served from chunks that were present when they were asked for."""
        self.link = DaemonLink(
            cache_dir,
            mount,
            ready={"mount": mount, "generation": generation},
            argv=argv,
            changed=self._poll_link,
            connected=daemon_came,
        )

    def run(self) -> None:
        """Serve until the end."""
        signal.signal(signal.SIGTERM, self._end)
        due = 0.0
        while not self._ending:
            now = time.monotonic()
            if now >= due:
                due = self.link.tick(now)
            if self.link.connected and now >= (
                self._beat_at if self.cache_bytes == self._told else min(self._beat_at, self._report_at)
            ):
                self._report(now)
            wait = min(due, self._beat_at) if self.link.connected else due
            if self.cache_bytes != self._told:
                wait = min(wait, self._report_at)
            for descriptor, _ in self._epoll.poll(max(0.0, wait - now)):
                if descriptor == self._kernel_fd:
                    if self._attend() is Served.OVER:
                        return
                else:
                    self.link.on_event()
                    due = 0.0

    def _attend(self) -> Served:
        """Serve a request; after a small hit also those that come within a moment."""
        served = self._serve()
        if served is not Served.ONE or not self._expects_more():
            return served
        now = time.perf_counter_ns()
        end = now + _ATTENTION_ALL_NS
        until = now + _ATTENTION_NS
        while now < until:
            served = self._serve()
            now = time.perf_counter_ns()
            if served is Served.ONE:
                if not self._expects_more():
                    break
                until = min(now + _ATTENTION_NS, end)
            elif served is Served.OVER:
                break
        return served

    def _expects_more(self) -> bool:
        return self._is_small and self._may_look

    def want(self, space: int, chunks: range, reader: int, finished: Finished) -> None:
        """Have chunks of a data space made present for a thread; `finished(True)` when they are, `finished(False)` when they cannot be."""
        self._is_small = False
        now = time.monotonic()
        grant = self._chances.grant(space, chunks, reader, now)
        key = space, chunks.start, chunks.stop
        together = self._wanted.get(key)
        if together is not None and grant.is_fresh and now - together.asked_at < _TOGETHER_S:
            together.finished.append(finished)
            together.readers.add(reader)
            return
        wish = self._wanted[key] = _Wish(now, grant, {reader}, [finished])

        def done(reason: str | None) -> None:
            if self._wanted.get(key) is wish:
                del self._wanted[key]
            is_here = reason is None and self._views[space].is_present(chunks.start, chunks.stop)
            if not is_here:
                reason = reason or "the daemon says that it is there, the presence map does not"
                self._note_failure(space, chunks, wish, reason)
            for each in wish.finished:
                each(is_here)

        self.link.ask(self._params(space, chunks), grant.deadline_s, done)

    def hit(self, space: int, chunks: range, size: int) -> None:
        """Count a read that was served at once, and let the daemon go on ahead of the reader."""
        self.cache_bytes += size
        self._is_small = size <= SMALL_HIT
        view = self._views[space]
        if view.touch(chunks.start, chunks.stop):
            self._touched.append((view.space_id, chunks.start, chunks.stop))
        if not chunks:
            return
        ends = self._ends[space]
        follows = chunks.start in ends or chunks.start + 1 in ends
        ends.append(chunks.stop)
        if not follows:  # whoever reads at random has no use for what is ahead
            return
        reached = sum(view.table.extent(chunks.stop - 1))
        if 0 <= reached - self._hinted[space] < HINT_EVERY:
            return
        if view.lacks_ahead(reached, view.table.count):
            self._hinted[space] = reached
            self.link.tell("ensure", self._params(space, chunks) | {"deadline_s": 1.0})

    def _params(self, space: int, chunks: range) -> dict[str, Any]:
        return {"space": self._views[space].space_id, "first": chunks.start, "stop": chunks.stop}

    def _note_failure(self, space: int, chunks: range, wish: _Wish, reason: str) -> None:
        now = time.monotonic()
        self._chances.note(space, chunks, wish.readers, wish.grant, now)
        if now - self._logged.get(space, -_SAME_FAILURE_S) >= _SAME_FAILURE_S:
            self._logged[space] = now
            _log.warning(
                "read failed with EIO: mount=%s space=%s chunks=%d-%d cause=%s",
                self._mount, self._views[space].space_id.hex()[:16], chunks.start, chunks.stop - 1, reason,
            )  # fmt: skip

    def _report(self, now: float) -> None:
        self._report_at, self._beat_at = now + _REPORT_S, now + BEAT_S
        self._told = self.cache_bytes
        read, self._touched = self._touched, []
        served = {
            "mount": self._mount,
            "cache_bytes": self.cache_bytes,
            "generation": self._generation,
            "read": read,
            "beats": True,
        }
        self.link.tell("served", served)

    def _poll_link(self) -> None:
        wanted = (self.link.fileno, self.link.wants_write)
        if wanted == self._polled:
            return
        if self._polled[0] >= 0 and self._polled[0] != wanted[0]:
            with suppress(OSError):  # closed: the kernel has forgotten it already
                self._epoll.unregister(self._polled[0])
        mask = select.EPOLLIN | (select.EPOLLOUT if wanted[1] else 0)
        if wanted[0] >= 0:
            if self._polled[0] == wanted[0]:
                self._epoll.modify(wanted[0], mask)
            else:
                self._epoll.register(wanted[0], mask)
        self._polled = wanted

    def _end(self, number: int, frame: object) -> None:
        self._ending = True


def lower_own_chances_of_being_killed() -> None:
    """Ask the kernel to kill others first when memory runs out; without the right to, nothing happens."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("-900")
    except OSError:
        os.getpid()
