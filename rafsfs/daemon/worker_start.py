"""Starting the process that serves a generation of the kernel's modes. Standard library only: see first_aid.py.

Decided here: what a worker inherits, and that it stands in the mount's record before the worker reads that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from ..erofs.generation import Generation
from ..errors import MountError
from ..fuse.spec import MountSpec, process_start
from .spawn import spawn_detached


def start_worker(
    spec: MountSpec, records: Sequence[Generation], record: Generation, get: Callable[[str], int | None]
) -> None:
    """Start a worker for `record`, one of the mount's `records`; it is a child, to be collected by `reap` or nobody.

    `get` lends descriptors by name. Raises MountError if one that is needed is lost, CacheError, OSError.
    """
    needed = record.held_names(spec.id)
    files = [record.file_name(spec.id, space) for space in spec.spaces] if record.rung == "kernel" else []
    held = {name: descriptor for name in [*needed, *files] if (descriptor := get(name)) is not None}
    if not needed or not held.keys() >= set(needed):
        raise MountError(f"generation {record.number} of {spec.mountpoint} has lost what it serves")
    record.names, record.descriptors = list(held), list(held.values())
    _save(spec, records)  # the worker reads it
    module = "rafsfs.flat.worker" if record.rung == "lazy" else "rafsfs.erofs.guard"
    command = [sys.executable, "-m", module, spec.path, str(record.number)]
    command += map(str, record.descriptors[: len(needed)])  # it finds the data files in its record
    process = spawn_detached(command, os.path.join(spec.cache_dir, "daemon.log"), pass_fds=record.descriptors)
    record.worker_pid = process.pid
    record.worker_start = process_start(process.pid)
    process.returncode = 0  # the object is let go of here
    _save(spec, records)


def _save(spec: MountSpec, records: Sequence[Generation]) -> None:
    spec.generations = [one.as_dict() for one in records]
    spec.save()
