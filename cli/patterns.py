"""How programs read files of models: the patterns that `rafs bench` and the project's benchmarks time.

Decided here: what each pattern does to a file. Rule: a pattern reads the same bytes in the same order wherever the file lies, so that a
mount and a local disk can be compared; nothing is kept of what is read. Blocking; times are in seconds.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

READ: Final = 1 << 20
"""Bytes per call of a sequential reader: what most loaders and copies use."""
_PAGE: Final = 4096
_HEADER: Final = 32 << 20
"""Longest header of safetensors that is read, as the node does."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The first `size` bytes of a file, which a pattern reads."""

    path: str
    size: int


def drop(paths: Sequence[str]) -> None:
    """Drop the pages of files from the page cache; a file that cannot be opened keeps its own."""
    for path in paths:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def timed(pattern: Callable[[], int]) -> tuple[int, float]:
    """Return the bytes that a pattern read and how long it took."""
    started = time.perf_counter()
    return pattern(), time.perf_counter() - started


def sequential(pieces: Sequence[Piece]) -> int:
    """Read from start to end, 1 MiB at a time, one file after the other; return the bytes."""
    buffer = memoryview(bytearray(READ))
    total = 0
    for piece in pieces:
        with _opened(piece) as fd:
            at = 0
            while at < piece.size:
                got = os.preadv(fd, [buffer[: min(READ, piece.size - at)]], at)
                if not got:
                    break
                at += got
            total += at
    return total


def parallel(pieces: Sequence[Piece], *, threads: int, block: int, direct: bool = False) -> int:
    """Read blocks of `block` bytes by so many threads, each taking the next one; return the bytes. `direct`: past the page cache."""
    jobs = iter([(piece, at) for piece in pieces for at in range(0, piece.size, block)])
    lock = threading.Lock()
    totals = [0] * threads
    failures: list[OSError] = []
    flags = os.O_DIRECT if direct else 0

    def read(number: int) -> None:
        # An anonymous mapping, since O_DIRECT wants its buffer aligned.
        with mmap.mmap(-1, block) as memory, memoryview(memory) as buffer:
            try:
                while True:
                    with lock:
                        job = next(jobs, None)
                    if job is None:
                        return
                    piece, at = job
                    with _opened(piece, flags) as fd:
                        wanted = block if direct else min(block, piece.size - at)
                        totals[number] += os.preadv(fd, [buffer[:wanted]], at)
            except OSError as error:
                failures.append(error)

    workers = [threading.Thread(target=read, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    return sum(totals)


def faults(pieces: Sequence[Piece], *, count: int, seed: int = 1) -> int:
    """Touch `count` pages at random through mappings, no read-ahead asked for; return the bytes of these pages."""
    rng = random.Random(seed)
    places = [(number, page) for number, piece in enumerate(pieces) for page in range(piece.size // _PAGE)]
    chosen = rng.sample(places, min(count, len(places)))
    with _mapped(pieces, mmap.MADV_RANDOM) as maps:
        for number, page in chosen:
            maps[number][page * _PAGE]
    return len(chosen) * _PAGE


def load_tensors(pieces: Sequence[Piece], step: int = 1) -> int:
    """Read a file of safetensors as its loader does: the header, then every `step`th tensor copied out of a mapping; return the bytes.

    All are copied into one buffer, as long as the longest: fresh memory for each would be measured instead.
    """
    total = 0
    buffer = memoryview(bytearray())
    with _mapped(pieces, None) as maps:
        for piece, mapped in zip(pieces, maps, strict=True):
            with memoryview(mapped) as whole:
                for first, stop in tensor_places(piece)[::step]:
                    if stop - first > len(buffer):
                        buffer = memoryview(bytearray(stop - first))
                    buffer[: stop - first] = whole[first:stop]
                    total += stop - first
    return total


def tensor_places(piece: Piece) -> list[tuple[int, int]]:
    """Return where the tensors of a file of safetensors lie, by offset; [] if it is none, or reaches beyond the piece."""
    with _opened(piece) as fd:
        head = os.pread(fd, 8, 0)
        if len(head) < 8:
            return []
        (length,) = struct.unpack("<Q", head)
        if length > min(_HEADER, piece.size - 8):
            return []
        try:
            header = json.loads(os.pread(fd, length, 8))
            places = [
                (int(info["data_offsets"][0]) + 8 + length, int(info["data_offsets"][1]) + 8 + length)
                for name, info in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return []
    return sorted((first, stop) for first, stop in places if 0 < first < stop <= piece.size)


@contextmanager
def _opened(piece: Piece, flags: int = 0) -> Iterator[int]:
    fd = os.open(piece.path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _mapped(pieces: Sequence[Piece], advice: int | None) -> Iterator[list[mmap.mmap]]:
    maps: list[mmap.mmap] = []
    try:
        for piece in pieces:
            with _opened(piece) as fd:
                maps.append(mmap.mmap(fd, piece.size, prot=mmap.PROT_READ))
            if advice is not None:
                maps[-1].madvise(advice)
        yield maps
    finally:
        for mapped in maps:
            mapped.close()
