"""What `rafs prefetch` asks of the daemon: bytes of a mount, in the order of a plan or of a loader.

Decided here: what a path and a plan's entry mean. Rule: a plan is what somebody sent; every path and range is checked against the image
before anything is fetched, and a plan with one bad entry fetches nothing.

Concurrency: one task per call; cancelled, what is on its way comes and the rest is not asked for.
"""

from __future__ import annotations

import mmap
import stat
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import trio

from ..errors import UsageError
from ..fetch.fetcher import Fetcher
from ..fetch.orders import ORDERS, Order, in_order
from ..fetch.prefetcher import header_of
from ..format.bootstrap import Bootstrap
from ..store.cache import Cache, CachedImage
from .session import PROGRESS_S, Progress

MAX_ENTRIES: Final = 100_000
"""Entries of a plan in one call: 8 MiB of frame hold about as many."""
Range = tuple[int, int, int]
"""nid, offset, length."""


class PrefetchCalls:
    """The calls."""

    def __init__(self, cache: Cache, fetcher: Fetcher) -> None:
        self._cache = cache
        self._fetcher = fetcher

    async def prefetch(
        self, image: CachedImage, params: dict[str, Any], counted: Counter[str], progress: Progress
    ) -> dict[str, Any]:
        """Fetch what `params` name of an image; return when it is here. Raises UsageError, or what a chunk that cannot be had raises."""
        order = params.get("order", "offset")
        plan = params.get("plan")
        if order not in ORDERS:
            raise UsageError(f"order {order!r} is not one of {', '.join(ORDERS)}")
        if plan is not None and (not isinstance(plan, list) or len(plan) > MAX_ENTRIES):
            raise UsageError(f"a plan is a list of at most {MAX_ENTRIES} entries")
        bootstrap = await trio.to_thread.run_sync(_open, image)
        top = str(params.get("path", ""))
        if plan is None:
            files = await trio.to_thread.run_sync(lambda: list(_files(bootstrap, top)))
            ranges = [(nid, 0, size) for nid, size in files] if order == "offset" else None
        else:
            files = []
            ranges = [_entry(bootstrap, top, number, entry) for number, entry in enumerate(plan, 1)]
        before = counted.copy()
        done = {"bytes": 0, "total": sum(length for *_, length in ranges or ()) or sum(size for _, size in files)}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_tell, done, progress)
            if ranges is None:
                for nid, size in files:
                    await self._fetch(bootstrap, await self._by(bootstrap, nid, size, order, counted), counted, done)
            else:
                await self._fetch(bootstrap, ranges, counted, done)
            nursery.cancel_scope.cancel()
        obtained = counted - before
        return {
            "wanted_bytes": done["total"],
            "fetched_bytes": obtained["origin"],
            "local_bytes": obtained["local"],
            "peer_bytes": obtained["peer"],
        }

    async def _by(self, bootstrap: Bootstrap, nid: int, size: int, order: Order, counted: Counter[str]) -> list[Range]:
        """Return a file's ranges in a loader's order; its header is fetched first."""
        extents = bootstrap.extents(nid)
        if not extents or extents[0].space is None or extents[0].file_offset:
            return [(nid, 0, size)]
        space = self._cache.opened_space(bytes.fromhex(bootstrap.spaces[extents[0].space].tag.decode()))
        tensors = None
        if space is not None:
            first, stop = extents[0].offset, extents[0].offset + extents[0].length
            tensors = await header_of(self._fetcher, space, first, stop, size, counted)
        return [(nid, *part) for part in in_order(tensors.tensors if tensors else (), size, order)]

    async def _fetch(
        self, bootstrap: Bootstrap, ranges: list[Range], counted: Counter[str], done: dict[str, int]
    ) -> None:
        def spans() -> Iterator[tuple[bytes, int, int]]:
            for nid, offset, length in ranges:
                for extent in bootstrap.extents(nid, offset, offset + length):
                    if extent.space is not None:
                        space_id = bytes.fromhex(bootstrap.spaces[extent.space].tag.decode())
                        yield space_id, extent.offset, extent.offset + extent.length
                done["bytes"] += length

        await self._fetcher.prefetch_spans(spans(), on_behalf=counted)


async def _tell(done: dict[str, int], progress: Progress) -> None:
    while True:
        progress({"done": done["bytes"], "total": done["total"]})
        await trio.sleep(PROGRESS_S)


def _open(image: CachedImage) -> Bootstrap:
    with open(image.bootstrap_path, "rb") as file:
        return Bootstrap(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))


def _resolve(bootstrap: Bootstrap, path: str) -> int:
    nid = bootstrap.resolve(path.strip("/").encode("utf-8", "surrogateescape"))
    if nid is None:
        raise UsageError(f"the image has no {path or '/'}")
    return nid


def _files(bootstrap: Bootstrap, path: str) -> Iterator[tuple[int, int]]:
    """Yield nid and size of the regular files at or below a path, in byte order of names, each once."""
    seen = set()
    for _, inode in bootstrap.walk(_resolve(bootstrap, path)):
        if stat.S_ISREG(inode.mode) and inode.nid not in seen:
            seen.add(inode.nid)
            yield inode.nid, inode.size


def _entry(bootstrap: Bootstrap, top: str, number: int, entry: object) -> Range:
    """Return what one entry of a plan names. Raises UsageError naming its place in the plan, from 1."""
    if not isinstance(entry, dict) or entry.keys() - {"path", "offset", "length"}:
        raise UsageError(f"entry {number} of the plan is not an object of path, offset and length: {str(entry)[:100]}")
    path, offset = entry.get("path", ""), entry.get("offset", 0)
    if not isinstance(path, str) or type(offset) is not int or type(entry.get("length", 0)) is not int:
        raise UsageError(f"entry {number} of the plan has a path that is no text or a range that is no whole number")
    inode = bootstrap.inode(_resolve(bootstrap, f"{top}/{path}" if path else top))
    if not stat.S_ISREG(inode.mode):
        raise UsageError(f"entry {number} of the plan names {path or top or '/'}, which is not a regular file")
    length = entry.get("length", max(0, inode.size - offset))
    if offset < 0 or length < 0 or offset + length > inode.size:
        raise UsageError(
            f"entry {number} of the plan names bytes {offset} to {offset + length} of {path or top}, which has {inode.size}"
        )
    return inode.nid, offset, length
