"""The fetch pipeline over a real cache directory and an image in an OCI layout behind a counting, failing store."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from builder.build import BuildOptions, build_image
from rafsfs.errors import DaemonError, DeadlineError, IntegrityError, UnavailableError
from rafsfs.fetch.fetcher import Fetcher, open_fetcher
from rafsfs.fetch.queue import Priority
from rafsfs.fetch.source import FetchSettings, Source
from rafsfs.image import Image, load_image
from rafsfs.interfaces import BlobStream, BlockingRead, ThreadedStream
from rafsfs.registry.oci_layout import OciLayout
from rafsfs.store.cache import Cache
from rafsfs.types import Digest

CHUNK = 64 << 10
COUNT = 40


class Store(OciLayout):
    """A layout that notes each ranged read and fails as told."""

    def __init__(self, path: str, *, threaded: bool = True) -> None:
        super().__init__(path)
        self.threaded = threaded
        """Whether threads may read its streams."""
        self.reads: list[tuple[int, int]] = []
        self.before: Callable[[int, int], None] | None = None
        self.gate: trio.Event | None = None
        self.corrupt: set[int] = set()
        """Offsets in the blob at which a byte comes out wrong."""
        self.cut_after: int | None = None

    @asynccontextmanager
    async def _open(self, digest: Digest, offset: int, length: int) -> AsyncIterator[BlobStream]:
        self.reads.append((offset, length))
        if self.gate is not None:
            await self.gate.wait()
        if self.before:
            self.before(offset, length)
        async with super().open_range(digest, offset, length) as stream:
            yield _Stream(self, stream, offset)

    def open_range(self, digest: Digest, offset: int, length: int) -> AbstractAsyncContextManager[BlobStream]:
        return self._open(digest, offset, length)


class _Stream:
    def __init__(self, store: Store, inner: BlobStream, offset: int) -> None:
        self._store = store
        self._inner = inner
        self._offset = offset
        self._given = 0

    async def readinto(self, buffer: memoryview) -> None:
        self._check(buffer)
        await self._inner.readinto(buffer)
        self._spoil(buffer)

    def blocking(self) -> BlockingRead | None:
        read_into = self._inner.blocking() if isinstance(self._inner, ThreadedStream) else None
        if not self._store.threaded or read_into is None:
            return None

        def read(buffer: memoryview) -> None:
            self._check(buffer)
            read_into(buffer)
            self._spoil(buffer)

        return read

    def _check(self, buffer: memoryview) -> None:
        cut = self._store.cut_after
        if cut is not None and self._given + len(buffer) > cut:
            raise UnavailableError("the connection broke")

    def _spoil(self, buffer: memoryview) -> None:
        for bad in self._store.corrupt:
            if self._offset <= bad < self._offset + len(buffer):
                buffer[bad - self._offset] ^= 0xFF
        self._offset += len(buffer)
        self._given += len(buffer)


class Node:
    """A cache, a fetcher and one image to be fetched."""

    def __init__(self, cache: Cache, fetcher: Fetcher, image: Image, store: Store, source: Source) -> None:
        self.cache = cache
        self.fetcher = fetcher
        self.image = image
        self.store = store
        self.source = source
        self.space = cache.open_space(image.chunk_map.table(0))

    async def ensure(self, *chunks: int, **more: object) -> None:
        await self.fetcher.ensure(self.space.space_id, chunks, **more)  # type: ignore[arg-type]


@pytest.fixture
async def image_at(tmp_path: Path) -> str:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(random.Random(1).randbytes(CHUNK * COUNT))
    layout = str(tmp_path / "layout")
    await build_image(
        str(source), OciLayout(layout), "v1", BuildOptions(chunking="fixed", chunk_size=CHUNK, codec="raw")
    )
    return layout


@asynccontextmanager
async def node_of(
    layout: str, path: Path, settings: FetchSettings | None = None, *, threaded: bool = True
) -> AsyncIterator[Node]:
    cache = Cache.open(str(path))
    try:
        store = Store(layout, threaded=threaded)
        image = await load_image(store, "v1")
        async with open_fetcher(cache, settings or FetchSettings(readahead_bytes=0)) as fetcher:
            yield Node(cache, fetcher, image, store, fetcher.add_source(image.chunk_map, store, "test"))
    finally:
        cache.close()


@pytest.fixture(params=["by threads", "by the event loop"])
async def node(image_at: str, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Node]:
    async with node_of(image_at, tmp_path / "cache", threaded=request.param == "by threads") as found:
        yield found


async def test_adjacent_chunks_come_in_one_read(node: Node) -> None:
    counted: Counter[str] = Counter()
    await node.ensure(3, 4, 5, on_behalf=counted)
    assert node.space.missing(range(COUNT)) == [0, 1, 2, *range(6, COUNT)]
    assert len(node.store.reads) == 1
    assert counted == {"origin": 3 * CHUNK}


async def test_many_readers_of_one_chunk_cost_one_read(node: Node) -> None:
    node.store.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(node.ensure, 7)
        await trio.testing.wait_all_tasks_blocked(0.01)
        node.store.gate.set()
    assert node.store.reads == [(7 * CHUNK, CHUNK)]


async def test_what_is_present_is_not_fetched(node: Node) -> None:
    await node.ensure(1)
    await node.ensure(1)
    assert len(node.store.reads) == 1


async def test_a_broken_read_continues_with_what_is_missing(node: Node) -> None:
    node.store.cut_after = 2 * CHUNK
    await node.ensure(0, 1, 2, 3, 4)
    assert node.store.reads[0] == (0, 5 * CHUNK)
    assert node.store.reads[1] == (2 * CHUNK, 3 * CHUNK)
    assert node.space.missing(range(5)) == []


async def test_a_corrupt_chunk_fails_alone_and_says_which(node: Node) -> None:
    node.store.corrupt = {2 * CHUNK + 100}
    with pytest.raises(IntegrityError, match="chunk 2 of data space") as caught:
        await node.ensure(0, 1, 2, 3)
    assert str(node.image.manifest.blobs[0].digest) in str(caught.value)
    assert node.space.missing(range(4)) == [2]
    assert node.fetcher.counters["corrupt"] == 2  # asked for once more before it is given up
    node.store.corrupt = set()
    await node.ensure(2)


async def test_a_store_that_comes_back_serves_the_waiting_reader(node: Node) -> None:
    failures = iter([True, True, False])

    def fail(offset: int, length: int) -> None:
        if next(failures):
            raise UnavailableError("gone")

    node.store.before = fail
    await node.ensure(9)
    assert node.space.is_present(9)


async def test_a_store_that_stays_away_costs_the_deadline_and_names_the_cause(node: Node) -> None:
    def fail(offset: int, length: int) -> None:
        raise UnavailableError("gone fishing")

    node.store.before = fail
    with pytest.raises(DeadlineError, match=r"chunk 9 .*gone fishing"):
        await node.ensure(9, deadline_s=0.3)
    node.store.before = None
    await node.ensure(9, deadline_s=10)


async def test_who_joins_a_fetch_that_failed_for_long_has_all_of_his_own_time(image_at: str, tmp_path: Path) -> None:
    settings = FetchSettings(
        deadline_s=0.04, readahead_bytes=0
    )  # over when the second attempt fails, 0.05 s after the first
    async with node_of(image_at, tmp_path / "cache", settings) as node, trio.open_nursery() as nursery:
        attempts = 0
        failed = trio.Event()

        def fail(offset: int, length: int) -> None:
            nonlocal attempts
            attempts += 1
            if attempts < 3:
                failed.set()
                raise UnavailableError("gone")

        node.store.before = fail
        nursery.start_soon(prefetch, node, 9)
        await failed.wait()
        await node.ensure(9, deadline_s=20)
        assert node.space.is_present(9)
        assert attempts == 3


async def test_a_cancelled_reader_leaves_the_fetch_to_the_others(node: Node) -> None:
    node.store.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.ensure, 5)
        with trio.move_on_after(0.05):
            await node.ensure(5)
        node.store.gate.set()
    assert node.space.is_present(5)
    assert len(node.store.reads) == 1


async def test_demand_goes_before_prefetch(image_at: str, tmp_path: Path) -> None:
    settings = FetchSettings(connections=2, demand_reserve=1, merge_bytes=CHUNK, readahead_bytes=0)
    async with node_of(image_at, tmp_path / "cache", settings) as node:
        node.store.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            for index in range(10, 30):
                nursery.start_soon(prefetch, node, index)
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.start_soon(node.ensure, 0)
            nursery.start_soon(node.ensure, 29)
            await trio.testing.wait_all_tasks_blocked(0.01)
            node.store.gate.set()
        order = [offset // CHUNK for offset, _ in node.store.reads]
        assert {0, 29} <= set(order[:4])
        assert order.count(29) == 1


async def test_what_is_leased_goes_before_prefetch_and_after_demand(image_at: str, tmp_path: Path) -> None:
    settings = FetchSettings(connections=2, demand_reserve=1, merge_bytes=CHUNK, readahead_bytes=0)
    async with node_of(image_at, tmp_path / "cache", settings) as node:
        node.store.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            for index in range(10, 30):
                nursery.start_soon(prefetch, node, index)
            await trio.testing.wait_all_tasks_blocked(0.01)
            node.fetcher._fill_group(node.space.space_id, [5, 28])
            assert node.fetcher.depths()["leased"] == 2
            nursery.start_soon(node.ensure, 0)
            await trio.testing.wait_all_tasks_blocked(0.01)
            node.store.gate.set()
        with trio.fail_after(5):
            while node.space.missing([5, 28]):
                await trio.sleep(0.01)
        order = [offset // CHUNK for offset, _ in node.store.reads]
        assert {0, 5, 28} <= set(order[:5])
        assert order.count(28) == 1


async def test_a_lease_ends_a_wait_for_other_nodes_and_is_fetched_though_nobody_here_waits_any_more(node: Node) -> None:
    queue = node.fetcher._queue
    node.fetcher._fill_group(node.space.space_id, [7])
    (flight,) = queue.take(CHUNK, demand_only=False)
    queue.set_aside(flight)
    flight.waiters = 0
    assert queue.aside_of(node.space, [6, 7]) == [7]
    node.fetcher._fill_group(node.space.space_id, [7])
    assert not flight.is_aside
    with trio.fail_after(5):
        await flight.done.wait()
    assert node.space.is_present(7)


async def prefetch(node: Node, index: int) -> None:
    await node.ensure(index, priority=Priority.PREFETCH, deadline_s=math.inf)


async def test_prefetch_all_fills_the_image(node: Node) -> None:
    counted: Counter[str] = Counter()
    await node.fetcher.prefetch_all(node.source, on_behalf=counted)
    assert node.space.complete
    assert counted["origin"] == CHUNK * COUNT


async def test_a_sequential_reader_is_fetched_ahead_of_but_not_past_its_file(image_at: str, tmp_path: Path) -> None:
    async with node_of(image_at, tmp_path / "cache", FetchSettings(readahead_bytes=8 * CHUNK)) as node:
        for index in range(3):
            await node.ensure(index, own=range(9))
        with trio.fail_after(5):
            while node.space.missing(range(9)):
                await trio.sleep(0.01)
        await trio.sleep(0.05)
        assert node.space.missing(range(COUNT)) == list(range(9, COUNT))


async def test_a_chunk_that_another_image_has_is_copied_not_fetched(image_at: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    data = (tmp_path / "source" / "file").read_bytes()
    (other / "begin").write_bytes(b"new" * 40_000)
    (other / "file").write_bytes(data[: CHUNK * 8])
    await build_image(
        str(other), OciLayout(image_at), "v2", BuildOptions(chunking="fixed", chunk_size=CHUNK, codec="raw")
    )
    async with node_of(image_at, tmp_path / "cache") as node:
        await node.fetcher.prefetch_all(node.source)
        await trio.to_thread.run_sync(node.cache.sync)
        store = Store(image_at)
        second = await load_image(store, "v2")
        source = node.fetcher.add_source(second.chunk_map, store, "second")
        counted: Counter[str] = Counter()
        await node.fetcher.prefetch_all(source, on_behalf=counted)
        assert counted["local"] == 8 * CHUNK
        assert counted["origin"] == 120_000


async def test_a_lie_in_the_index_costs_a_fetch_and_never_a_wrong_byte(node: Node) -> None:
    await node.ensure(0)
    node.cache.index.put_many([(node.space.table.digest(1), node.space.space_id, 0)])
    await node.ensure(1)
    assert node.space.verify(1)


async def test_closing_wakes_those_who_wait(image_at: str, tmp_path: Path) -> None:
    caught: list[BaseException] = []

    async def wait(node: Node) -> None:
        try:
            await node.ensure(3)
        except DaemonError as error:
            caught.append(error)

    async with trio.open_nursery() as nursery, node_of(image_at, tmp_path / "cache") as node:
        node.store.gate = trio.Event()
        nursery.start_soon(wait, node)
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert len(caught) == 1
