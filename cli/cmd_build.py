"""`rafs build`: a directory or a file becomes an image."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from builder.build import BuildOptions, BuildResult, build_image
from builder.journal import Journal
from rafsfs.config import state_dir
from rafsfs.registry.store import RegistryOptions

from .options import SizeType, json_option, option, registry_options, take_registry_options
from .output import print_json, progress_bar, ratio, size
from .run import run_async
from .wiring import opened


@click.command("build")
@click.argument("source", type=click.Path(exists=True))
@option("-t", "--tag", "ref", required=True, envvar="RAFS_TAG", metavar="REF", help="Where the image goes.")
@option(
    "--chunking",
    envvar="RAFS_CHUNKING",
    type=click.Choice(["fixed"]),
    default="fixed",
    show_default=True,
    help="How files are cut.",
)
@option(
    "--chunk-size",
    envvar="RAFS_CHUNK_SIZE",
    type=SizeType(),
    default="1MiB",
    show_default=True,
    help="Largest chunk, a power of two from 64KiB to 16MiB.",
)
@option(
    "--codec",
    envvar="RAFS_CODEC",
    type=click.Choice(["auto", "raw", "zstd"]),
    default="auto",
    show_default=True,
    help="How chunks are stored; auto picks per chunk.",
)
@option(
    "--space-size",
    envvar="RAFS_SPACE_SIZE",
    type=SizeType(),
    default="4GiB",
    show_default=True,
    help="Bound of a data space, and so of a layer, a power of two.",
)
@option(
    "--exclude",
    envvar="RAFS_EXCLUDE",
    multiple=True,
    metavar="GLOB",
    help="Leave out what matches: a name, or a path if it holds a slash; ** crosses directories. Repeatable.",
)
@option(
    "--threads", envvar="RAFS_THREADS", type=click.IntRange(1, 256), help="Worker threads.  [default: one per core]"
)
@json_option
@registry_options
def command(source: str, ref: str, as_json: bool, **options: Any) -> None:
    """Build SOURCE, a directory or a single file, into an image and push it to REF.

    The same input gives the same digests. An interrupted push continues where it stopped when run again.

    Example: rafs build model/ -t registry.example/models/llama:v1 --exclude '*.tmp'
    """
    registry = take_registry_options(options)
    build = BuildOptions(
        chunking=options["chunking"],
        chunk_size=options["chunk_size"],
        codec=options["codec"],
        exclude=tuple(options["exclude"]),
        space_bound=options["space_size"],
        threads=options["threads"],
    )
    result = run_async(_build, source, ref, build, registry, not as_json)
    if as_json:
        print_json(asdict(result))
    else:
        print(
            f"{result.ref}@{result.digest}\n"
            f"{result.files} files, {size(result.input_bytes)} in, {size(result.stored_bytes)} stored "
            f"({ratio(result.stored_bytes, result.input_bytes)}), {size(result.sent_bytes)} sent, {result.seconds:.1f} s"
        )


async def _build(source: str, ref: str, build: BuildOptions, registry: RegistryOptions, bar: bool) -> BuildResult:
    async with opened(ref, registry) as (reference, store):
        journal = Journal(state_dir(), store.name)
        with progress_bar("building", enabled=bar) as progress:
            return await build_image(
                source, store, reference.reference, build, progress=progress, journal=journal, ref_text=ref
            )
