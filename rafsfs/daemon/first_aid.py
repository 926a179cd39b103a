"""What a daemon does that was started by itself, before it loads the rest of the program: its lock, and workers for whoever waits.

Loading all of the daemon takes most of a second, several on a busy machine, and readers of a mount whose worker has died with the daemon
would wait for it. Decided here: that such a start takes the lock first, so that of several that race the losers cost next to nothing; and
that generations whose descriptors the holder has get their workers at once. All else is left to `recovery` and `ErofsMount`, which find a
live worker. Nothing here is needed for correctness: what fails is tried again by them. Standard library only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from ..erofs import superblock
from ..erofs.generation import Generation, from_record
from ..erofs.holder_line import HolderLine
from ..errors import RafsError
from ..fuse.spec import MountSpec, load_specs, process_start
from ..store.boot import boot_id
from ..store.lock import lock_early
from .spawn import daemon_argv
from .worker_start import start_worker

_log = logging.getLogger(__name__)
_lines: Final[list[HolderLine]] = []
"""Open from first aid until the daemon has a line of its own: the holder is not to start another daemon meanwhile."""


def give(arguments: Sequence[str]) -> None:
    """Do it, if `arguments` are those of a daemon that was started by itself. Raises CacheBusyError if another one runs."""
    if len(arguments) != 3 or list(arguments[:2]) != ["daemon", "--cache-dir"] or not os.path.isdir(arguments[2]):
        return
    cache_dir = os.path.abspath(arguments[2])
    with suppress(OSError):
        lock_early(cache_dir)
        if os.geteuid() == 0 and os.path.exists(os.path.join(cache_dir, "holder.sock")):
            line = HolderLine(cache_dir, daemon_argv(cache_dir))
            _lines.append(line)
            for spec in load_specs(cache_dir):
                _aid(line, spec)


def done() -> None:
    """Let go of the line: the daemon has its own."""
    while _lines:
        _lines.pop().close()


def _aid(line: HolderLine, spec: MountSpec) -> None:
    records = [record for data in spec.generations if (record := from_record(data)) is not None]
    for record in records:
        if not _needs_worker(record):
            continue
        copies: dict[str, int] = {}

        def get(name: str, copies: dict[str, int] = copies) -> int | None:
            descriptor = line.get(name)
            if descriptor is not None:
                copies[name] = descriptor
            return descriptor

        try:
            start_worker(spec, records, record, get)
            pidfd = os.pidfd_open(record.worker_pid)
            try:
                line.ask(f"put {record.pid_name(spec.id)}", pidfd)
            finally:
                os.close(pidfd)
        except RafsError as error:
            _log.debug("no first aid: %s", error)
        finally:
            for descriptor in copies.values():
                os.close(descriptor)


def _needs_worker(record: Generation) -> bool:
    return (
        record.rung in {"lazy", "kernel"}
        and record.boot_id == boot_id()
        and superblock.is_alive(record.superblocks)
        and (record.worker_pid <= 0 or process_start(record.worker_pid) != record.worker_start)
    )
