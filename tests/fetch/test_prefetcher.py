"""Whole tensors ahead of a reader: over a real cache and an image of weights in an OCI layout."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from builder.build import BuildOptions, build_image
from rafsfs.errors import FormatError
from rafsfs.fetch.fetcher import Fetcher, open_fetcher
from rafsfs.fetch.layout import ImageLayout, image_layout
from rafsfs.fetch.source import FetchSettings
from rafsfs.image import Image, load_image
from rafsfs.registry.oci_layout import OciLayout
from rafsfs.store.cache import Cache
from rafsfs.store.data_space import DataSpace
from rafsfs.weights.gguf import parse_gguf
from rafsfs.weights.safetensors import parse_safetensors
from rafsfs.weights.tensor import Tensor
from tests.support.weights import Array, save_gguf, save_safetensors

MIB = 1 << 20
SIZES = (3 * MIB, 5 * MIB, 64 << 10, 4 * MIB, 2 * MIB, 3 * MIB)


def save_with_long_gguf_header(path: Path, arrays: Mapping[str, Array]) -> None:
    save_gguf(path, arrays, words=[f"word {n:060d}" for n in range(30_000)])


class Node:
    """A node that has opened an image of one file of weights."""

    def __init__(self, fetcher: Fetcher, image: Image, space: DataSpace, file: Path) -> None:
        self.fetcher = fetcher
        self.space = space
        self.tensors = tensors_of(file)
        nid = image.bootstrap.resolve(file.name.encode())
        assert nid is not None
        (extent,) = image.bootstrap.extents(nid)
        self.start = extent.offset

    async def read(self, offset: int, length: int = 4096) -> None:
        await self.fetcher.ensure(self.space.space_id, self.space.table.covering(self.start + offset, length))
        with trio.fail_after(20):
            # A hop to a thread counts as blocked, so `wait_all_tasks_blocked` would be too early.
            while self.fetcher.prefetcher.is_learning or any(self.fetcher.depths().values()):
                await trio.sleep(0.005)

    def present(self, tensor: Tensor) -> bool:
        return not self.space.missing(self.space.table.covering(self.start + tensor.offset, tensor.length))

    def absent_bytes(self, tensor: Tensor) -> int:
        missing = self.space.missing(self.space.table.covering(self.start + tensor.offset, tensor.length))
        return sum(self.space.table.extent(index)[1] for index in missing)


def tensors_of(file: Path) -> tuple[Tensor, ...]:
    data = file.read_bytes()
    parse = parse_gguf if file.suffix == ".gguf" else parse_safetensors
    try:
        return parse(lambda offset, length: data[offset : offset + length], len(data)).tensors
    except FormatError:
        return ()


@pytest.fixture(
    params=[("model.safetensors", save_safetensors), ("model.gguf", save_with_long_gguf_header)],
    ids=["safetensors", "gguf with a header of three chunks"],
)
async def node(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Node]:
    name, save = request.param
    source = tmp_path / "source"
    source.mkdir()
    rng = random.Random(5)
    save(source / name, {f"t{n}": Array("F16", (size // 2,), rng.randbytes(size)) for n, size in enumerate(SIZES)})
    async with opened(source / name, tmp_path) as found:
        yield found


@asynccontextmanager
async def opened(file: Path, tmp_path: Path) -> AsyncIterator[Node]:
    store = OciLayout(str(tmp_path / "layout"))
    await build_image(str(file.parent), store, "v1", BuildOptions())
    image = await load_image(store, "v1")
    cache = Cache.open(str(tmp_path / "cache"))
    try:
        async with open_fetcher(cache, FetchSettings()) as fetcher:
            fetcher.add_source(image.chunk_map, store, "test")
            layout: ImageLayout = image_layout(image.bootstrap)
            fetcher.prefetcher.add_layout(layout)
            yield Node(fetcher, image, cache.open_space(image.chunk_map.table(0)), file)
    finally:
        cache.close()


async def read_header(node: Node) -> None:
    for offset in range(0, node.tensors[0].offset, MIB):
        await node.read(offset)


async def test_who_touches_a_tensor_gets_that_tensor_and_nothing_of_the_next(node: Node) -> None:
    await read_header(node)
    touched, following = node.tensors[3], node.tensors[4]
    before = node.fetcher.prefetcher.figures()["ahead_bytes"]
    await node.read(touched.offset)
    assert node.present(touched)
    assert node.absent_bytes(following) == following.length
    figures = node.fetcher.prefetcher.figures()
    assert figures["ahead_bytes"] - before == touched.length - MIB
    assert figures["ahead_unread_bytes"] >= touched.length - MIB


async def test_what_is_read_later_is_no_waste(node: Node) -> None:
    await read_header(node)
    tensor = node.tensors[1]
    await node.read(tensor.offset)
    await node.read(tensor.offset, tensor.length)
    for other in node.tensors:
        await node.read(other.offset, other.length)
    figures = node.fetcher.prefetcher.figures()
    assert figures["ahead_unread_bytes"] == 0
    assert figures["ahead_read_bytes"] == figures["ahead_bytes"] >= tensor.length - MIB


async def test_before_the_header_has_come_a_reader_gets_what_he_touches(node: Node) -> None:
    tensor = node.tensors[1]
    await node.read(tensor.offset + MIB)
    assert node.absent_bytes(tensor) == tensor.length - MIB


@pytest.mark.logs_warnings
async def test_a_file_that_is_no_weights_is_looked_into_once_and_read_as_an_ordinary_one(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.bin").write_bytes(b"\x20\0\0\0\0\0\0\0{" + random.Random(2).randbytes(8 * MIB))
    async with opened(source / "model.bin", tmp_path) as node:
        await node.read(0)
        await node.read(4 * MIB)
        assert len(node.space.missing(range(node.space.table.count))) == node.space.table.count - 2
