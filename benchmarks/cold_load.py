"""Cold loads: all tensors through a mount that has nothing yet, against fetching and decoding the same blobs without a mount.

On loopback the processors are what is waited for, since registry, daemon and loader share them; behind a line of 1 Gbit/s the line is. Rows
say which. Time is that of the load alone: the mount has been made, the loader's process and the baseline's are there.
Memory that a load fills is at hand, and what else is free is held meanwhile (`ballast.py`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cli.patterns import Piece, load_tensors, tensor_places
from tests.support.namespaces import running_rig

from .ballast import Ballast, rest
from .cold_read import without_mount
from .measure import Row, busy_s, files_below, interleave, median, rate, settle, spread, timed
from .setting import Setting

COPIES = 3
"""Of what is loaded cold, in memory: the file system's pages, the cache file's, and the stored bytes on their way."""
_LINE_MBIT = 1000


@dataclass(frozen=True)
class Place:
    """From where an image is loaded. `inside`: what to put before a command so that it has the network of the node."""

    ref: str
    label: str = ""
    inside: Sequence[str] = ()


def pieces_of(directory: Path) -> list[Piece]:
    """Return the files of weights below a directory, whole."""
    return [Piece(str(path), path.stat().st_size) for path in files_below(directory) if path.suffix == ".safetensors"]


@contextlib.contextmanager
def at_hand(size: int) -> Iterator[None]:
    """Have memory for a cold load of so many bytes; what a virtual machine's host has to find is not what is measured."""
    with contextlib.closing(Ballast(COPIES * size)) as ballast:
        ballast.hold()
        with ballast.giving():
            yield


def on_loopback(setting: Setting, modes: Sequence[str]) -> list[Row]:
    """Loads from a registry on loopback, in some modes."""
    place = Place(setting.weights_ref)
    return [row for mode in modes for row in _rows(setting, place, mode)]


def behind_a_line(setting: Setting, modes: Sequence[str]) -> list[Row]:
    """Loads from a registry whose link is shaped: network namespaces, needs root."""
    label = f" behind {_LINE_MBIT / 1000:g} Gbit/s"
    _, _, name = setting.weights_ref.partition("/")  # asked for first: it is built on loopback
    if os.geteuid():
        return [Row(f"cold load{label}", "-", "-", None, "-", None, "network namespaces need root")]
    with running_rig() as rig:
        address = rig.add("origin", _LINE_MBIT)
        rig.add("node", 2 * _LINE_MBIT)
        with rig.registry("origin", setting.registry.storage):
            place = Place(f"{address}:5000/{name}", label, rig.inside("node"))
            return [row for mode in modes for row in _rows(setting, place, mode)]


def _rows(setting: Setting, place: Place, mode: str) -> list[Row]:
    size = sum(piece.size for piece in pieces_of(setting.weights))
    work: defaultdict[str, list[float]] = defaultdict(list)

    def baseline() -> float:
        settle()
        with at_hand(size):
            seconds, busy = without_mount(place.ref, setting.fresh("fetched"), place.inside)
        work["baseline"].append(busy)
        return seconds

    def load(readers: int) -> float:
        settle()
        with setting.node(place.inside) as node:
            pieces = pieces_of(node.mount(place.ref, "mnt", "--mode", mode, "--plain-http"))
            # A process of its own: one that waits in a page fault holds its interpreter, and the ballast is given by a thread of this one.
            with multiprocessing.get_context("spawn").Pool(1) as loader:
                loader.apply(timed_load, ([], 1))  # started before the clock
                with at_hand(size):
                    seconds, busy = loader.apply(timed_load, (pieces, readers))
        work[str(readers)].append(busy)
        return seconds

    with rest(COPIES * size + size):
        seconds = interleave(
            {"baseline": baseline, "1": partial(load, 1), "8": partial(load, 8)}, max(5, setting.rounds)
        )
    base = median(seconds["baseline"])
    rows = []
    for name, label, limit in (("1", "one reader", 1.15), ("8", "8 interleaving readers", 1.3)):
        ours = median(seconds[name])
        rows.append(
            Row(
                f"[{mode}] cold load{place.label}, all tensors by mmap, {label}: time ÷ fetch and decode",
                f"{ours:.2f} s ({rate(size, ours)})",
                f"{base:.2f} s ({rate(size, base)})",
                ours / base,
                f"<= {limit}",
                ours / base <= limit,
                f"ours {spread(seconds[name])}, baseline {spread(seconds['baseline'])}; of {os.cpu_count()} processors "
                f"{median(work[name]):.2f} s, baseline {median(work['baseline']):.2f} s",
            )
        )
    return rows


def timed_load(pieces: list[Piece], readers: int) -> tuple[float, float]:
    """Return the seconds that a load takes, and those of all processors; runs in a process of its own."""
    busy = busy_s()
    seconds = timed(lambda: interleaved(pieces, readers))
    return seconds, busy_s() - busy


def interleaved(pieces: list[Piece], readers: int) -> None:
    """Load all tensors of the files, by so many threads that take the tensors in turn."""
    if readers == 1:
        load_tensors(pieces)
        return
    jobs = [(piece, first, stop) for piece in pieces for first, stop in tensor_places(piece)]

    def read(number: int) -> None:
        for piece, first, stop in jobs[number::readers]:
            copy_range(piece.path, first, stop)

    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(read, range(readers)))


def copy_range(path: str, first: int, stop: int) -> None:
    """Read bytes [first, stop) of a file by preads of 1 MiB."""
    buffer = memoryview(bytearray(1 << 20))
    fd = os.open(path, os.O_RDONLY)
    try:
        while first < stop:
            got = os.preadv(fd, [buffer[: stop - first]], first)
            if not got:
                raise OSError(f"{path} ends at byte {first}")
            first += got
    finally:
        os.close(fd)
