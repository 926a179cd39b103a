"""`rafs cache`: what is on this node, and taking it off."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from typing import Any

import click
import trio

from rafsfs.daemon.launch import connect
from rafsfs.errors import DaemonError, IntegrityError, UsageError
from rafsfs.fuse.spec import load_specs
from rafsfs.store.cache import Cache

from .options import cache_dir_option, json_option, option
from .output import existing_parent, print_json, print_table, size
from .run import run_async


@click.group("cache")
def command() -> None:
    """See and manage the node's cache.

    Example: rafs cache ls
    """


async def _call(cache_dir: str, method: str, params: dict[str, Any]) -> dict[str, Any]:
    async with connect(cache_dir) as connection:
        return await connection.call(method, params)


async def _look(cache_dir: str) -> dict[str, Any]:
    """Return what is in the cache: from its daemon, or from the directory if none runs, which is not woken for this."""
    with suppress(DaemonError):
        async with connect(cache_dir, start=False) as connection:
            return await connection.call("cache_list", {})
    return await trio.to_thread.run_sync(_look_at_directory, cache_dir)


def _look_at_directory(cache_dir: str) -> dict[str, Any]:
    path = os.path.abspath(cache_dir)
    if not os.path.isdir(path):
        return {"cache_dir": path, "images": [], "spaces": []}
    cache = Cache.open(path, exclusive=False)
    mounted = {spec.digest for spec in load_specs(path)}  # workers serve on without a daemon
    try:
        return {
            "cache_dir": path,
            "images": [
                {"digest": str(image.digest), "references": image.references(), "mounted": str(image.digest) in mounted}
                for image in cache.images()
            ],
            "spaces": [
                {
                    "id": space.space_id.hex(),
                    "size": space.size,
                    "chunks": space.chunks,
                    "present_chunks": space.present_chunks,
                    "present_bytes": space.present_bytes,
                    "images": space.images,
                    "in_use": not mounted.isdisjoint(space.images),
                }
                for space in cache.spaces()
            ],
        }
    finally:
        cache.close(clean=False)


@command.command("ls")
@cache_dir_option
@json_option
def list_command(cache_dir: str, as_json: bool) -> None:
    """List images and data spaces in the cache.

    Example: rafs cache ls --json
    """
    found = run_async(_look, cache_dir)
    if as_json:
        print_json(found)
        return
    print_table(
        [
            (image["digest"][:19], "mounted" if image["mounted"] else "-", ", ".join(image["references"]))
            for image in found["images"]
        ],
        header=("IMAGE", "STATE", "REFERENCES"),
    )
    print_table(
        [
            (
                space["id"][:16],
                f"{size(space['present_bytes'])} of {size(space['size'])}",
                f"{space['present_chunks']}/{space['chunks']}",
                "in use" if space["in_use"] else "-",
                len(space["images"]),
            )
            for space in found["spaces"]
        ],
        header=("DATA SPACE", "PRESENT", "CHUNKS", "STATE", "IMAGES"),
    )


@command.command("du")
@cache_dir_option
@json_option
def usage_command(cache_dir: str, as_json: bool) -> None:
    """Show how much of the disk the cache takes.

    Example: rafs cache du
    """
    found = run_async(_look, cache_dir)
    free = shutil.disk_usage(existing_parent(cache_dir)).free
    used = _disk_usage(cache_dir)
    facts = {
        "cache_dir": os.path.abspath(cache_dir),
        "disk_bytes": used,
        "present_bytes": sum(space["present_bytes"] for space in found["spaces"]),
        "in_use_bytes": sum(space["present_bytes"] for space in found["spaces"] if space["in_use"]),
        "free_bytes": free,
    }
    if as_json:
        print_json(facts)
    else:
        print(
            f"{facts['cache_dir']}: {size(used)} on disk, {size(facts['present_bytes'])} of data, "
            f"{size(facts['in_use_bytes'])} in use, {size(free)} free"
        )


def _disk_usage(top: str) -> int:
    total = 0
    for directory, _, names in os.walk(top):
        for name in names:
            try:
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
            except OSError:
                continue
    return total


@command.command("verify")
@cache_dir_option
@json_option
def verify_command(cache_dir: str, as_json: bool) -> int:
    """Hash every chunk in the cache. What does not match is dropped and fetched again when it is read.

    Exits with 12 if anything did not match.

    Example: rafs cache verify
    """
    found = run_async(_call, cache_dir, "cache_verify", {})
    if as_json:
        print_json(found)
    else:
        for chunk in found["bad"]:
            print(f"chunk {chunk['chunk']} of data space {chunk['space']} did not match its digest and was dropped")
        print(f"{found['checked']} chunks checked, {len(found['bad'])} bad")
    return IntegrityError.exit_code if found["bad"] else 0


@command.command("rm")
@click.argument("image", required=False)
@option("--unused", is_flag=True, envvar="RAFS_UNUSED", help="Remove everything that is not mounted.")
@cache_dir_option
@json_option
def remove_command(image: str | None, unused: bool, cache_dir: str, as_json: bool) -> None:
    """Remove IMAGE, a reference or digest, and the data that no other image needs. What is mounted stays.

    Example: rafs cache rm registry.example/models/llama:v1
    """
    if (image is None) == (not unused):
        raise UsageError("give an image or --unused")
    found = run_async(_call, cache_dir, "cache_remove", {"image": image} if image else {})
    if as_json:
        print_json(found)
    else:
        print(
            f"{len(found['images'])} images and {found['spaces']} data spaces removed, {size(found['freed_bytes'])} freed"
        )
