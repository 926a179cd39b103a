"""`rafs holder`: the process that keeps the descriptors of mounts while daemon and workers are replaced."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from rafsfs.daemon.connection import socket_path
from rafsfs.erofs import holdings

from .options import cache_dir_option


@click.command("holder")
@cache_dir_option
def command(cache_dir: str) -> None:
    """Keep the descriptors of mounts of the cache directory until SIGTERM, for a daemon run with --external-holder.

    For supervisors that end all processes of a daemon together, as containers do: run it outside. While it lives, mounts of mode
    lazy go on when daemon and workers are replaced, reads wait meanwhile. A daemon of its own starts one by itself and needs none of this.

    Example: rafs holder --cache-dir /var/lib/rafs
    """
    os.makedirs(cache_dir, mode=0o700, exist_ok=True)
    directory = os.path.dirname(socket_path(cache_dir))
    program = str(Path(holdings.__file__).with_name("holder.py"))
    sys.stdout.flush()
    # The bare interpreter, without any module of ours: a tenth of the memory, and nothing of ours in it that could fail.
    arguments = [
        "-I",
        "-S",
        program,
        os.path.join(directory, "holder.sock"),
        os.path.join(directory, "daemon.log"),
        "stay",
    ]
    os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - there is no shell to want
