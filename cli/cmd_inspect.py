"""`rafs inspect`: what an image is made of."""

from __future__ import annotations

from typing import Any

import click
import numpy as np

from rafsfs.format.chunk_map import STORAGE_SIZE, ChunkMap
from rafsfs.format.codec import codec_name
from rafsfs.image import Image
from rafsfs.registry.store import RegistryOptions

from .options import json_option, registry_options, take_registry_options
from .output import lines_of, print_json, print_table, ratio, size
from .run import run_async
from .wiring import opened_image


@click.command("inspect")
@click.argument("ref")
@json_option
@registry_options
def command(ref: str, as_json: bool, **options: Any) -> None:
    """Show manifest, sizes, ratio and codecs of the image REF. Fetches metadata only.

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
        }
    )
    rows = [
        (name, codec["chunks"], size(codec["data_bytes"]), size(codec["stored_bytes"]),
         ratio(codec["stored_bytes"], codec["data_bytes"]))
        for name, codec in sorted(found["codecs"].items())
    ]  # fmt: skip
    print_table(rows, header=("codec", "chunks", "data", "stored", "ratio"))
    print_table([(blob["digest"], size(blob["size"])) for blob in found["blobs"]], header=("blob", "size"))


async def _inspect(ref: str, options: RegistryOptions) -> dict[str, Any]:
    async with opened_image(ref, options) as (image, _):
        return describe(image)


def describe(image: Image) -> dict[str, Any]:
    """Return the facts of an image as `rafs inspect --json` prints them."""
    chunk_map = image.chunk_map
    codecs, duplicates = _by_codec(chunk_map)
    return {
        "reference": image.reference,
        "digest": str(image.manifest.digest),
        "files": image.config.files,
        "data_bytes": chunk_map.data_bytes,
        "stored_bytes": sum(blob.size for blob in image.manifest.blobs),
        "chunks": chunk_map.chunk_count,
        "duplicate_chunks": duplicates,
        "codecs": codecs,
        "bootstrap_bytes": len(image.bootstrap_bytes),
        "chunk_map_bytes": len(image.chunk_map_bytes),
        "spaces": [{"size": space.size, "chunks": space.count} for space in chunk_map.spaces],
        "blobs": [{"digest": str(blob.digest), "size": blob.size} for blob in image.manifest.blobs],
        "annotations": dict(image.manifest.annotations),
    }


def _by_codec(chunk_map: ChunkMap) -> tuple[dict[str, dict[str, int]], int]:
    """Return figures per codec, each stored chunk counted once in stored bytes, and how many chunks share stored bytes."""
    if not chunk_map.chunk_count:
        return {}, 0
    storage = np.frombuffer(
        chunk_map.buffer[-STORAGE_SIZE * chunk_map.chunk_count :],
        dtype=[("offset", "<u8"), ("size", "<u4"), ("blob", "<u2"), ("codec", "u1"), ("param", "u1")],
    )
    lengths = np.concatenate(
        [np.frombuffer(chunk_map.table(space.index).buffer, dtype="<u4")[10::12] for space in chunk_map.spaces]
    )
    places = np.stack([storage["blob"].astype(np.uint64), storage["offset"]], axis=1)
    _, first = np.unique(places, axis=0, return_index=True)
    stored_once = np.zeros(len(storage), dtype=bool)
    stored_once[first] = True
    found = {}
    for number in np.unique(storage["codec"]):
        mine = storage["codec"] == number
        found[codec_name(int(number))] = {
            "chunks": int(mine.sum()),
            "data_bytes": int(lengths[mine].sum(dtype=np.uint64)),
            "stored_bytes": int(storage["size"][mine & stored_once].sum(dtype=np.uint64)),
        }
    return found, int(len(storage) - len(first))
