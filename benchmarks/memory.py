"""How much memory do the daemon and a worker keep, and what does a chunk map of 1 TiB cost to open?

Resident memory (VmRSS, which counts shared pages too) after everything was read, and with an image of 100 GiB mounted.
The chunk map has 262,144 chunks of 4 MiB; it is opened from a file by a process of its own, which reports the time and by
how much its resident memory grew, look-ups of 1,000 chunks included.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.processes import rss_bytes

from .inputs import MIB, large_image
from .measure import Row, files_below, median, read_all
from .setting import Setting

DAEMON_LIMIT = 150 * MIB
PER_CHUNK = 100
WORKER_LIMIT = 60 * MIB

_OPEN = """
import mmap, re, sys, time
from rafsfs.format.chunk_map import ChunkMap
def rss():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = rss()
started = time.perf_counter()
with open(sys.argv[1], "rb") as file:
    view = ChunkMap(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
opened = time.perf_counter() - started
for space in view.spaces:
    for index in range(0, space.count, max(1, view.chunk_count // 1000)):
        view.stored(space.index, index)
grown = rss() - before
started = time.perf_counter()
view.validate()
print(opened, grown, time.perf_counter() - started)
"""


def run(setting: Setting) -> list[Row]:
    """Measure."""
    rows = []
    with setting.node() as node:
        mounted = node.mount(setting.weights_ref, "mnt", "--mode", "fuse")
        chunks = int(node.json("inspect", setting.weights_ref)["chunks"])
        read_all(files_below(mounted))
        rows += _processes(node, chunks, "after reading the weights")
    with setting.node() as node:
        mounted = node.mount(setting.large_ref, "mnt", "--mode", "fuse")
        with (mounted / "model-00003.safetensors").open("rb") as file:
            file.read(64 * MIB)
        rows += _processes(node, 102_400, "100 GiB mounted, 64 MiB of it read")
    rows += _chunk_map(setting)
    return rows


def _processes(node: object, chunks: int, when: str) -> list[Row]:
    from tests.support.processes import Node  # noqa: PLC0415

    assert isinstance(node, Node)
    (worker,) = node.worker_pids()
    daemon_bytes, worker_bytes = rss_bytes(node.daemon_pid()), rss_bytes(worker)
    limit = DAEMON_LIMIT + PER_CHUNK * chunks
    return [
        Row(
            f"resident memory of {name}, {when}",
            f"{size / MIB:.0f} MiB",
            f"limit {bound / MIB:.0f} MiB ({chunks:,} chunks)",
            size / bound,
            "<= 1.0",
            size <= bound,
        )
        for name, size, bound in (("the daemon", daemon_bytes, limit), ("a worker", worker_bytes, WORKER_LIMIT))
    ]


def _chunk_map(setting: Setting) -> list[Row]:
    path: Path = setting.fresh("chunkmap")
    path.write_bytes(large_image(1 << 40, 4 * MIB)[1])
    opened, growth, checked = [], [], []
    for _ in range(setting.rounds):
        result = subprocess.run(
            [sys.executable, "-c", _OPEN, path], check=True, capture_output=True, text=True
        ).stdout.split()
        opened.append(float(result[0]))
        growth.append(int(result[1]))
        checked.append(float(result[2]))
    return [
        Row(
            "opening a 1 TiB chunk map, 262,144 chunks",
            f"{median(opened) * 1000:.2f} ms",
            "limit 50 ms",
            median(opened) / 0.050,
            "<= 1.0",
            median(opened) <= 0.050,
            f"the full check of every record takes {median(checked) * 1000:.0f} ms more",
        ),
        Row(
            "resident memory of it, 1,000 chunks looked up",
            f"{median(growth) / MIB:.1f} MiB",
            "limit 40 MiB",
            median(growth) / (40 * MIB),
            "<= 1.0",
            median(growth) <= 40 * MIB,
            f"the map has {path.stat().st_size / MIB:.1f} MiB",
        ),
    ]
