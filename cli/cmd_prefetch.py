"""`rafs prefetch`: fetch files of a mount before somebody reads them, in the order in which he will."""

from __future__ import annotations

import json
import os
from typing import Any, Final

import click

from rafsfs.daemon.connection import open_connection
from rafsfs.errors import MountError, UsageError

from .options import cache_dir_option, json_option, option
from .output import print_json, progress_bar, size
from .run import run_async

_PLAN_LIMIT: Final = 64 << 20
"""Bytes of a plan that are read."""
_BATCH: Final = 20_000
"""Entries sent in one call: about 2 MiB of the 8 that a frame holds."""


@click.command("prefetch")
@click.argument("path", type=click.Path())
@option(
    "--plan",
    envvar="RAFS_PREFETCH_PLAN",
    type=click.Path(dir_okay=False),
    help="What to fetch, in this order: JSON, or a line of JSON each, of path (below PATH), offset and length.",
)
@option(
    "--order",
    envvar="RAFS_PREFETCH_ORDER",
    type=click.Choice(["offset", "name"]),
    default="offset",
    show_default=True,
    help="Without a plan: whole files, or their tensors sorted by name.",
)
@cache_dir_option
@json_option
def command(path: str, plan: str | None, order: str, cache_dir: str, as_json: bool) -> None:
    """Fetch PATH, a file or directory in a mount, and return when it is here. Reads go before it.

    Example: rafs prefetch /models/llama --order name
    """
    entries = read_plan(plan) if plan is not None else None
    result = run_async(_prefetch, path, entries, order, cache_dir, not as_json)
    if as_json:
        print_json(result)
    else:
        print(
            f"{path}: {size(result['wanted_bytes'])} present, {size(result['fetched_bytes'])} fetched, "
            f"{size(result['peer_bytes'])} from other nodes, {size(result['local_bytes'])} copied from other images"
        )


def read_plan(path: str) -> list[Any]:
    """Return the entries of a plan, a JSON array or a JSON object per line; what they mean is checked by the daemon. Raises UsageError."""
    with open(path, "rb") as file:
        data = file.read(_PLAN_LIMIT + 1)
    if len(data) > _PLAN_LIMIT:
        raise UsageError(f"plan {path} is longer than {size(_PLAN_LIMIT)}")
    line = 0
    try:
        if data.lstrip()[:1] == b"[":
            return list(json.loads(data))
        entries = []
        for line, text in enumerate(data.splitlines(), 1):  # noqa: B007 - read where it fails
            if text.strip():
                entries.append(json.loads(text))
    except (ValueError, RecursionError) as error:
        where = f"line {line} of " if line else ""
        raise UsageError(f"{where}plan {path} is not JSON: {str(error)[:200]}") from None
    return entries


async def _prefetch(path: str, entries: list[Any] | None, order: str, cache_dir: str, bar: bool) -> dict[str, Any]:
    where = os.path.realpath(path)
    async with open_connection(cache_dir) as connection:
        status = await connection.call("status", {})
        mounts = [mount["mountpoint"] for mount in status["mounts"]]
        held = [mount for mount in mounts if where == mount or where.startswith(mount.rstrip("/") + "/")]
        if not held:
            raise MountError(f"{where} is in no mount of the daemon of {cache_dir}; see `rafs status`")
        mountpoint = max(held, key=len)
        params = {"mountpoint": mountpoint, "path": os.path.relpath(where, mountpoint), "order": order}
        if params["path"] == ".":
            params["path"] = ""
        total: dict[str, Any] = {}
        with progress_bar("prefetching", enabled=bar) as progress:

            def show(event: dict[str, Any]) -> None:
                progress(event["done"], event["total"])

            if entries is None:
                return await connection.call("prefetch", params, show)
            for start in range(0, max(1, len(entries)), _BATCH):
                part = await connection.call("prefetch", params | {"plan": entries[start : start + _BATCH]}, show)
                total = {key: total.get(key, 0) + value for key, value in part.items()}
        return total
