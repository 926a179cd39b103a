"""What a daemon does before it opens a data file: it gets back the descriptors that processes of an earlier daemon keep.

Decided here: where a descriptor is got from, the holder first, else the worker that uses it. Rule: a data file that is guarded by
pre-content events is never opened anew by a daemon. The kernel decides at the opening whether a descriptor raises events; one from
before the mark raises none. With any other, the daemon's own reads would wait for a guard that waits to be started by the daemon.
"""

from __future__ import annotations

import logging
import os
import signal
from contextlib import suppress

from ..errors import MountError
from ..fuse.spec import load_specs, process_start
from ..store.boot import boot_id
from . import superblock, syscalls
from .generation import Generation, from_record
from .holdings import Holdings

_log = logging.getLogger(__name__)


async def recover(holdings: Holdings, cache_dir: str) -> None:
    """Take hold of everything that generations of earlier daemons serve and read, as far as a holder or a worker lives.

    What belongs to a generation whose superblock never was or has gone is let go of: nobody would answer for a group that is left over,
    and whoever reads a file that it marks would wait for ever. Of a record that cannot be read all is kept: it may be needed.
    """
    await holdings.recover()
    alive: set[str] = set()
    known: set[str] = set()
    for spec in load_specs(cache_dir):
        known.add(spec.id)
        for record in filter(None, map(from_record, spec.generations)):
            has_worker = record.worker_pid > 0 and process_start(record.worker_pid) == record.worker_start
            if record.boot_id == boot_id() and superblock.is_alive(record.superblocks):
                alive.add(f"{spec.id}/{record.number}")
                if has_worker:
                    await _take_from_worker(holdings, spec.id, record)
            elif has_worker:
                with suppress(ProcessLookupError):
                    os.kill(record.worker_pid, signal.SIGKILL)
    for name in holdings.names():
        mount, number = [*name.split("/"), "", ""][1:3]
        is_ours = mount in known or not os.path.exists(os.path.join(cache_dir, "mounts", f"{mount}.json"))
        if is_ours and f"{mount}/{number}" not in alive:
            _log.info("let go of what a mount has left that never came up: name=%s", name)
            await holdings.release(name)


async def _take_from_worker(holdings: Holdings, mount: str, record: Generation) -> None:
    with suppress(OSError, MountError):
        pidfd = os.pidfd_open(record.worker_pid)
        try:
            for name, number in zip(record.names, record.descriptors, strict=False):
                if holdings.get(name) is None:
                    await holdings.hold(name, syscalls.pidfd_getfd(pidfd, number))
                    _log.warning("descriptor taken from the worker: name=%s", name)
            if holdings.get(record.pid_name(mount)) is None:
                await holdings.hold(record.pid_name(mount), os.dup(pidfd))
        finally:
            os.close(pidfd)
