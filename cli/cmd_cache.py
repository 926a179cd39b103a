"""`rafs cache`: what is on this node, keeping it there, and taking it off."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from typing import Any

import click
import trio

from rafsfs.daemon.launch import connect
from rafsfs.errors import DaemonError, IntegrityError, UsageError
from rafsfs.files.record import list_files
from rafsfs.fuse.spec import load_specs
from rafsfs.store.cache import Cache
from rafsfs.store.listing import list_cache

from .options import SizeType, cache_dir_option, json_option, option
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
        return {"cache_dir": path, "quota_bytes": None, "images": [], "spaces": [], "files": []}
    cache = Cache.open(path, exclusive=False)
    mounted = {spec.digest for spec in load_specs(path)}  # workers serve on without a daemon
    try:
        return list_cache(cache, mounted, set(), None) | {"files": list_files(path)}
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
            (
                image["digest"][:19],
                _state("mounted" if image["mounted"] else "", image["pinned"]),
                ", ".join(image["references"]),
            )
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
                _state("in use" if space["in_use"] else "", space["pinned"]),
                _ago(space["last_used"]),
                len(space["images"]),
            )
            for space in found["spaces"]
        ],
        header=("DATA SPACE", "PRESENT", "CHUNKS", "STATE", "LAST USED", "IMAGES"),
    )
    if found["files"]:
        print_table(
            [
                (file["key"][:16], size(file["length"]), "yes" if file["shared"] else "-", file["url"])
                for file in found["files"]
            ],
            header=("FILE", "LENGTH", "SHARED", "URL"),
        )


def _state(used: str, pinned: bool) -> str:
    return ", ".join(filter(None, (used, "pinned" if pinned else ""))) or "-"


def _ago(seconds: float) -> str:
    """Return how long ago a time was, in one unit: the hours matter, not the seconds."""
    past = max(0, int(time.time() - seconds))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if past >= length:
            return f"{past // length} {unit} ago"
    return f"{past} s ago"


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
        "pinned_bytes": sum(space["present_bytes"] for space in found["spaces"] if space["pinned"]),
        "quota_bytes": found["quota_bytes"],
        "free_bytes": free,
    }
    if as_json:
        print_json(facts)
    else:
        print(
            f"{facts['cache_dir']}: {size(used)} on disk, {size(facts['present_bytes'])} of data, "
            f"{size(facts['in_use_bytes'])} in use, {size(facts['pinned_bytes'])} pinned, "
            + (f"quota {size(facts['quota_bytes'])}, " if facts["quota_bytes"] else "")
            + f"{size(free)} free"
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


@command.command("gc")
@option(
    "--to",
    "target",
    envvar="RAFS_TO",
    type=SizeType(),
    metavar="SIZE",
    help="Go down to this much data.  [default: 85% of the quota]",
)
@option("--dry-run", is_flag=True, envvar="RAFS_DRY_RUN", help="Only show what would go.")
@cache_dir_option
@json_option
def collect_command(target: int | None, dry_run: bool, cache_dir: str, as_json: bool) -> None:
    """Evict data, the least recently used first; what is in use or pinned stays. Without a quota and without --to, remove only what
    belongs to no image any more.

    Example: rafs cache gc --to 200GiB --dry-run
    """
    found = run_async(_call, cache_dir, "cache_collect", {"target_bytes": target, "dry_run": dry_run})
    if as_json:
        print_json(found)
        return
    print_table(
        [(space["id"][:16], size(space["bytes"]), _ago(space["last_used"])) for space in found["evicted"]],
        header=("DATA SPACE", "FREED", "LAST USED") if found["evicted"] else None,
    )
    print(f"{size(found['freed_bytes'])} {'would be ' if dry_run else ''}freed, {size(found['held_bytes'])} held now")


@command.command("pin")
@click.argument("image")
@cache_dir_option
@json_option
def pin_command(image: str, cache_dir: str, as_json: bool) -> None:
    """Keep the data of IMAGE, a reference or digest, from eviction and removal. What has not been fetched yet is not fetched by this: see
    `rafs pull`.

    Example: rafs cache pin registry.example/models/llama:v1
    """
    _pin(image, cache_dir, as_json, pinned=True)


@command.command("unpin")
@click.argument("image")
@cache_dir_option
@json_option
def unpin_command(image: str, cache_dir: str, as_json: bool) -> None:
    """Let the data of IMAGE be evicted again.

    Example: rafs cache unpin registry.example/models/llama:v1
    """
    _pin(image, cache_dir, as_json, pinned=False)


def _pin(image: str, cache_dir: str, as_json: bool, *, pinned: bool) -> None:
    found = run_async(_call, cache_dir, "cache_pin", {"image": image, "pinned": pinned})
    if as_json:
        print_json(found)
    else:
        print(f"{', '.join(found['images'])} {'pinned' if pinned else 'unpinned'}")
