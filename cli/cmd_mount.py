"""`rafs mount`: an image becomes a directory."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import click
import trio

from rafsfs import logs
from rafsfs.daemon.connection import Connection, open_connection
from rafsfs.daemon.launch import connect
from rafsfs.errors import DaemonError, RafsError

from .options import (
    DurationType,
    cache_dir_option,
    for_daemon,
    json_option,
    mountpoint_of,
    option,
    quota_of,
    registry_options,
    scheduler_option,
    take_registry_options,
)
from .output import print_json
from .run import run_async

if TYPE_CHECKING:
    from rafsfs.daemon.server import Daemon


@click.command("mount")
@click.argument("ref")
@click.argument("directory", type=click.Path())
@option(
    "--mode",
    envvar="RAFS_MODE",
    type=click.Choice(["auto", "fuse", "erofs", "lazy", "kernel"]),
    default="auto",
    show_default=True,
    help="How the kernel gets at the image; see `rafs doctor` for what this machine has.",
)
@option(
    "--prefetch",
    envvar="RAFS_PREFETCH",
    type=click.Choice(["none", "all"]),
    default="none",
    show_default=True,
    help="What to fetch before it is asked for, behind what is.",
)
@option(
    "--deadline",
    envvar="RAFS_DEADLINE",
    type=DurationType(0.1, 3600),
    default="60s",
    show_default=True,
    help="A read that cannot be served fails with EIO after this long.",
)
@option(
    "--include",
    envvar="RAFS_INCLUDE",
    multiple=True,
    metavar="GLOB",
    help="Show only what matches, such as *.safetensors or tokenizer/; repeatable.  [default: all]",
)
@option(
    "--exclude",
    envvar="RAFS_EXCLUDE",
    multiple=True,
    metavar="GLOB",
    help="Leave out what matches; it is not fetched either; repeatable.  [default: nothing]",
)
@scheduler_option
@option("--foreground", is_flag=True, envvar="RAFS_FOREGROUND", help="Stay until Ctrl-C, then unmount.")
@cache_dir_option
@json_option
@registry_options
def command(ref: str, directory: str, cache_dir: str, foreground: bool, as_json: bool, **options: Any) -> None:
    """Mount the image REF, read-only, on DIRECTORY, an empty one. Returns when it can be read.

    The work is left to the node daemon of the cache directory, which is started if none runs.

    Example: rafs mount registry.example/models/llama:v1 /models
    """
    params = for_daemon(ref, take_registry_options(options)) | {
        "mountpoint": mountpoint_of(directory),
        "mode": options["mode"],
        "prefetch": options["prefetch"],
        "include": list(options["include"]),
        "exclude": list(options["exclude"]),
        "deadline_s": options["deadline"],
        "scheduler": options["scheduler"],
    }
    if foreground:
        run_async(_foreground, cache_dir, params)
        return
    mounted = run_async(_mount, cache_dir, params)
    if as_json:
        print_json(mounted)


async def _mount(cache_dir: str, params: dict[str, Any]) -> dict[str, Any]:
    async with connect(cache_dir) as connection:
        return await connection.call("mount", params)


async def _foreground(cache_dir: str, params: dict[str, Any]) -> None:
    """Mount through the daemon that runs, or be the daemon; unmount at the end."""
    try:
        async with open_connection(cache_dir) as connection:
            await _hold(connection, params)
    except DaemonError:
        pass
    else:
        return
    # Here, not above: `rafs mount` without --foreground must be quick, and needs none of the daemon.
    from rafsfs.daemon.server import DaemonSettings, run_daemon  # noqa: PLC0415
    from rafsfs.fetch.source import FetchSettings  # noqa: PLC0415

    from .swarm import settings_from_environment, swarm_factory  # noqa: PLC0415

    logs.configure()
    failure: list[RafsError] = []

    async with trio.open_nursery() as nursery:

        def ready(daemon: Daemon) -> None:
            nursery.start_soon(_mount_in, cache_dir, params, daemon, failure)

        settings = DaemonSettings(
            fetch=FetchSettings(deadline_s=params["deadline_s"]),
            swarm=swarm_factory(settings_from_environment()),
            quota=quota_of(os.environ.get("RAFS_QUOTA", ""), cache_dir, is_seed=False),
        )
        await run_daemon(cache_dir, settings, ready=ready)
    if failure:
        raise failure[0]


async def _mount_in(cache_dir: str, params: dict[str, Any], daemon: Daemon, failure: list[RafsError]) -> None:
    """Ask the daemon of this very process for the mount, which goes when it ends; a failure ends it."""
    daemon.taken_away_at_end.add(params["mountpoint"])
    try:
        await _mount(cache_dir, params)
    except RafsError as error:
        failure.append(error)
        daemon.stop_requested.set()


async def _hold(connection: Connection, params: dict[str, Any]) -> None:
    """Mount, wait for Ctrl-C, SIGTERM or the daemon's end, unmount."""
    await connection.call("mount", params)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def until_closed() -> None:
                await connection.closed.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_closed)
            async for _ in signals:
                break
            nursery.cancel_scope.cancel()
    if not connection.closed.is_set():
        await connection.call("umount", {"mountpoint": params["mountpoint"], "lazy": True})
