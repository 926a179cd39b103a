"""How long does it take to read a whole image through a mount that has nothing yet, against not having a mount?

Baseline: the blobs of the same image fetched from the same registry with the product's registry client, 8 connections of
ranges up to 8 MiB, every chunk decoded in two threads and written to a file, digests not checked. Ours: a fresh cache and
a fresh mount each round; timed from the first open to the last byte read, by one sequential reader and by four. Manifest,
bootstrap and chunk map are there before the clock starts, for both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import trio

from .measure import Row, busy_s, files_below, interleave, median, rate, read_all, settle, spread, timed
from .setting import Setting

CONNECTIONS = 8
RANGE_BYTES = 8 << 20


async def fetch_and_decode(ref: str, target: str) -> tuple[float, float]:
    """Fetch all blobs of an image, decode all chunks into one file per data space; return the seconds, and those of all processors."""
    from rafsfs.format.chunk_map import StoredChunk  # noqa: PLC0415
    from rafsfs.format.codec import decode  # noqa: PLC0415 - a process of its own runs this
    from rafsfs.image import load_image  # noqa: PLC0415
    from rafsfs.registry.reference import parse_reference  # noqa: PLC0415
    from rafsfs.registry.store import RegistryOptions, open_store  # noqa: PLC0415

    reference = parse_reference(ref)
    async with open_store(reference, RegistryOptions(plain_http=True)) as store:
        image = await load_image(store, reference.reference)
        jobs: list[tuple[int, int, int, list[tuple[StoredChunk, int, int]]]] = []
        chunks = []
        fds = []
        for space in image.chunk_map.spaces:
            fd = os.open(f"{target}-{space.index}", os.O_RDWR | os.O_CREAT | os.O_EXCL)
            os.truncate(fd, space.size)
            fds.append(fd)
            offsets = image.chunk_map.table(space.index)
            chunks += [
                (image.chunk_map.stored(space.index, index), fd, offsets.extent(index)[0])
                for index in range(space.count)
            ]
        # A chunk that is stored once and used twice is fetched once, as ours does by digest.
        chunks.sort(key=lambda item: (item[0].blob, item[0].offset))
        for stored, fd, at in chunks:
            end = stored.offset + stored.stored_size
            if (
                jobs
                and jobs[-1][0] == stored.blob
                and stored.offset <= jobs[-1][2]
                and end - jobs[-1][1] <= RANGE_BYTES
            ):
                blob, start, stop, members = jobs[-1]
                members.append((stored, fd, at))
                jobs[-1] = (blob, start, max(stop, end), members)
            else:
                jobs.append((stored.blob, stored.offset, end, [(stored, fd, at)]))
        cpu = trio.CapacityLimiter(2)
        pending = iter(jobs)

        def write(data: memoryview, start: int, members: list[tuple[StoredChunk, int, int]]) -> None:
            for stored, fd, at in members:
                out = bytearray(stored.length)
                first = stored.offset - start
                decode(stored.codec, stored.param, data[first : first + stored.stored_size], memoryview(out))
                os.pwrite(fd, out, at)

        async def fetch() -> None:
            buffer = bytearray(RANGE_BYTES)
            for blob, start, stop, members in pending:
                view = memoryview(buffer)[: stop - start]
                async with store.open_range(image.chunk_map.blobs[blob].digest, start, stop - start) as stream:
                    await stream.readinto(view)
                await trio.to_thread.run_sync(write, view, start, members, limiter=cpu)

        started, busy = time.perf_counter(), busy_s()
        async with trio.open_nursery() as nursery:
            for _ in range(CONNECTIONS):
                nursery.start_soon(fetch)
        seconds, busy = time.perf_counter() - started, busy_s() - busy
        for fd in fds:
            os.close(fd)
        return seconds, busy


def without_mount(ref: str, target: Path, inside: Sequence[str] = ()) -> tuple[float, float]:
    """Return what `fetch_and_decode` does, in a process of its own. `inside`: what that command has before it."""
    command = [*inside, sys.executable, "-m", "benchmarks.cold_read", ref, str(target)]
    seconds, busy = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), float(busy)


def read_parallel(paths: list[Path], readers: int) -> None:
    """Read all files, split over so many threads by file."""
    threads = [threading.Thread(target=read_all, args=(paths[number::readers],)) for number in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run(setting: Setting) -> list[Row]:
    """Measure."""
    ref, size = setting.weights_ref, setting.weights_bytes

    def baseline() -> float:
        settle()
        return without_mount(ref, setting.fresh("fetched"))[0]

    def through_mount(readers: int) -> float:
        settle()
        with setting.node() as node:
            paths = files_below(node.mount(ref))
            return timed(lambda: read_parallel(paths, readers))

    def pull() -> float:
        settle()
        with setting.node() as node:
            node.status()
            return timed(lambda: node.rafs("pull", ref, timeout_s=300))

    seconds = interleave(
        {
            "baseline": baseline,
            "one reader": lambda: through_mount(1),
            "four readers": lambda: through_mount(4),
            "rafs pull": pull,
        },
        setting.rounds,
    )
    base = median(seconds["baseline"])
    rows = []
    for name in ("one reader", "four readers", "rafs pull"):
        ours = median(seconds[name])
        rows.append(
            Row(
                f"cold read of all, {size / 1e6:.0f} MB, {name}",
                f"{ours:.2f} s ({rate(size, ours)})",
                f"ranged GET and decode {base:.2f} s ({rate(size, base)})",
                ours / base,
                "-" if name == "rafs pull" else "<= 1.15",
                None if name == "rafs pull" else ours / base <= 1.15,
                f"ours {spread(seconds[name])}, baseline {spread(seconds['baseline'])}",
            )
        )
    return rows


if __name__ == "__main__":
    print(*trio.run(fetch_and_decode, sys.argv[1], sys.argv[2]))
