"""`rafs status`: the daemon and its mounts."""

from __future__ import annotations

import os
from typing import Any, Final

import click

from rafsfs.daemon.launch import connect
from rafsfs.errors import DaemonError
from rafsfs.fuse.spec import load_specs

from .options import cache_dir_option, json_option, option
from .output import print_json, print_table, size
from .run import run_async

_PEERS_SHOWN: Final = 8
"""Of a mount, on its line; `--json` has them all."""


@click.command("status")
@cache_dir_option
@json_option
@option(
    "--metrics",
    is_flag=True,
    envvar="RAFS_STATUS_METRICS",
    help="Print the daemon's figures as Prometheus scrapes them.",
)
def command(cache_dir: str, as_json: bool, metrics: bool) -> None:
    """Show the daemon of the cache directory and its mounts: state, bytes present, where bytes came from.

    Starts a daemon only if mounts are recorded that need one.

    Example: rafs status --json
    """
    if metrics:
        print(run_async(_metrics, cache_dir), end="")
        return
    found = run_async(_status, cache_dir)
    if as_json:
        print_json(found)
        return
    daemon, cache = found["daemon"], found.get("cache")
    if not daemon["pid"]:
        print(f"no daemon runs for {daemon['cache_dir']}, nothing is mounted")
        return
    print(
        f"daemon pid {daemon['pid']}, version {daemon['version']}, {size(daemon['rss_bytes'])}, cache {daemon['cache_dir']}"
        + (f", {size(cache['held_bytes'])} held" if cache else "")
        + (f" of {size(cache['quota_bytes'])}" if cache and cache["quota_bytes"] else "")
    )
    rows = []
    for mount in found["mounts"]:
        sources = mount["sources"]
        rows.append(
            (
                mount["mountpoint"],
                mount["ref"],
                mount["mode"],
                mount["state"] + _why(mount),
                f"{size(mount['present_bytes'])} of {size(mount['data_bytes'])}",
                " ".join(f"{name} {size(count)}" for name, count in sources.items() if count) or "-",
            )
        )
    print_table(rows, header=("MOUNTPOINT", "REF", "MODE", "STATE", "PRESENT", "SERVED FROM"))
    for mount in found["mounts"]:
        if mount["peers"]:
            print(f"{mount['mountpoint']} got from peers: {_most(mount['peers'])}")


def _most(peers: dict[str, int]) -> str:
    """Return the peers that gave most, and how many more there are."""
    ranked = sorted(peers.items(), key=lambda item: (-item[1], item[0]))
    rest = f" and {len(ranked) - _PEERS_SHOWN} more" if len(ranked) > _PEERS_SHOWN else ""
    return ", ".join(f"{address} {size(count)}" for address, count in ranked[:_PEERS_SHOWN]) + rest


async def _metrics(cache_dir: str) -> str:
    async with connect(cache_dir, start=False) as connection:
        return str((await connection.call("metrics", {}))["text"])


def _why(mount: dict[str, Any]) -> str:
    """Return what is wrong with a mount, or why it is not mounted in a better mode."""
    reasons = [mount[name] for name in ("reason", "why") if mount[name]]
    return f" ({'; '.join(reasons)})" if reasons else ""


async def _status(cache_dir: str) -> dict[str, Any]:
    recorded = any(True for _ in load_specs(os.path.abspath(cache_dir)))
    try:
        async with connect(cache_dir, start=recorded) as connection:
            return await connection.call("status", {})
    except DaemonError:
        if recorded:
            raise
    nobody = {"pid": 0, "version": "", "cache_dir": os.path.abspath(cache_dir), "rss_bytes": 0}
    return {"daemon": nobody, "mounts": []}
