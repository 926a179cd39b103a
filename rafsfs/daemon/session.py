"""One connection to the daemon: requests in, events and replies out, many calls at once.

Concurrency: one reader (`run`) and a task per call, in the nursery that the caller owns; a call that is cancelled with its connection
leaves nothing but what its method says. Writes are serialised by a lock. A fault of ours in a call becomes a reply, not a crash.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import trio

from .. import __version__
from ..errors import DaemonError, RafsError
from .protocol import VERSION, Event, FrameReader, Hello, Message, Reply, Request, encode, error_reply

_log = logging.getLogger(__name__)

PROGRESS_S: Final = 0.2
"""Between two events of one call."""
_CALLS: Final = 256
"""Calls of one connection at once; the next one waits."""

Progress = Callable[[dict[str, Any]], None]
Handle = Callable[[Request, Progress], Awaitable[dict[str, Any]]]


class Session:
    """One connection: reads requests, runs each in a task, writes replies."""

    def __init__(self, handle: Handle, stream: trio.SocketStream, nursery: trio.Nursery) -> None:
        self._handle = handle
        self._stream = stream
        self._nursery = nursery
        self._lock = trio.Lock()
        self._limit = trio.Semaphore(_CALLS)
        self._mount = ""

    async def run(self) -> None:
        """Serve until the stream ends; calls still running are then cancelled by the owner of the nursery."""
        reader = FrameReader()
        while data := await self._stream.receive_some(65536):
            for message in reader.feed(data):
                if isinstance(message, Hello):
                    self._mount = message.mount
                    await self._send(Hello(VERSION, f"rafs {__version__}", "", os.getpid()))
                elif isinstance(message, Request):
                    await self._limit.acquire()
                    self._nursery.start_soon(self._run, message)

    async def _run(self, request: Request) -> None:
        pending: dict[str, Any] = {}

        async def tell(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            task_status.started()
            while True:
                await trio.sleep(PROGRESS_S)
                if pending:
                    data = dict(pending)
                    pending.clear()
                    await self._send(Event(request.id, data))

        try:
            if self._mount and request.method == "ensure":
                request.params["mount"] = self._mount
            async with _progress_task(tell, quiet=request.method == "ensure"):
                result = await self._handle(request, pending.update)
            reply = Reply(request.id, result)
        except RafsError as error:
            reply = error_reply(request.id, error)
        except Exception as error:  # noqa: BLE001 - the boundary of a call: log it, tell the caller, serve on
            _log.exception("call failed: method=%s", request.method)
            reply = error_reply(request.id, DaemonError(f"the daemon met a fault of its own: {error!r}; see its log"))
        finally:
            self._limit.release()
        await self._send(reply)

    async def _send(self, message: Message) -> None:
        async with self._lock:
            await self._stream.send_all(encode(message))


@asynccontextmanager
async def _progress_task(tell: Callable[..., Any], *, quiet: bool) -> AsyncIterator[None]:
    """Run the progress sender beside a call; an error of the call comes out as itself, not in a group."""
    if quiet:
        yield
        return
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(tell)
        try:
            yield
        except Exception as error:  # noqa: BLE001 - carried out of the nursery and raised below
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise first_error(failure) if isinstance(failure, BaseExceptionGroup) else failure


def first_error(group: BaseException) -> BaseException:
    """Return the first error of ours in a group, for a caller who wants one."""
    while isinstance(group, BaseExceptionGroup):
        ours, _ = group.split(RafsError)
        group = (ours or group).exceptions[0]
    return group
