"""`rafs pull`: fill the node's cache with an image."""

from __future__ import annotations

from typing import Any

import click

from rafsfs.daemon.launch import connect

from .options import (
    cache_dir_option,
    for_daemon,
    json_option,
    registry_options,
    scheduler_option,
    take_registry_options,
)
from .output import print_json, progress_bar, size
from .run import run_async


@click.command("pull")
@click.argument("ref")
@scheduler_option
@cache_dir_option
@json_option
@registry_options
def command(ref: str, scheduler: str, cache_dir: str, as_json: bool, **options: Any) -> None:
    """Fetch all of the image REF into the node's cache, so that mounts need no registry.

    Example: rafs pull registry.example/models/llama:v1
    """
    params = for_daemon(ref, take_registry_options(options)) | {"scheduler": scheduler}
    result = run_async(_pull, cache_dir, params, not as_json)
    if as_json:
        print_json(result)
    else:
        print(
            f"{ref}@{result['digest']}: {size(result['data_bytes'])} present, {size(result['fetched_bytes'])} fetched, "
            f"{size(result['peer_bytes'])} from other nodes, {size(result['local_bytes'])} copied from other images, "
            f"{result['seconds']:.1f} s"
        )


async def _pull(cache_dir: str, params: dict[str, Any], bar: bool) -> dict[str, Any]:
    async with connect(cache_dir) as connection:
        with progress_bar("pulling", enabled=bar) as progress:
            return await connection.call("pull", params, lambda event: progress(event["done"], event["total"]))
