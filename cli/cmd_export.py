"""`rafs export`: an image becomes an ordinary directory again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import click

from rafsfs.image import ImageReader
from rafsfs.registry.store import RegistryOptions

from .exporting import Exporter, StoreContent, prepare_directory, say_left_out
from .options import registry_options, take_registry_options
from .output import progress_bar
from .run import run_async
from .wiring import opened_image


@click.command("export")
@click.argument("ref")
@click.argument("directory", type=click.Path(file_okay=False))
@registry_options
def command(ref: str, directory: str, **options: Any) -> None:
    """Write the image REF out to DIRECTORY, which must be empty or not exist.

    Owners, devices and trusted xattrs need root and are left out without it, and said so on standard error.

    Example: rafs export registry.example/models/llama:v1 ./llama
    """
    say_left_out(run_async(_export, ref, directory, take_registry_options(options)))


async def _export(ref: str, directory: str, options: RegistryOptions) -> Counter[str]:
    async with opened_image(ref, options) as (image, store):
        prepare_directory(directory)
        with progress_bar("exporting") as progress:
            content = StoreContent(image.bootstrap, ImageReader(store, image))
            exporter = Exporter(image.bootstrap, content, image.chunk_map.data_bytes, progress)
            await exporter.run(directory)
        return exporter.left_out
