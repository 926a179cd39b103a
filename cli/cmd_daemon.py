"""`rafs daemon`: the node daemon of a cache directory."""

from __future__ import annotations

from typing import Any, Final

import click

from rafsfs import logs
from rafsfs.daemon.launch import connect
from rafsfs.daemon.server import DaemonSettings, MirrorSettings, run_daemon
from rafsfs.errors import DaemonError
from rafsfs.fetch.source import FetchSettings
from rafsfs.net.descriptors import allow_many_descriptors

from .options import (
    SizeType,
    cache_dir_option,
    option,
    quota_of,
    quota_option,
    registry_options,
    take_registry_options,
)
from .process import wait_ended
from .run import run_async
from .swarm import split_address, swarm_factory, swarm_options, take_swarm_options

_STOP_S: Final = 60.0
"""Longest wait for a daemon to bring what it has fetched to the disk."""


@click.command("daemon")
@cache_dir_option
@option(
    "--connections",
    envvar="RAFS_CONNECTIONS",
    type=click.IntRange(3, 256),
    default=8,
    show_default=True,
    help="Ranged reads of the registry at once.",
)
@option(
    "--buffer-size",
    envvar="RAFS_BUFFER_SIZE",
    type=SizeType(),
    default="64MiB",
    show_default=True,
    help="Bytes of fetched data in memory at most.",
)
@option(
    "--readahead",
    envvar="RAFS_READAHEAD",
    type=SizeType(),
    default="32MiB",
    show_default=True,
    help="Window fetched ahead of a sequential reader; up to four times as much on a line whose delay asks for it.",
)
@option(
    "--log-level",
    envvar="RAFS_LOG",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="How much is logged, on standard error.",
)
@quota_option
@option(
    "--metrics",
    envvar="RAFS_METRICS",
    default="",
    metavar="HOST:PORT",
    help="Serve /metrics for Prometheus and /healthz there, to whoever can reach it: 127.0.0.1 is advised.  [default: not served]",
)
@option(
    "--mirror",
    envvar="RAFS_MIRROR",
    default="",
    metavar="HOST:PORT",
    help="Be a mirror of registries there, for containerd, docker and podman; 127.0.0.1 is advised.  [default: none]",
)
@option(
    "--mirror-default",
    envvar="RAFS_MIRROR_DEFAULT",
    default="",
    metavar="REGISTRY",
    help="Registry of clients of the mirror that name none.  [default: they are refused]",
)
@option(
    "--mirror-registry",
    "mirror_registries",
    envvar="RAFS_MIRROR_REGISTRY",
    multiple=True,
    metavar="REGISTRY",
    help="Mirror this registry only; repeatable.  [default: all but those on this node]",
)
@option(
    "--external-holder",
    is_flag=True,
    envvar="RAFS_EXTERNAL_HOLDER",
    help="Somebody else runs `rafs holder` for this cache directory; start none.",
)
@swarm_options
@registry_options
@option("--stop", is_flag=True, help="Stop the daemon that runs and wait; mounts stay up and serve what is present.")
@option("--unmount", is_flag=True, help="With --stop: take all mounts away first.")
def command(
    cache_dir: str,
    connections: int,
    buffer_size: int,
    readahead: int,
    quota: str,
    metrics: str,
    log_level: str,
    stop: bool,
    unmount: bool,
    **options: Any,
) -> None:
    """Run the node daemon of the cache directory until it is told to stop.

    Other commands start it when they need it; run it yourself to give it options, or under a supervisor.

    Example: rafs daemon --cache-dir /var/lib/rafs --scheduler scheduler.example:7946
    """
    if stop:
        run_async(_stop, cache_dir, unmount)
        return
    logs.configure(log_level)
    allow_many_descriptors()
    fetch = FetchSettings(connections=connections, buffer_bytes=buffer_size, readahead_bytes=readahead)
    swarm = take_swarm_options(options)
    settings = DaemonSettings(
        fetch=fetch,
        swarm=swarm_factory(swarm),
        registry=take_registry_options(options),
        keeps_images=swarm.seed,
        mirror=_mirror(options),
        external_holder=options["external_holder"],
        metrics=split_address(metrics, "--metrics") if metrics else None,
        quota=quota_of(quota, cache_dir, is_seed=swarm.seed),
    )
    run_async(run_daemon, cache_dir, settings)


def _mirror(options: dict[str, Any]) -> MirrorSettings | None:
    listen, default, registries = (options[name] for name in ("mirror", "mirror_default", "mirror_registries"))
    if not listen:
        return None
    host, port = split_address(listen, "--mirror")
    return MirrorSettings(host, port, default.lower(), tuple(name.lower() for name in registries))


async def _stop(cache_dir: str, unmount: bool) -> None:
    try:
        async with connect(cache_dir, start=False) as connection:
            pid = (await connection.call("status", {}))["daemon"]["pid"]
            await connection.call("stop", {"unmount": unmount})
    except DaemonError as error:
        raise DaemonError(f"no daemon runs for {cache_dir}") from error
    if not await wait_ended(pid, _STOP_S):
        raise DaemonError(
            f"the daemon of {cache_dir} (pid {pid}) has not ended after {_STOP_S:g} s; see its daemon.log"
        )
