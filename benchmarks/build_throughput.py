"""How fast is `rafs build` against the bare loop of hashing and encoding, and how much faster is building the same again?

Baseline: two threads that read the same files in the same 1 MiB chunks, hash (BLAKE3) and encode (policy auto) each with
the product's codec functions, and throw the result away: no scan, no dedup, no SHA-256 of blobs, no writing. Both run as
a process of their own on a warm page cache; for ours, the whole command is timed, interpreter start included.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .measure import Row, files_below, interleave, median, rate, read_all, settle, spread, timed
from .setting import Setting

CHUNK = 1 << 20
THREADS = 2


def bare_loop(directory: Path) -> float:
    """Hash and encode all files below a directory in two threads; return the seconds."""
    from rafsfs.format.codec import chunk_digest, encode  # noqa: PLC0415 - a process of its own runs this

    def chunks() -> Iterator[bytes]:
        for path in files_below(directory):
            with path.open("rb", buffering=0) as file:
                while data := file.read(CHUNK):
                    yield data

    def work(data: bytes) -> int:
        chunk_digest(data)
        return len(encode(memoryview(data), "auto").data)

    started = time.perf_counter()
    stored = 0
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = []
        for data in chunks():
            waiting.append(pool.submit(work, data))
            if len(waiting) >= 4 * THREADS:
                stored += waiting.pop(0).result()
        stored += sum(one.result() for one in waiting)
    return time.perf_counter() - started


def run(setting: Setting) -> list[Row]:
    """Measure."""
    import subprocess  # noqa: PLC0415

    weights, size = setting.weights, setting.weights_bytes
    read_all(files_below(weights))
    reported: list[float] = []
    again: list[float] = []

    def loop() -> float:
        command = [sys.executable, "-m", "benchmarks.build_throughput", str(weights)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def build() -> float:
        layout = setting.fresh("layout")
        settle()
        with setting.node() as node:
            built: dict[str, object] = {}
            seconds = timed(lambda: built.update(node.build(weights, f"oci:{layout}:v1", timeout_s=300)))
            reported.append(float(str(built["seconds"])))
            again.append(timed(lambda: node.build(weights, f"oci:{layout}:v1", timeout_s=300)))
        return seconds

    seconds = interleave({"loop": loop, "build": build}, setting.rounds)
    bare, ours, inner, second = (median(values) for values in (seconds["loop"], seconds["build"], reported, again))
    return [
        Row(
            f"build throughput, {size / 1e6:.0f} MB of weights to an OCI layout, whole command",
            rate(size, ours),
            f"bare loop {rate(size, bare)}",
            bare / ours,
            ">= 0.85",
            bare / ours >= 0.85,
            f"ours {spread(seconds['build'])}, loop {spread(seconds['loop'])}",
        ),
        Row(
            "the same, seconds as `rafs build --json` reports them",
            rate(size, inner),
            f"bare loop {rate(size, bare)}",
            bare / inner,
            ">= 0.85",
            bare / inner >= 0.85,
            spread(reported),
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


if __name__ == "__main__":
    print(bare_loop(Path(sys.argv[1])))
