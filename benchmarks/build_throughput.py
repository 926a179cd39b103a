"""How fast is `rafs build` against the bare loop of hashing and encoding, and how much faster is building the same again?

Baseline: two threads that read the same files in 1 MiB chunks into a buffer of their own, hash each (BLAKE3), encode it with the product's
codec functions, told the element width, and hash what is to be stored (SHA-256, which names every OCI blob); the result is thrown away. No
scan, no look at headers, no dedup, no order, no writing, no sync. Against it stands a build into a layout in memory (tmpfs), whose bytes
are written, but not to a disk; a build to the disk stands beside the time to write and sync the same blob. Both run as processes of their
own on a warm page cache, with the memory for what is written at hand (`ballast.py`). For ours, the whole command is timed, interpreter
start included, and the seconds that it reports itself, from scan to tag.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from .ballast import Ballast
from .measure import Row, files_below, interleave, median, rate, read_all, settle, spread, timed
from .setting import Setting

CHUNK = 1 << 20
THREADS = 2
_WIDTHS = {".bf16.safetensors": 2, ".f16.safetensors": 2, ".safetensors": 4}


def bare_loop(directory: Path) -> float:
    """Read, hash, encode and hash all files below a directory in two threads; return the seconds."""
    from rafsfs.format.codec import chunk_digest, encode  # noqa: PLC0415 - a process of its own runs this
    from rafsfs.format.planes import EXTRA_ROOM  # noqa: PLC0415

    chunks = _chunks(directory)
    turn = threading.Lock()

    def work() -> None:
        buffer, room = memoryview(bytearray(CHUNK)), memoryview(bytearray(CHUNK + EXTRA_ROOM))
        named = hashlib.sha256()
        while True:
            with turn:
                fd, offset, length, width = next(chunks, (-1, 0, 0, 0))
            if fd < 0:
                return
            data = buffer[:length]
            os.preadv(fd, [data], offset)
            chunk_digest(data)
            named.update(encode(data, "auto", width, room[: length + EXTRA_ROOM]).data)

    encode(memoryview(bytes(CHUNK)), "auto", 4)  # loads what is loaded on first use
    started = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def _chunks(directory: Path) -> Iterator[tuple[int, int, int, int]]:
    """Yield (fd, offset, length, element width)."""
    for path in files_below(directory):
        width = next((width for suffix, width in _WIDTHS.items() if path.name.endswith(suffix)), 0)
        fd = os.open(path, os.O_RDONLY)
        size = os.fstat(fd).st_size
        for offset in range(0, size, CHUNK):
            yield fd, offset, min(CHUNK, size - offset), width


def run(setting: Setting) -> list[Row]:
    """Measure."""
    weights = setting.many_weights
    size = sum(path.stat().st_size for path in files_below(weights))
    read_all(files_below(weights))
    reported: list[float] = []
    on_disk_reported: list[float] = []
    again: list[float] = []

    memory = _memory_directory(setting, size)

    def loop() -> float:
        command = [sys.executable, "-m", "benchmarks.build_throughput", str(weights)]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)

    def build(layout: Path, times: list[float]) -> float:
        settle()
        with setting.node() as node, contextlib.closing(Ballast(size)) as ballast:
            built: dict[str, object] = {}
            ballast.hold()
            with ballast.giving():
                seconds = timed(lambda: built.update(node.build(weights, f"oci:{layout}:v1", timeout_s=300)))
            times.append(float(str(built["seconds"])))
            again.append(timed(lambda: node.build(weights, f"oci:{layout}:v1", timeout_s=300)))
        return seconds

    def in_memory() -> float:
        with tempfile.TemporaryDirectory(dir=memory) as directory:
            return build(Path(directory) / "layout", reported)

    def on_disk() -> float:
        return build(setting.fresh("layout"), on_disk_reported)

    def plain_write() -> float:
        blobs = sorted(setting.directory.glob("layout-*/blobs/sha256/*"), key=lambda path: path.stat().st_size)
        blob = blobs[-1]
        settle()
        return timed(lambda: _copy_synced(blob, setting.fresh("plain")))

    seconds = interleave({"loop": loop, "memory": in_memory, "disk": on_disk, "plain": plain_write}, setting.rounds)
    bare, ours, inner, disk, plain = (
        median(values) for values in (seconds["loop"], seconds["memory"], reported, on_disk_reported, seconds["plain"])
    )
    second = median(again)
    return [
        Row(
            f"build throughput, {size / 1e6:.0f} MB of weights to a layout in memory, as `rafs build --json` reports it",
            rate(size, inner),
            f"bare loop {rate(size, bare)}",
            bare / inner,
            ">= 0.85",
            bare / inner >= 0.85,
            f"ours {spread(reported)}, loop {spread(seconds['loop'])}",
        ),
        Row(
            "the same, whole command",
            rate(size, ours),
            f"bare loop {rate(size, bare)}",
            bare / ours,
            "-",
            None,
            spread(seconds["memory"]),
        ),
        Row(
            "the same to a layout on the disk, synced",
            rate(size, disk),
            f"writing and syncing the stored bytes alone takes {plain:.2f} s",
            plain / disk,
            "-",
            None,
            f"ours {spread(on_disk_reported)}, writing {spread(seconds['plain'])}",
        ),
        Row(
            "identical rebuild, whole command",
            f"{second:.2f} s",
            f"first build {ours:.2f} s",
            ours / second,
            ">= 2.5",
            ours / second >= 2.5,
            spread(again),
        ),
    ]


def _memory_directory(setting: Setting, size: int) -> Path:
    """Return a directory of a tmpfs with room, else the working directory."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and shutil.disk_usage(shared).free > 2 * size else setting.directory


def _copy_synced(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 4 << 20)
        writer.flush()
        os.fsync(writer.fileno())
    target.unlink()


if __name__ == "__main__":
    print(bare_loop(Path(sys.argv[1])))
