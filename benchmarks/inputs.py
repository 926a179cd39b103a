"""What benchmarks run on: real weights, extended by casts of the same weights; and images of a size nobody downloads.

The real input is all-MiniLM-L6-v2 as published (float32) with its bf16 and fp16 casts, 182 MB. To reach some hundreds
of MB, the same weights are multiplied by a factor near one and cast again: distinct bytes with the statistics of real
weights, and called so. The large image has the metadata of its size and one stored MiB that all its chunks share.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

from rafsfs.format.bootstrap_writer import Node, SpaceSpec, write_bootstrap
from rafsfs.format.chunk_index import Extent
from rafsfs.format.chunk_map_builder import ChunkMapBuilder
from rafsfs.format.codec import CODEC_RAW, chunk_digest
from rafsfs.types import Digest
from tests.support.models import cast_file, make_model, published_model

_SCALED: Final = (("F32", 1.1), ("BF16", 1.1), ("BF16", 0.9))
_MORE: Final = tuple((dtype, 1.2 + step / 10) for step in range(3) for dtype in ("F32", "BF16", "F16", "BF16", "F32"))
MIB: Final = 1 << 20
GIB: Final = 1 << 30
SPACE_BOUND: Final = 4 * GIB


def make_weights(target: Path, *, quick: bool) -> Path:
    """Make the directory of weights: 182 MB when `quick`, else 363 MB."""
    make_model(target)
    if not quick:
        for dtype, scale in _SCALED:
            name = f"model-x{scale:g}.{dtype.lower()}.safetensors"
            cast_file(published_model() / "model.safetensors", target / name, dtype, scale=scale)
    return target


def make_many_weights(target: Path, *, quick: bool) -> Path:
    """Make a directory of 1.3 GB of weights (182 MB when `quick`): enough that the start of a process does not count."""
    make_weights(target, quick=quick)
    for number, (dtype, scale) in enumerate(() if quick else _MORE):
        name = f"model-{number}.{dtype.lower()}.safetensors"
        cast_file(published_model() / "model.safetensors", target / name, dtype, scale=scale + number / 1000)
    return target


def large_image(size: int, chunk_size: int) -> tuple[bytes, bytes, bytes]:
    """Return (bootstrap, chunk map, blob) of an image with files of 10 GiB each, `size` bytes together.

    Two incompressible chunks are stored. Every chunk is the first of them, but for one chunk per data space, at another
    place in each, so that no two spaces are the same: all metadata is of full size, the data is two chunks.
    """
    content = random.Random(1).randbytes(2 * chunk_size)
    digests = [chunk_digest(content[:chunk_size]), chunk_digest(content[chunk_size:])]
    builder = ChunkMapBuilder()
    blob = builder.add_blob(Digest.of(content), len(content))
    for first in range(0, size, SPACE_BOUND):
        length = min(SPACE_BOUND, size - first)
        space = builder.add_space(length)
        for number, offset in enumerate(range(0, length, chunk_size)):
            which = int(number == space)
            at = which * chunk_size
            builder.add_chunk(space, offset, chunk_size, digests[which], blob, at, chunk_size, CODEC_RAW, 0)
    spaces = [
        SpaceSpec(builder.space_id(space), min(SPACE_BOUND, size - space * SPACE_BOUND))
        for space in range((size + SPACE_BOUND - 1) // SPACE_BOUND)
    ]
    root = Node(mode=0o040755)
    for number, start in enumerate(range(0, size, 10 * GIB)):
        stop = min(size, start + 10 * GIB)
        extents = []
        at = start
        while at < stop:
            length = min(stop - at, SPACE_BOUND - at % SPACE_BOUND)
            extents.append(Extent(at - start, length, at // SPACE_BOUND, at % SPACE_BOUND))
            at += length
        root.children[b"model-%05d.safetensors" % number] = Node(mode=0o100644, size=stop - start, extents=extents)
    return write_bootstrap(root, spaces), builder.to_bytes(), content
