"""`rafs inspect`: what an image is made of, and what its bytes are spent on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

import click

from builder.census import Census, Share
from builder.image_weights import ImageWeights, weights_of
from rafsfs.format.manifest import FROM
from rafsfs.image import Image, ImageReader
from rafsfs.registry.store import RegistryOptions

from .options import json_option, registry_options, take_registry_options
from .output import lines_of, print_json, print_table, ratio, show_path, size
from .run import run_async
from .wiring import opened_image

_SHOWN: Final = 20
"""Files listed for a person; JSON has them all."""


@click.command("inspect")
@click.argument("ref")
@json_option
@registry_options
def command(ref: str, as_json: bool, **options: Any) -> None:
    """Show manifest, sizes and ratios of the image REF: by codec, dtype, file and origin. Fetches metadata and the headers of weights.

    Example: rafs inspect registry.example/models/llama:v1
    """
    found = run_async(_inspect, ref, take_registry_options(options))
    if as_json:
        print_json(found)
        return
    lines_of(
        {
            "reference": ref,
            "digest": found["digest"],
            "files": found["files"],
            "data": size(found["data_bytes"]),
            "stored": f"{size(found['stored_bytes'])} ({ratio(found['stored_bytes'], found['data_bytes'])} of data)",
            "chunks": f"{found['chunks']}, {found['duplicate_chunks']} of them duplicates",
            "metadata": f"bootstrap {size(found['bootstrap_bytes'])}, chunk map {size(found['chunk_map_bytes'])}",
            "data spaces": len(found["spaces"]),
            **_delta_lines(found),
        }
    )
    _print_shares("codec", found["codecs"])
    _print_shares("dtype", found["dtypes"])
    if set(found["origins"]) - {""}:
        _print_shares("chunks of", {name or "this image": share for name, share in found["origins"].items()})
    files = sorted(found["by_file"], key=lambda file: -file["stored_bytes"])
    print_table(
        [
            (show_path(os.fsencode(file["path"])), size(file["size"]), size(file["stored_bytes"]),
             ratio(file["stored_bytes"], file["size"]))
            for file in files[:_SHOWN]
        ],
        header=("file", "size", "stored", "ratio"),
    )  # fmt: skip
    if len(files) > _SHOWN:
        print(f"... and {len(files) - _SHOWN} smaller ones (--json lists them)")
    print_table([(blob["digest"], size(blob["size"])) for blob in found["blobs"]], header=("blob", "size"))


def _delta_lines(found: dict[str, Any]) -> dict[str, str]:
    delta = found["delta"]
    if not delta["chunks"]:
        return {}
    return {
        "differences": f"{delta['chunks']} chunks, {size(delta['data_bytes'])} stored as {size(delta['stored_bytes'])} "
        f"({ratio(delta['stored_bytes'], delta['data_bytes'])})",
        "bases": f"{size(delta['base_bytes'])} more to fetch for a node that has none of the earlier image",
    }


def _print_shares(title: str, shares: Mapping[str, dict[str, int]]) -> None:
    print_table(
        [
            (name, share["chunks"], size(share["data_bytes"]), size(share["stored_bytes"]),
             ratio(share["stored_bytes"], share["data_bytes"]))
            for name, share in sorted(shares.items())
        ],
        header=(title, "chunks", "data", "stored", "ratio"),
    )  # fmt: skip


async def _inspect(ref: str, options: RegistryOptions) -> dict[str, Any]:
    async with opened_image(ref, options) as (image, store):
        weights = [found async for found in weights_of(image, ImageReader(store, image))]
        return describe(image, weights)


def describe(image: Image, weights: list[ImageWeights]) -> dict[str, Any]:
    """Return the facts of an image as `rafs inspect --json` prints them."""
    chunk_map = image.chunk_map
    census = Census(image)
    used = {blob.digest for blob in chunk_map.blobs}
    return {
        "reference": image.reference,
        "digest": str(image.manifest.digest),
        "files": image.config.files,
        "data_bytes": chunk_map.data_bytes,
        "stored_bytes": round(sum(share.stored_bytes for share in census.by_codec().values())),
        "chunks": chunk_map.chunk_count,
        "duplicate_chunks": census.duplicate_chunks,
        "codecs": {name: _share(share) for name, share in census.by_codec().items()},
        "dtypes": {name: _share(share) for name, share in census.by_dtype(weights).items()},
        "origins": {name: _share(share) for name, share in census.by_origin().items()},
        "delta": {**_share(census.deltas()), "base_bytes": census.base_bytes},
        "by_file": [
            {"path": path, "size": length, **_share(share)} for path, (length, share) in census.by_file().items()
        ],
        "bootstrap_bytes": len(image.bootstrap_bytes),
        "chunk_map_bytes": len(image.chunk_map_bytes),
        "spaces": [{"size": space.size, "chunks": space.count} for space in chunk_map.spaces],
        "blobs": [
            {"digest": str(blob.digest), "size": blob.size, "from": blob.annotations.get(FROM, "")}
            for blob in image.manifest.blobs
            if blob.digest in used
        ],
        "annotations": dict(image.manifest.annotations),
    }


def _share(share: Share) -> dict[str, int]:
    return {
        "chunks": share.chunks,
        "data_bytes": round(share.data_bytes),
        "stored_bytes": round(share.stored_bytes),
    }
