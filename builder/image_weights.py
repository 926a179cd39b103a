"""The weights inside an image that is in a registry: their headers, read through ranges of its blobs.

Decided here: which files are worth a look (by name, or by size: a look costs a chunk). Concurrency: parsers run in a thread and call back
for their bytes; one file after the other. Memory: one chunk and the header being parsed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

import trio

from rafsfs.image import Image, ImageReader
from rafsfs.weights.tensor import TensorFile

from .weights.detect import WORTH, WeightFinder

_SUFFIXES: Final = (".safetensors", ".gguf", ".onnx", ".onnx_data", ".onnx.data")
_LARGE: Final = 16 << 20
"""Bytes from which a file of any name is looked into."""


@dataclass(frozen=True, slots=True)
class ImageWeights:
    """One file of weights in an image."""

    path: str
    nid: int
    weights: TensorFile


async def weights_of(image: Image, reader: ImageReader) -> AsyncIterator[ImageWeights]:
    """Yield the files of weights of an image in order of path. Raises RemoteError, FormatError, IntegrityError."""
    files = []
    finder = WeightFinder()
    for raw, inode in image.bootstrap.walk():
        path = os.fsdecode(raw)
        if stat.S_ISREG(inode.mode) and inode.size >= WORTH and (path.endswith(_SUFFIXES) or inode.size >= _LARGE):
            files.append((path, inode.nid, inode.size))
    for path, nid, size in files:
        if path.endswith(".onnx"):
            await trio.to_thread.run_sync(finder.add_model, path, _Bytes(reader, nid, size), size)
    for path, nid, size in files:
        found = await trio.to_thread.run_sync(finder.look, path, _Bytes(reader, nid, size), size)
        if found is not None:
            yield ImageWeights(path, nid, found)


class _Bytes:
    """The content of a file as a parser in a thread reads it."""

    def __init__(self, reader: ImageReader, nid: int, size: int) -> None:
        self._reader = reader
        self._nid = nid
        self._size = size

    def __call__(self, offset: int, length: int) -> bytes:
        wanted = max(0, min(length, self._size - offset))
        return trio.from_thread.run(self._reader.read_range, self._nid, offset, wanted)
