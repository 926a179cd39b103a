"""The process that answers for the holes of one generation in kernel mode.

`python -m rafsfs.erofs.guard SPEC.json GENERATION GROUP JOURNAL`, the last two inherited descriptors. More are named in its record: the
data files as they were opened before the marks. It never reads them; they are here so that a daemon can get them when the holder is dead.

Decided here: which read goes on. Rules. Allowed is only a read whose chunks the presence map shows present, in the very inode that
the event names, and what the daemon itself does to a data file.
Everything else is asked for, and denied with EIO at the first doubt: unknown file,
unknown event, error, deadline. An event is in the journal before anything is done about it. A successor settles what its predecessor
left before its first read, and keeps the numbers of what is still open occupied, since an answer names an event by number only.
No exception ends this process while events are open; if one does all the same, the holder has the group and a successor comes.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from .. import logs
from ..errors import FormatError, RafsError
from ..flat.loop import Loop, Served, lower_own_chances_of_being_killed
from ..fuse.spec import MountSpec, load_spec
from ..store.space_view import SpaceView, open_views
from . import fanotify
from .fanotify import Event, Journal
from .generation import from_record

_log = logging.getLogger("rafsfs.erofs.guard")

_FAR: Final = 1 << 62


class Guard:
    """Answers events. `loop` is set before `take_over`."""

    loop: Loop

    def __init__(self, group: int, journal: Journal, views: Sequence[SpaceView]) -> None:
        self._group = group
        self._journal = journal
        self._views = views
        self._by_inode = {view.data_inode: number for number, view in enumerate(views)}
        self._buffer = bytearray(fanotify.READ_BUFFER)
        self._waiting: dict[int, list[int]] = {}
        """Open events that wait for chunks, by number: a list of the pid alone, whose identity tells one event from the next."""

    def take_over(self) -> None:
        """Settle what an earlier guard has read and not answered. Called once, before the first `serve`."""
        self._journal.lock()  # the predecessor is dead when it is ours, whatever its parent believes
        left = self._journal.live()
        for number in range(fanotify.JOURNAL_SLOTS):
            if number not in left:
                self._answer(number, ok=False, close=False)
        if left:
            _log.info("taking over: open events=%d", len(left))
        for number, (space, pid, offset, length) in left.items():
            if self._occupy(number):
                self._decide(number, space, pid, offset, length)
            else:
                self._answer(number, ok=False, close=False)

    def daemon_came(self) -> None:
        """Let go on what the daemon that has just come was waiting with: it may be what others wait for."""
        for number, pid in list(self._waiting.items()):
            if self.loop.link.is_daemon(pid[0]):
                self._answer(number, ok=True)

    def _occupy(self, number: int) -> bool:
        """Keep the kernel from giving `number` to a new event before the old one of this name is answered."""
        try:
            os.fstat(number)
        except OSError:
            place = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            if place != number:
                os.dup2(place, number, inheritable=False)
                os.close(place)
            return True
        return (
            False  # a descriptor of ours: no event can get the number, but it cannot be closed after the answer either
        )

    def serve(self) -> Served:
        """Handle the events of one read, if there are any."""
        try:
            length = os.readv(self._group, [self._buffer])
        except OSError as error:
            if error.errno not in {errno.EAGAIN, errno.EINTR}:
                _log.error("reading events failed: %s", error.strerror)
            return Served.NOTHING
        events = list(self._events(memoryview(self._buffer)[:length]))
        known = []
        for event in events:
            space = self._space_of(event)
            if space is not None:
                self._journal.note(event.descriptor, space, event.pid, event.offset, event.length)
            known.append(space)
        for event, space in zip(events, known, strict=True):
            try:
                if event.descriptor < 0:
                    continue
                if space is None:
                    _log.warning("read denied: not one of our events: fd=%d pid=%d", event.descriptor, event.pid)
                    self._answer(event.descriptor, ok=False)
                else:
                    self._decide(event.descriptor, space, event.pid, event.offset, event.length)
            except Exception:  # noqa: BLE001 - whatever it is: this read fails, the others are answered
                _log.exception("read denied after a fault of our own")
                self._answer(event.descriptor, ok=False)
        return Served.ONE

    def _events(self, data: memoryview) -> list[Event]:
        found: list[Event] = []
        try:
            found.extend(fanotify.parse_events(data))
        except FormatError as error:
            _log.error("events not understood: %s", error)
        return found

    def _space_of(self, event: Event) -> int | None:
        if event.descriptor < 0 or not event.sound or event.descriptor >= fanotify.JOURNAL_SLOTS:
            return None
        with suppress(OSError):
            found = os.fstat(event.descriptor)
            return self._by_inode.get((found.st_dev, found.st_ino))
        return None

    def _decide(self, number: int, space: int, pid: int, offset: int, length: int) -> None:
        view = self._views[space]
        length = max(0, min(length, _FAR, view.table.size - offset))
        chunks = view.covering(offset, length)
        if view.is_present(chunks.start, chunks.stop):
            self._answer(number, ok=True)
            self.loop.hit(space, chunks, length)
            return
        if self.loop.link.is_daemon(pid):
            self._answer(number, ok=True)
            return
        waiting = self._waiting[number] = [pid]

        def finished(ok: bool) -> None:
            if self._waiting.get(number) is waiting:
                self._answer(number, ok=ok)

        self.loop.want(space, chunks, pid, finished)

    def _answer(self, number: int, *, ok: bool, close: bool = True) -> None:
        """Answer and strike the event, in this order: one that is answered twice is refused, one that is forgotten waits for ever."""
        answer = fanotify.allow if ok else fanotify.deny
        try:
            answer(self._group, number)
        except OSError as error:
            _log.error("answer refused by the kernel: %s", error.strerror)
            if ok:
                with suppress(OSError):
                    fanotify.deny(self._group, number)
        self._waiting.pop(number, None)
        self._journal.clear(number)
        if close:
            with suppress(OSError):
                os.close(number)


def _inherited(spec: MountSpec, generation: int) -> dict[str, int]:
    """Return the data files that were inherited, by the id of their data space in hex."""
    for data in spec.generations:
        record = from_record(data)
        if record is not None and record.number == generation:
            found = zip(record.names, record.descriptors, strict=False)
            return {name.rpartition("/")[2]: number for name, number in found if name.startswith("file/")}
    return {}


def main(arguments: list[str]) -> int:
    """Answer until SIGTERM; return the exit code."""
    logs.configure()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        spec = load_spec(arguments[0])
        generation, group, memory = (int(text) for text in arguments[1:4])
        inherited = _inherited(spec, generation)
        views = open_views(spec.cache_dir, spec.digest, inherited)
        journal = Journal(memory)
    except (RafsError, OSError) as error:
        _log.error("guard failed: %s", error)
        return getattr(error, "exit_code", 1)
    lower_own_chances_of_being_killed()
    resource.setrlimit(resource.RLIMIT_NOFILE, (fanotify.JOURNAL_SLOTS, fanotify.JOURNAL_SLOTS))
    for descriptor in (group, memory, *inherited.values()):
        os.set_inheritable(descriptor, False)
    guard = Guard(group, journal, views)
    guard.loop = Loop(
        kernel_fd=group,
        serve=guard.serve,
        views=views,
        cache_dir=spec.cache_dir,
        mount=spec.id,
        generation=generation,
        argv=spec.daemon_argv,
        deadline_s=spec.deadline_s,
        daemon_came=guard.daemon_came,
    )
    guard.take_over()
    guard.loop.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
