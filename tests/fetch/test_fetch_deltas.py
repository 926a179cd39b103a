"""Chunks stored as differences: their bases are fetched first, by whoever needs them, and never believed unseen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from builder.base_image import BaseImage
from builder.build import BuildOptions, build_image
from builder.earlier_image import EarlierImage
from rafsfs.errors import DeadlineError, IntegrityError, UnavailableError
from rafsfs.fetch.fetcher import Fetcher, open_fetcher
from rafsfs.fetch.queue import Priority
from rafsfs.fetch.source import FetchSettings, Source
from rafsfs.format.chunk_map import StoredChunk
from rafsfs.image import Image, load_image
from rafsfs.registry.oci_layout import OciLayout
from rafsfs.store.cache import Cache
from rafsfs.store.data_space import DataSpace
from tests.support.series import moved, save, small_model

from .test_fetcher import Store

CHUNK = 64 << 10
VERSIONS = 3


@pytest.fixture
async def layout(tmp_path: Path) -> str:
    """v0, v1 and v2 of a model, each stored as differences to the one before."""
    where = str(tmp_path / "layout")
    arrays = small_model(1)
    for number in range(VERSIONS):
        source = save(tmp_path / f"source-{number}", arrays)
        base = None
        if number:
            store = OciLayout(where)
            base = await BaseImage.open(EarlierImage("base", await load_image(store, f"v{number - 1}"), store))
        built = await build_image(
            str(source), OciLayout(where), f"v{number}", BuildOptions(chunk_size=CHUNK), base=base
        )
        assert bool(built.delta_chunks) == bool(number)
        arrays = moved(arrays, number)
    return where


class Node:
    """A cache, a fetcher, and one version to be fetched."""

    def __init__(self, cache: Cache, fetcher: Fetcher, image: Image, store: Store) -> None:
        self.cache = cache
        self.fetcher = fetcher
        self.image = image
        self.store = store
        self.source: Source = fetcher.add_source(image.chunk_map, store, "test")

    def space(self, number: int) -> DataSpace:
        found = self.cache.opened_space(self.image.chunk_map.table(number).space_id)
        assert found is not None
        return found

    async def ensure(self, *chunks: int, **more: object) -> None:
        await self.fetcher.ensure(self.space(0).space_id, chunks, **more)  # type: ignore[arg-type]

    def delta(self) -> tuple[int, StoredChunk]:
        """The first chunk of the image that is a difference."""
        table = self.image.chunk_map
        for index in range(table.spaces[0].count):
            stored = table.stored(0, index)
            if stored.base is not None:
                return index, stored
        raise AssertionError("no chunk is a difference")

    def base(self, stored: StoredChunk) -> tuple[DataSpace, int, StoredChunk]:
        assert stored.base is not None
        return self.space(stored.base[0]), stored.base[1], self.image.chunk_map.stored(*stored.base)


@asynccontextmanager
async def node_of(layout: str, path: Path, tag: str = "v1", deadline_s: float = 20) -> AsyncIterator[Node]:
    cache = Cache.open(str(path))
    try:
        store = Store(layout)
        async with open_fetcher(cache, FetchSettings(readahead_bytes=0, deadline_s=deadline_s)) as fetcher:
            yield Node(cache, fetcher, await load_image(store, tag), store)
    finally:
        cache.close()


@pytest.fixture
async def node(layout: str, tmp_path: Path) -> AsyncIterator[Node]:
    async with node_of(layout, tmp_path / "cache") as found:
        yield found


async def test_a_chunk_brings_its_base_and_no_other(node: Node) -> None:
    index, stored = node.delta()
    counted: Counter[str] = Counter()
    await node.ensure(index, on_behalf=counted)
    space, number, _ = node.base(stored)
    assert node.space(0).verify(index)
    assert space.verify(number)
    assert space.missing(range(space.table.count)) == [n for n in range(space.table.count) if n != number]
    assert len(node.store.reads) == 2
    assert counted["origin"] == 2 * stored.length, "the base is on the bill of who needed it"


async def test_a_chain_comes_from_its_end(layout: str, tmp_path: Path) -> None:
    async with node_of(layout, tmp_path / "cache", "v2") as node:
        index, stored = node.delta()
        await node.ensure(index)
        assert node.space(0).verify(index)
        space, number, below = node.base(stored)
        assert space.verify(number)
        far, last, _ = node.base(below)
        assert far.verify(last)
        assert len(node.store.reads) == 3


async def test_a_base_that_is_here_is_not_fetched(layout: str, tmp_path: Path) -> None:
    async with node_of(layout, tmp_path / "cache", "v0") as first:
        await first.fetcher.prefetch_all(first.source)
    async with node_of(layout, tmp_path / "cache") as node:
        await node.fetcher.prefetch_all(node.source)
        assert node.space(0).complete
        bases = {node.base(stored)[2].blob for _, stored in [node.delta()]}
        read = sum(length for _, length in node.store.reads)
        own = sum(blob.size for number, blob in enumerate(node.image.chunk_map.blobs) if number not in bases)
        assert read <= own, "not a byte of the base's blob"


async def test_a_whole_image_with_no_base_here_comes_whole(layout: str, tmp_path: Path) -> None:
    async with node_of(layout, tmp_path / "cache", "v2") as node:
        with trio.fail_after(20):
            await node.fetcher.prefetch_all(node.source)
        assert node.space(0).complete
        assert all(node.space(0).verify(index) for index in range(node.space(0).table.count))


async def test_many_readers_share_one_base(node: Node) -> None:
    index, _ = node.delta()
    node.store.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(node.ensure, index)
        await trio.testing.wait_all_tasks_blocked(0.01)
        node.store.gate.set()
    assert len(node.store.reads) == 2


async def test_a_reader_hastens_the_base_of_what_was_prefetched(node: Node) -> None:
    """Prefetch has parked a chunk; a reader comes; the base must not wait behind other prefetching."""
    index, stored = node.delta()
    _, base, _ = node.base(stored)
    node.store.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        everything = range(node.space(0).table.count)
        nursery.start_soon(_prefetch, node, list(everything))
        await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.start_soon(node.ensure, index)
        await trio.testing.wait_all_tasks_blocked(0.01)
        flight = node.fetcher._queue.find(node.base(stored)[0], base)
        assert flight is not None
        assert flight.priority is Priority.DEMAND
        node.store.gate.set()
    assert node.space(0).complete


async def _prefetch(node: Node, chunks: list[int]) -> None:
    await node.fetcher.ensure(node.space(0).space_id, chunks, priority=Priority.PREFETCH, deadline_s=math.inf)


async def test_a_base_that_comes_corrupt_fails_the_chunk_and_is_named(node: Node) -> None:
    index, stored = node.delta()
    space, number, of_base = node.base(stored)
    node.store.corrupt = {of_base.offset + 100}
    with pytest.raises(IntegrityError, match=rf"chunk {number} of data space {space.space_id.hex()[:16]}"):
        await node.ensure(index)
    assert not space.is_present(number)
    assert not node.space(0).is_present(index)
    node.store.corrupt = set()
    await node.ensure(index)
    assert node.space(0).verify(index)


async def test_a_difference_that_comes_corrupt_fails_alone(node: Node) -> None:
    index, stored = node.delta()
    space, number, _ = node.base(stored)
    await node.fetcher.ensure(space.space_id, [number])
    node.store.corrupt = {stored.offset + stored.stored_size // 2}
    with pytest.raises(IntegrityError, match=f"chunk {index} of data space"):
        await node.ensure(index)
    assert space.verify(number), "the base is none the worse"


async def test_a_base_that_has_rotted_on_this_node_is_fetched_again(node: Node) -> None:
    index, stored = node.delta()
    space, number, _ = node.base(stored)
    await node.fetcher.ensure(space.space_id, [number])
    offset, length = space.table.extent(number)
    path = Path(space.path) / "data"
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(length))
    await node.ensure(index)
    assert node.space(0).verify(index)
    assert space.verify(number)
    assert node.fetcher.counters["retries"] >= 1


async def test_an_origin_that_lost_the_base_says_so(layout: str, tmp_path: Path) -> None:
    async with node_of(layout, tmp_path / "cache", deadline_s=1) as node:
        index, stored = node.delta()
        of_base = node.base(stored)[2]

        def gone(offset: int, length: int) -> None:
            if (offset, length) == (of_base.offset, of_base.stored_size):
                raise UnavailableError("no such blob")

        node.store.before = gone
        with pytest.raises(DeadlineError, match="no such blob"):
            await node.ensure(index, deadline_s=1)
        node.store.before = None
        await node.ensure(index)
        assert node.space(0).verify(index)


async def test_closing_wakes_who_waits_for_a_base(layout: str, tmp_path: Path) -> None:
    caught: list[BaseException] = []

    async def wait(node: Node, index: int) -> None:
        try:
            await node.ensure(index)
        except Exception as error:
            caught.append(error)

    async with trio.open_nursery() as nursery, node_of(layout, tmp_path / "cache") as node:
        index, _ = node.delta()
        node.store.gate = trio.Event()
        nursery.start_soon(wait, node, index)
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert [type(error).__name__ for error in caught] == ["DaemonError"]
