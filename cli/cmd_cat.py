"""`rafs cat`: one file of an image to standard output, every chunk verified."""

from __future__ import annotations

import os
import stat
import sys
from typing import Any

import click

from rafsfs.errors import NotFoundError, UsageError
from rafsfs.image import ImageReader
from rafsfs.registry.store import RegistryOptions

from .options import registry_options, take_registry_options
from .output import show_path
from .run import run_async
from .wiring import opened_image


@click.command("cat")
@click.argument("ref")
@click.argument("path")
@registry_options
def command(ref: str, path: str, **options: Any) -> None:
    """Print the file PATH of the image REF. Symlinks are not followed.

    Example: rafs cat registry.example/models/llama:v1 config.json
    """
    run_async(_cat, ref, os.fsencode(path), take_registry_options(options))


async def _cat(ref: str, path: bytes, options: RegistryOptions) -> None:
    async with opened_image(ref, options) as (image, store):
        nid = image.bootstrap.resolve(path)
        if nid is None:
            raise NotFoundError(f"{ref} has no {show_path(path)}; see `rafs ls -R {ref}`")
        if not stat.S_ISREG(image.bootstrap.inode(nid).mode):
            raise UsageError(f"{show_path(path)} of {ref} is not a regular file")
        async for part in ImageReader(store, image).read_file(nid):
            sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()
