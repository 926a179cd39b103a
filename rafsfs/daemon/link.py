"""A worker's line to the daemon, without an event-loop library: for processes that serve a kernel and must be there at once.

Decided here: what happens to a question when the daemon dies, is slow or answers with an error. A question is idempotent
(`ensure`): it is asked again of each daemon that comes, until an answer or its deadline; a daemon is started when none answers and
somebody waits. Rule: every question ends, by `done(None)` or `done(reason)`, no later than its deadline.

Concurrency: single-threaded and never blocking; the owner polls `fileno`, calls `on_event` when it is ready and `tick` at the
times that `tick` returns.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from .. import __version__
from ..errors import CacheError, DaemonError, FormatError
from .protocol import VERSION, FrameReader, Hello, Reply, Request, encode
from .spawn import spawn_daemon

_log = logging.getLogger(__name__)

_PAUSE_S: Final = (0.05, 1.0)
"""First and longest pause between attempts to find the daemon."""
_AGAIN_S: Final = 0.1
"""Before a question is put again to a daemon that could not answer for a reason of its own."""
_GREETING_S: Final = 10.0
_UCRED: Final = struct.Struct("3i")

Done = Callable[[str | None], None]
"""Called once with None, or with why it could not be done."""


class _Question:
    __slots__ = ("deadline", "done", "not_before", "params")

    def __init__(self, params: dict[str, Any], deadline: float, done: Done) -> None:
        self.params = params
        self.deadline = deadline
        self.done = done
        self.not_before = 0.0


class DaemonLink:
    """The line. `changed` is called when the descriptor to be polled, or what for, has changed; `connected` when a daemon has come."""

    def __init__(
        self,
        cache_dir: str,
        mount: str,
        *,
        ready: dict[str, Any],
        argv: Sequence[str] = (),
        changed: Callable[[], None],
        connected: Callable[[], None] | None = None,
    ) -> None:
        self._cache_dir = cache_dir
        self._mount = mount
        self._ready = ready
        self._argv = list(argv) or None
        self._changed = changed
        self._on_connect = connected
        self._socket: socket.socket | None = None
        self._reader = FrameReader()
        self._out = bytearray()
        self._greeted = False
        self._since = 0.0
        self._next_id = 0
        self._waiting: list[_Question] = []
        self._asked: dict[int, _Question] = {}
        self._attempt_at = 0.0
        self._pause = _PAUSE_S[0]
        self._child: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self.daemon_pid = 0
        """Process at the other end, 0 if there is none."""

    # ---- for the owner's loop ------------------------------------------------------------------------------------

    @property
    def fileno(self) -> int:
        """Descriptor to poll, -1 if there is none now."""
        return self._socket.fileno() if self._socket is not None else -1

    @property
    def wants_write(self) -> bool:
        """Whether it is to be polled for writing as well."""
        return bool(self._out)

    def is_daemon(self, pid: int) -> bool:
        """Tell whether `pid` is the process at the other end, still alive: then no other process can have its number."""
        if not pid or pid != self.daemon_pid or self._pidfd < 0:
            return False
        import select  # noqa: PLC0415 - the guard alone asks

        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return not poller.poll(0)

    def ask(self, params: dict[str, Any], deadline_s: float, done: Done) -> None:
        """Call `ensure` with `params`; `done` is called later, never from here."""
        question = _Question(params, time.monotonic() + deadline_s, done)
        self._waiting.append(question)
        self._send_waiting(time.monotonic())

    def tell(self, method: str, params: dict[str, Any]) -> None:
        """Send a call whose answer nobody waits for, if there is a daemon."""
        if self._greeted and len(self._out) < 1 << 20:
            self._send(Request(self._number(), method, params))

    @property
    def connected(self) -> bool:
        """Whether a daemon knows of us."""
        return self._greeted

    def tick(self, now: float) -> float:
        """Do what is due; return when to be called again at the latest, seconds of time.monotonic()."""
        self._expire(now)
        if self._socket is not None and not self._greeted and now - self._since > _GREETING_S:
            self._lost("it does not answer")
        if self._socket is None and now >= self._attempt_at:
            self._connect(now)
        if self._greeted:
            self._send_waiting(now)
        due = [now + _GREETING_S]
        if self._socket is None:
            due.append(self._attempt_at)
        for question in (*self._waiting, *self._asked.values()):
            due.append(question.deadline)
            if question.not_before > now:
                due.append(question.not_before)
        return min(due)

    def on_event(self) -> None:
        """Read and write what the socket allows."""
        if self._socket is None:
            return
        try:
            while True:
                data = self._socket.recv(65536)
                if not data:
                    self._lost("it went away")
                    return
                for message in self._reader.feed(data):
                    if isinstance(message, Hello):
                        self._on_hello(message)
                    elif isinstance(message, Reply):
                        self._on_reply(message)
                    if self.fileno < 0:  # it was not what we want to hear
                        return
                if len(data) < 65536:
                    break
        except BlockingIOError:
            pass
        except (OSError, FormatError) as error:
            self._lost(str(error))
            return
        self._flush()

    def close(self) -> None:
        """Close the connection."""
        self._drop()

    # ---- inside --------------------------------------------------------------------------------------------------

    def _connect(self, now: float) -> None:
        self._attempt_at = now + self._pause
        self._pause = min(self._pause * 2, _PAUSE_S[1])
        self._reap()
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        directory = -1
        try:
            line.settimeout(1.0)
            # A path of a UNIX socket holds 107 bytes: go through the directory's descriptor.
            directory = os.open(self._cache_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            line.connect(f"/proc/self/fd/{directory}/daemon.sock")
            pid = _UCRED.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0]
            self._pidfd = os.pidfd_open(pid) if pid else -1
            line.setblocking(False)
        except OSError as error:
            line.close()
            _log.debug("no daemon: %s", error)
            if self._waiting or self._asked:
                self._start_daemon()
            return
        finally:
            if directory >= 0:
                os.close(directory)
        self._socket = line
        self.daemon_pid = pid
        self._since = now
        self._reader = FrameReader()
        self._changed()
        self._send(Hello(VERSION, f"rafs {__version__}", self._mount, os.getpid()))
        self._send(Request(self._number(), "ready", self._ready))
        if self._on_connect is not None:
            self._on_connect()

    def _start_daemon(self) -> None:
        if self._child is not None and self._child.poll() is None:
            return
        with suppress(CacheError, OSError):
            # Many workers may be here at once: the directory's lock decides, the losers' processes end by themselves.
            self._child = spawn_daemon(self._cache_dir, self._argv)
            self._attempt_at = time.monotonic() + 0.1 + random.random() * 0.05

    def _reap(self) -> None:
        if self._child is not None and self._child.poll() is not None:
            self._child = None

    def _on_hello(self, hello: Hello) -> None:
        if hello.version != VERSION:
            self._lost(f"it speaks protocol {hello.version}, expected {VERSION}")

    def _on_reply(self, reply: Reply) -> None:
        question = self._asked.pop(reply.id, None)
        if question is None:
            if not self._greeted:  # the answer to `ready`
                if reply.error:
                    self._lost(reply.message)
                    return
                self._greeted = True
                self._pause = _PAUSE_S[0]
                self._send_waiting(time.monotonic())
            return
        if reply.error == DaemonError.__name__:
            question.not_before = time.monotonic() + _AGAIN_S
            self._waiting.append(question)
        else:
            question.done(f"{reply.error}: {reply.message}" if reply.error else None)

    def _send_waiting(self, now: float) -> None:
        if not self._greeted or not self._waiting:
            return
        later = [question for question in self._waiting if question.not_before > now]
        due = [question for question in self._waiting if question.not_before <= now]
        self._waiting = later
        for question in due:
            number = self._number()
            self._asked[number] = question
            left = max(0.1, question.deadline - now - 0.2)
            self._send(Request(number, "ensure", question.params | {"deadline_s": left}))

    def _expire(self, now: float) -> None:
        late = [question for question in self._waiting if question.deadline <= now]
        self._waiting = [question for question in self._waiting if question.deadline > now]
        for number, question in list(self._asked.items()):
            if question.deadline <= now:
                del self._asked[number]
                late.append(question)
        for question in late:
            question.done("DeadlineError: no answer in time" + ("" if self._greeted else ", no daemon answers"))

    def _number(self) -> int:
        self._next_id += 1
        return self._next_id

    def _send(self, message: Hello | Request) -> None:
        self._out += encode(message)
        self._flush()

    def _flush(self) -> None:
        had = bool(self._out)
        try:
            while self._out and self._socket is not None:
                del self._out[: self._socket.send(self._out)]
        except BlockingIOError:
            pass
        except OSError as error:
            self._lost(str(error))
            return
        if had:
            self._changed()

    def _lost(self, why: str) -> None:
        _log.debug("connection to the daemon ended: %s", why)
        self._drop()
        self._waiting += self._asked.values()
        self._asked.clear()
        self._attempt_at = max(self._attempt_at, time.monotonic() + _PAUSE_S[0])

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._socket = None
        self._pidfd = -1
        self.daemon_pid = 0
        self._greeted = False
        self._out.clear()
        self._changed()
