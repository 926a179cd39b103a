"""`rafs umount`: take a mount away."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import Final

import click

from rafsfs.daemon.launch import connect
from rafsfs.errors import DaemonError, MountError
from rafsfs.fuse.mountpoint import mount_source, unmount
from rafsfs.fuse.spec import load_specs

from .options import cache_dir_option, mountpoint_of, option
from .run import run_async

_OURS: Final = re.compile(r"rafs:|/.*/images/[0-9a-f]{64}/bootstrap\.erofs\Z")
"""What the kernel's table names as the source of a mount of ours: by FUSE, by EROFS."""


@click.command("umount")
@click.argument("directory", type=click.Path())
@option("--lazy", is_flag=True, envvar="RAFS_LAZY", help="Detach it now, also while files are open.")
@cache_dir_option
def command(directory: str, lazy: bool, cache_dir: str) -> None:
    """Take the mount on DIRECTORY away and end its worker.

    What a process has open, or has a copy of in a mount namespace of its own, is served until it lets go; who that is is said.

    Example: rafs umount /models
    """
    run_async(_umount, mountpoint_of(directory), lazy, cache_dir)


async def _umount(mountpoint: str, lazy: bool, cache_dir: str) -> None:
    recorded = any(spec.mountpoint == mountpoint for spec in load_specs(os.path.abspath(cache_dir)))
    source = mount_source(mountpoint)
    if not recorded and not _OURS.match(source or ""):
        raise MountError(f"{mountpoint} is not a rafs mount; see `rafs status`")
    with suppress(DaemonError):
        async with connect(cache_dir, start=recorded) as connection:
            done = await connection.call("umount", {"mountpoint": mountpoint, "lazy": lazy})
            if done.get("detached"):
                kept_by = "; ".join(done.get("kept_by", ())) or "somebody"
                click.echo(f"{mountpoint} is unmounted here, but served on until it is let go of: {kept_by}", err=True)
            return
    unmount(mountpoint, lazy=lazy)  # left over from a cache directory that is gone, or from another one
