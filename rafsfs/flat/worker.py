"""The process of one flat server: `python -m rafsfs.flat.worker SPEC.json GENERATION FD`; FD is /dev/fuse, inherited and mounted.

It outlives the daemon, and is replaced by it when it dies. Loads no event loop, no FUSE library, no numpy: a successor must
be there before a reader notices.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from .. import logs
from ..errors import RafsError
from ..fuse.spec import load_spec
from ..store.space_view import open_views
from .loop import Loop
from .server import FlatServer

_log = logging.getLogger("rafsfs.flat.worker")


def main(arguments: list[str]) -> int:
    """Serve until the file system has gone; return the exit code."""
    logs.configure()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        spec = load_spec(arguments[0])
        generation, descriptor = int(arguments[1]), int(arguments[2])
        views = open_views(spec.cache_dir, spec.digest)
    except RafsError as error:
        _log.error("mount failed: %s", error)
        return error.exit_code
    os.set_inheritable(descriptor, False)
    os.set_blocking(descriptor, False)
    server = FlatServer(descriptor, views)
    server.loop = Loop(
        kernel_fd=descriptor,
        serve=server.serve,
        views=views,
        cache_dir=spec.cache_dir,
        mount=spec.id,
        generation=generation,
        argv=spec.daemon_argv,
        deadline_s=spec.deadline_s,
    )
    server.take_over()
    server.loop.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
