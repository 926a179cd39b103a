"""`rafs diff`: what changed between two images."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict
from typing import Any, Final

import click

from builder.compare import Comparison, TensorChange, compare_images
from builder.image_weights import ImageWeights, weights_of
from rafsfs.image import Image, ImageReader
from rafsfs.registry.store import RegistryOptions

from .options import json_option, option, registry_options, take_registry_options
from .output import lines_of, print_json, print_table, show_path, size
from .run import run_async
from .wiring import opened_image

_SHOWN: Final = 40


@click.command("diff")
@click.argument("ref1")
@click.argument("ref2")
@option("--all", "show_all", is_flag=True, envvar="RAFS_ALL", help="List every change, not the first 40 of a kind.")
@json_option
@registry_options
def command(ref1: str, ref2: str, show_all: bool, as_json: bool, **options: Any) -> None:
    """Show which files and tensors differ between the images REF1 and REF2, and what a node with REF1 fetches for REF2.

    Contents are compared by digest; only headers of weights and small tensors are read. `recut` marks what is cut at other places in the
    two, so that its digests cannot tell whether it changed.

    Example: rafs diff registry.example/models/llama:v1 registry.example/models/llama:v2
    """
    found = run_async(_diff, ref1, ref2, take_registry_options(options))
    if as_json:
        print_json(_facts(ref1, ref2, found))
        return
    _print(found, None if show_all else _SHOWN)


async def _diff(ref1: str, ref2: str, options: RegistryOptions) -> Comparison:
    async with opened_image(ref1, options) as (first, store1), opened_image(ref2, options) as (second, store2):
        readers = ImageReader(store1, first), ImageReader(store2, second)
        sides = [
            (image, reader, await _weights(image, reader))
            for image, reader in zip((first, second), readers, strict=True)
        ]
        return await compare_images(*sides)


async def _weights(image: Image, reader: ImageReader) -> list[ImageWeights]:
    return [found async for found in weights_of(image, reader)]


def _facts(ref1: str, ref2: str, found: Comparison) -> dict[str, Any]:
    return {
        "first": ref1,
        "second": ref2,
        "files": [asdict(change) for change in found.files],
        "equal_files": found.equal_files,
        "tensors": [asdict(change) for change in found.tensors],
        "equal_tensors": found.equal_tensors,
        "equal_tensor_bytes": found.equal_tensor_bytes,
        "fetch": asdict(found.fetch),
    }


def _print(found: Comparison, most: int | None) -> None:
    if found.files:
        print_table(
            [
                (change.kind, show_path(os.fsencode(change.path)) or ".", size(change.size))
                for change in found.files[:most]
            ],
            header=("file", "path", "size"),
        )
        _rest(len(found.files), most)
    if found.tensors:
        print_table(
            [
                (change.kind, change.name, change.dtype, "x".join(map(str, change.shape)), size(change.size))
                for change in found.tensors[:most]
            ],
            header=("tensor", "name", "dtype", "shape", "size"),
        )
        _rest(len(found.tensors), most)
    fetch = found.fetch
    lines_of(
        {
            "files": f"{found.equal_files} equal, {_counts([change.kind for change in found.files])}",
            "tensors": _tensor_line(found.tensors, found.equal_tensors, found.equal_tensor_bytes),
            "to fetch": f"{size(fetch.stored_bytes)} for {size(fetch.data_bytes)} of content in {fetch.chunks} chunks, "
            f"and {size(fetch.metadata_bytes)} of metadata",
        }
    )


def _rest(count: int, most: int | None) -> None:
    if most is not None and count > most:
        print(f"... and {count - most} more (--all lists them)")


def _tensor_line(changes: list[TensorChange], equal: int, equal_bytes: int) -> str:
    changed = sum(change.size for change in changes if change.kind != "removed")
    return f"{equal} equal ({size(equal_bytes)}), {_counts([change.kind for change in changes])} ({size(changed)})"


def _counts(kinds: list[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(kinds).items())) or "none changed"
