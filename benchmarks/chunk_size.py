"""Which default chunk size between 1 and 4 MiB? What a first tensor, a hop in the swarm, metadata and a whole read cost at each.

First tensor: through a mount that has nothing, from a registry with nothing in between: a page of a large tensor, and whole small tensors
at random places, each read once, from open to last byte; and the bytes fetched for them against their own. Hop: what a node adds before
it can pass a chunk on is to verify and store it, measured here for one chunk in one thread; a chunk reaches 1,000 nodes in about 10 hops of
(size / link rate + this). Metadata: bytes of chunk map per GiB of content. Whole read: cold, one sequential reader. Baseline of each ratio:
1 MiB.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

from rafsfs.format.codec import chunk_digest
from tests.support.models import published_model, read_header
from tests.support.processes import Node

from .measure import MIB, Row, files_below, median, rate, read_all, spread, timed
from .setting import Setting

SIZES = (1 * MIB, 2 * MIB, 4 * MIB)
_TENSORS = 24
_LARGE = 1 << 20
_LINK = 1.25e9
_HOPS = 10


def run(setting: Setting) -> list[Row]:
    """Measure."""
    source = setting.fresh("one-model")
    source.mkdir()
    shutil.copyfile(published_model() / "model.safetensors", source / "model.safetensors")
    header, start = read_header(source / "model.safetensors")
    places = [
        (start + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__" and entry["data_offsets"][1] - entry["data_offsets"][0] > _LARGE // 4
    ]
    refs = {}
    metadata = {}
    with setting.node() as node:
        for size in SIZES:
            refs[size] = f"localhost:{setting.registry.port}/bench/chunks:{size // MIB}"
            node.build(source, refs[size], "--chunk-size", f"{size}", "--dict", "none")
            found = node.json("inspect", refs[size])
            metadata[size] = found["chunk_map_bytes"] / found["data_bytes"] * (1 << 30)
    table_at, table_length = max(places, key=lambda place: place[1])
    pages: dict[int, list[float]] = {size: [] for size in SIZES}
    latency: dict[int, list[float]] = {size: [] for size in SIZES}
    fetched: dict[int, list[float]] = {size: [] for size in SIZES}
    whole: dict[int, list[float]] = {size: [] for size in SIZES}
    for number in range(setting.rounds):
        chosen = random.Random(number).sample([place for place in places if place[1] < 4 * MIB], _TENSORS)
        rows = random.Random(number).sample(range(table_at, table_at + table_length, 8 * MIB), 5)
        for size in SIZES[number % 3 :] + SIZES[: number % 3]:
            with setting.node() as node:
                mounted = node.mount(refs[size])
                fd = os.open(mounted / "model.safetensors", os.O_RDONLY)
                try:
                    pages[size] += [_timed_read(fd, 4096, at + 4 * MIB) for at in rows]
                    before = _fetched(node)
                    latency[size] += [_timed_read(fd, length, at) for at, length in chosen]
                finally:
                    os.close(fd)
                fetched[size].append((_fetched(node) - before) / sum(length for _, length in chosen))
            with setting.node() as node:
                mounted = node.mount(refs[size])
                whole[size].append(timed(lambda path=mounted: read_all(files_below(path))))  # type: ignore[misc]
    hop = {
        size: median([timed(lambda s=size: _store(setting.directory / "hop", s)) for _ in range(20)]) for size in SIZES
    }  # type: ignore[misc]
    return [row for size in SIZES for row in _rows(size, source, pages, latency, fetched, whole, hop, metadata)]


def _rows(
    size: int,
    source: Path,
    pages: dict[int, list[float]],
    latency: dict[int, list[float]],
    fetched: dict[int, list[float]],
    whole: dict[int, list[float]],
    hop: dict[int, float],
    metadata: dict[int, float],
) -> list[Row]:
    name, first = f"{size // MIB} MiB chunks", SIZES[0]
    total = (source / "model.safetensors").stat().st_size
    spreads = {one: _HOPS * (one / _LINK + hop[one]) for one in SIZES}

    def row(what: str, ours: float, baseline: float, text: str, note: str = "") -> Row:
        return Row(f"{name}: {what}", text, "1 MiB", ours / baseline, "-", None, note)

    return [
        row(
            "a page of a table of 47 MB, cold",
            median(pages[size]),
            median(pages[first]),
            f"{median(pages[size]) * 1e3:.1f} ms",
            spread(pages[size]),
        ),
        row(
            "a tensor of 0.6 to 2.4 MB, cold",
            median(latency[size]),
            median(latency[first]),
            f"{median(latency[size]) * 1e3:.1f} ms",
            spread(latency[size]),
        ),
        row(
            "bytes fetched for bytes wanted",
            median(fetched[size]),
            median(fetched[first]),
            f"{median(fetched[size]):.2f}",
        ),
        row(
            "one chunk through 10 hops at 10 Gbit/s",
            spreads[size],
            spreads[first],
            f"{spreads[size] * 1e3:.0f} ms",
            f"verify and store {hop[size] * 1e3:.2f} ms",
        ),
        row("chunk map per GiB", metadata[size], metadata[first], f"{metadata[size] / 1024:.0f} KiB"),
        row("whole read, cold", median(whole[size]), median(whole[first]), rate(total, median(whole[size]))),
    ]


def _timed_read(fd: int, length: int, offset: int) -> float:
    return timed(lambda: os.pread(fd, length, offset))


def _fetched(node: Node) -> int:
    return sum(int(mount["sources"]["origin"]) for mount in node.json("status")["mounts"])


def _store(path: Path, size: int) -> None:
    data = bytes(size)
    chunk_digest(data)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(fd, data, 0)
    finally:
        os.close(fd)
