"""`rafs build`: a directory or a file becomes an image."""

from __future__ import annotations

import logging
import os
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import Any

import click

from builder.base_image import BaseImage
from builder.build import BuildOptions, BuildResult, build_image
from builder.cutting import CHUNKINGS
from builder.dictionary import ChunkDictionary
from builder.earlier_image import EarlierImage
from builder.journal import Journal
from builder.reuse import Earlier
from rafsfs.config import state_dir
from rafsfs.errors import FormatError, NotFoundError, UnsupportedError, UsageError
from rafsfs.image import load_image
from rafsfs.interfaces import ImageStore
from rafsfs.registry.reference import Reference
from rafsfs.registry.store import RegistryOptions

from .options import SizeType, json_option, option, registry_options, take_registry_options
from .output import print_json, progress_bar, ratio, size
from .run import run_async
from .wiring import opened, opened_image

_log = logging.getLogger(__name__)


@click.command("build")
@click.argument("source", type=click.Path(exists=True))
@option("-t", "--tag", "ref", required=True, envvar="RAFS_TAG", metavar="REF", help="Where the image goes.")
@option(
    "--chunking",
    envvar="RAFS_CHUNKING",
    type=click.Choice(CHUNKINGS),
    default="auto",
    show_default=True,
    help="How files are cut: along tensors, by content, or at fixed distances; auto looks into each file.",
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
    "--dict",
    "dictionaries",
    envvar="RAFS_DICT",
    multiple=True,
    metavar="REF|auto|none",
    help="Take over chunks of the image REF. Repeatable. auto, the default, also asks what the tag has now and a dictionary of what "
    "was built on this machine; none leaves those out.",
)
@option(
    "--base",
    envvar="RAFS_BASE",
    metavar="REF",
    help="Store tensors that changed as differences to those of the image REF, where that pays.",
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

    Example: rafs build tuned/ -t registry.example/models/llama:tuned --base registry.example/models/llama:v1
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
    result = run_async(
        _build, source, ref, build, registry, options["dictionaries"] or ("auto",), options["base"], not as_json
    )
    if as_json:
        print_json(asdict(result))
    else:
        _print(result, options["base"])


def _print(result: BuildResult, base: str | None) -> None:
    print(
        f"{result.ref}@{result.digest}\n"
        f"{result.files} files, {size(result.input_bytes)} in, {size(result.stored_bytes)} stored "
        f"({ratio(result.stored_bytes, result.input_bytes)}), {size(result.sent_bytes)} sent, {result.seconds:.1f} s"
    )
    for name, taken in sorted(result.reused_from.items()):
        if taken:
            print(f"{size(taken)} taken over from {name}")
    if result.delta_chunks:
        print(
            f"{size(result.delta_bytes)} stored as differences to {base}: {size(result.delta_stored_bytes)} "
            f"instead of {size(result.alone_bytes)}"
        )
    elif base is not None:
        print(
            f"nothing is stored as a difference to {base}: no tensor of it changed, none so little that it pays, "
            "or its blobs cannot be had here"
        )
    if result.base_bytes:  # without --base, too: what is taken over may be differences
        extra = result.base_bytes + result.delta_stored_bytes - result.alone_bytes
        more = f": {size(extra)} more than without --base" if result.delta_chunks and extra > 0 else ""
        print(
            f"a node that has none of the earlier images fetches {size(result.base_bytes)} of their chunks besides{more}"
        )


async def _build(
    source: str,
    ref: str,
    build: BuildOptions,
    registry: RegistryOptions,
    dictionaries: tuple[str, ...],
    base_ref: str | None,
    bar: bool,
) -> BuildResult:
    if {"auto", "none"} <= set(dictionaries):
        raise UsageError("--dict auto and --dict none contradict each other; give one of them")
    named = [name for name in dictionaries if name not in {"auto", "none"}]
    auto = "none" not in dictionaries
    async with opened(ref, registry) as (reference, store), AsyncExitStack() as stack:
        images = [await _earlier(stack, name, registry) for name in named]
        base = None
        if base_ref is not None:
            base = await BaseImage.open(await _earlier(stack, base_ref, registry))
            images.append(base.earlier)
        dictionary = None
        if auto:
            previous = await _previous(reference, store)
            images += [previous] if previous else []
            dictionary = ChunkDictionary.open(os.path.join(state_dir(), "dictionary"))
            if dictionary:
                stack.callback(dictionary.close)
        journal = Journal(state_dir(), store.name)
        with progress_bar("building", enabled=bar) as progress:
            return await build_image(
                source,
                store,
                reference.reference,
                build,
                progress=progress,
                journal=journal,
                earlier=Earlier(tuple(images), dictionary),
                base=base,
                ref_text=ref,
            )


async def _earlier(stack: AsyncExitStack, name: str, registry: RegistryOptions) -> EarlierImage:
    image, store = await stack.enter_async_context(opened_image(name, registry))
    return EarlierImage(f"{store.name}@{image.manifest.digest}", image, store)


async def _previous(reference: Reference, store: ImageStore) -> EarlierImage | None:
    """Return what the tag names now, if that is an image of ours."""
    try:
        image = await load_image(store, reference.reference)
    except NotFoundError:
        return None
    except (FormatError, UnsupportedError) as error:
        _log.debug("what the tag has now is not used: %s", error)
        return None
    return EarlierImage(f"{store.name}@{image.manifest.digest}", image, store)
