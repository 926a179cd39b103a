"""`rafs ls`: files of an image, without a mount."""

from __future__ import annotations

import os
import stat
import time
from typing import Any

import click

from rafsfs.errors import NotFoundError
from rafsfs.format.bootstrap import Bootstrap
from rafsfs.format.inode import Inode
from rafsfs.registry.store import RegistryOptions

from .options import json_option, option, registry_options, take_registry_options
from .output import print_json, print_table, show_path
from .run import run_async
from .wiring import opened_image


@click.command("ls")
@click.argument("ref")
@click.argument("path", default="")
@option("-l", "--long", "long_format", is_flag=True, envvar="RAFS_LONG", help="Modes, owners, sizes, times.")
@option("-R", "--recursive", is_flag=True, envvar="RAFS_RECURSIVE", help="All that is below PATH.")
@json_option
@registry_options
def command(ref: str, path: str, long_format: bool, recursive: bool, as_json: bool, **options: Any) -> None:
    """List PATH in the image REF. Fetches metadata only.

    Example: rafs ls -lR registry.example/models/llama:v1
    """
    entries = run_async(_list, ref, os.fsencode(path), recursive, take_registry_options(options))
    if as_json:
        print_json(entries)
    elif long_format:
        print_table(
            [
                (
                    e["mode"],
                    e["nlink"],
                    e["uid"],
                    e["gid"],
                    e["size"],
                    e["mtime"],
                    e["path"] + (f" -> {e['target']}" if e["target"] else ""),
                )
                for e in entries
            ]
        )
    else:
        for entry in entries:
            print(entry["path"])


async def _list(ref: str, path: bytes, recursive: bool, options: RegistryOptions) -> list[dict[str, Any]]:
    async with opened_image(ref, options) as (image, _):
        bootstrap = image.bootstrap
        nid = bootstrap.resolve(path)
        if nid is None:
            raise NotFoundError(f"{ref} has no {show_path(path)}; see `rafs ls {ref}`")
        if not stat.S_ISDIR(bootstrap.inode(nid).mode):
            return [_entry(bootstrap, path, bootstrap.inode(nid))]
        if recursive:
            return [_entry(bootstrap, name, inode) for name, inode in bootstrap.walk(nid) if name]
        entries = (entry for entry in bootstrap.entries(nid) if entry.name not in {b".", b".."})
        return [_entry(bootstrap, entry.name, bootstrap.inode(entry.nid)) for entry in entries]


def _entry(bootstrap: Bootstrap, path: bytes, inode: Inode) -> dict[str, Any]:
    target = bootstrap.readlink(inode.nid) if stat.S_ISLNK(inode.mode) else b""
    shown = show_path(path)
    return {
        "path": shown,
        **({} if shown.encode() == path else {"path_hex": path.hex()}),
        "mode": stat.filemode(inode.mode),
        "nlink": inode.nlink,
        "uid": inode.uid,
        "gid": inode.gid,
        "size": inode.size,
        "mtime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(inode.mtime_ns // 1_000_000_000)),
        "target": show_path(target),
    }
