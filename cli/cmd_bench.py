"""`rafs bench`: how fast models are read here, with the local disk beside each figure."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import click

from rafsfs.errors import MountError, UsageError

from .options import SizeType, cache_dir_option, json_option, option
from .output import existing_parent, print_json, print_table, size
from .patterns import Piece, drop, faults, load_tensors, parallel, sequential, tensor_places, timed

_ROUNDS: Final = 3
_PAGES: Final = 2000
"""Pages touched by the fault pattern: a few hundred milliseconds on a cold disk."""
_BLOCK: Final = 4 << 20
_THREADS: Final = 8
_MOUNT_S: Final = 120


@click.command("bench")
@click.argument("what", metavar="[MOUNT|REF]")
@option(
    "--size",
    "limit",
    envvar="RAFS_BENCH_SIZE",
    type=SizeType(),
    default="1GiB",
    show_default=True,
    help="Bytes to read at most: whole files, the largest first, the last one in part.",
)
@option(
    "--local",
    envvar="RAFS_BENCH_LOCAL",
    type=click.Path(file_okay=False, exists=True),
    help="Where the copy to compare with goes.  [default: beside the cache directory]",
)
@cache_dir_option
@json_option
def command(what: str, limit: int, local: str | None, cache_dir: str, as_json: bool) -> None:
    """Read a model as programs do and print how fast that was.

    MOUNT is a directory in a mount: what is not on this node yet is fetched first, and the figures are those of data that are here. REF is
    mounted with an empty cache of its own, which goes at the end: the first figures are then those of data that come from the registry.
    How to reach it is taken from the environment (RAFS_PLAIN_HTTP and so on).

    Each pattern is run three times in turn with the same pattern on a copy on the local disk; the medians are shown. "cold" is after the
    pages of these files were dropped from the page cache, "warm" right after.

    Example: rafs bench /models/llama --size 4GiB
    """
    beside = local or existing_parent(cache_dir)
    with tempfile.TemporaryDirectory(prefix="rafs-bench-", dir=beside) as directory:
        if os.path.isdir(what):
            rows = _bench(what, limit, Path(directory), cache_dir)
        else:
            with _own_mount(what, Path(directory)) as (top, cache, seconds):
                rows = [_row("mount to first byte", "cold, from the registry", 1, _first_byte(top, seconds), None)]
                rows += _from_registry(top, limit)
                rows += _bench(top, limit, Path(directory), cache)
    if as_json:
        print_json({"what": what, "rows": rows})
        return
    shown = [
        (
            row["pattern"],
            row["state"],
            _figure(row, "seconds"),
            _figure(row, "local_seconds"),
            f"{row['ratio']:.2f}" if row["ratio"] else "-",
        )
        for row in rows
    ]
    print_table(shown, header=("PATTERN", "STATE", "HERE", "LOCAL DISK", "SPEED / LOCAL"))


def choose(top: str, limit: int) -> list[Piece]:
    """Return the largest regular files below a directory, `limit` bytes together. Raises UsageError if there are none."""
    found = []
    for directory, _, names in os.walk(top):
        for name in names:
            path = os.path.join(directory, name)
            if os.path.isfile(path) and not os.path.islink(path):
                found.append(Piece(path, os.path.getsize(path)))
    pieces = []
    for piece in sorted(found, key=lambda piece: (-piece.size, piece.path)):
        if limit > 0 and piece.size:
            pieces.append(Piece(piece.path, min(piece.size, limit)))
            limit -= piece.size
    if not pieces:
        raise UsageError(f"{top} holds no file with content")
    return pieces


def _bench(top: str, limit: int, directory: Path, cache_dir: str) -> list[dict[str, Any]]:
    pieces = choose(top, limit)
    copies = _copy(pieces, directory)  # brings what is not here yet
    whole = [number for number, piece in enumerate(pieces) if tensor_places(piece)]
    data = [str(path) for path in Path(cache_dir).glob("spaces/*/data")]
    patterns: list[tuple[str, Callable[[Sequence[Piece]], int]]] = [
        ("sequential read", sequential),
        (
            f"parallel pread, {_THREADS} threads of {_BLOCK >> 20} MiB",
            lambda p: parallel(p, threads=_THREADS, block=_BLOCK),
        ),
        (f"mmap, {_PAGES} random pages", lambda p: faults(p, count=_PAGES)),
    ]
    if whole:
        patterns.append(("safetensors, all tensors", lambda p: load_tensors([p[number] for number in whole])))
    rows = []
    for name, pattern in patterns:
        for state in ("cold", "warm"):
            here: list[float] = []
            there: list[float] = []
            count = 0
            for _ in range(_ROUNDS):
                for chosen, times in ((pieces, here), (copies, there)):
                    if state == "cold":
                        drop([piece.path for piece in chosen] + (data if chosen is pieces else []))
                    else:
                        pattern(chosen)
                    count, seconds = timed(partial(pattern, chosen))
                    times.append(seconds)
            rows.append(_row(name, state, count, statistics.median(here), statistics.median(there)))
    return rows


def _from_registry(top: str, limit: int) -> list[dict[str, Any]]:
    pieces = choose(top, limit)
    weights = [piece for piece in pieces if tensor_places(piece)]
    count, seconds = timed(partial(load_tensors, weights) if weights else partial(sequential, pieces))
    name = "safetensors, all tensors" if weights else "sequential read"
    return [_row(name, "cold, from the registry", count, seconds, None)]


def _row(pattern: str, state: str, count: int, seconds: float, local: float | None) -> dict[str, Any]:
    return {
        "pattern": pattern,
        "state": state,
        "bytes": count,
        "seconds": seconds,
        "local_seconds": local,
        "ratio": local / seconds if local is not None and seconds else None,
    }


def _figure(row: dict[str, Any], key: str) -> str:
    seconds = row[key]
    if seconds is None:
        return "-"
    if row["bytes"] < 1 << 20:
        return f"{seconds:.3f} s"
    return f"{size(int(row['bytes'] / max(seconds, 1e-9)))}/s"


def _copy(pieces: Sequence[Piece], directory: Path) -> list[Piece]:
    """Copy the pieces to the local disk and bring them to it."""
    needed = sum(piece.size for piece in pieces)
    free = shutil.disk_usage(directory).free
    if free < needed + (64 << 20):
        raise UsageError(
            f"the copy to compare with takes {size(needed)}, {directory.parent} has {size(free)}; use --local or --size"
        )
    copies = []
    for number, piece in enumerate(pieces):
        target = directory / f"{number}"
        with open(piece.path, "rb") as source, open(target, "wb") as file:
            left = piece.size
            while left and (data := source.read(min(left, 4 << 20))):
                file.write(data)
                left -= len(data)
            file.flush()
            os.fsync(file.fileno())
        copies.append(Piece(str(target), piece.size))
    return copies


@contextmanager
def _own_mount(ref: str, directory: Path) -> Iterator[tuple[str, str, float]]:
    """Mount an image with a cache of its own; yield where, the cache and when the mount was asked for. Both go at the end."""
    cache, top = directory / "cache", directory / "mnt"
    top.mkdir()
    _rafs("status", "--cache-dir", str(cache))  # not measured: the first start of a command reads it from the disk
    started = time.perf_counter()
    try:
        _rafs("mount", ref, str(top), "--cache-dir", str(cache))
        yield str(top), str(cache), started
    finally:
        for arguments in (
            ("umount", str(top), "--cache-dir", str(cache)),
            ("daemon", "--stop", "--cache-dir", str(cache)),
        ):
            subprocess.run(
                [sys.executable, "-m", "rafsfs", *arguments], capture_output=True, check=False, timeout=_MOUNT_S
            )


def _rafs(*arguments: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "rafsfs", *arguments], capture_output=True, text=True, check=False, timeout=_MOUNT_S
    )
    if result.returncode:
        raise MountError(result.stderr.strip().removeprefix("rafs: ") or f"rafs {arguments[0]} failed")


def _first_byte(top: str, started: float) -> float:
    piece = choose(top, 1)[0]
    with open(piece.path, "rb", buffering=0) as file:
        file.read(1)
    return time.perf_counter() - started
