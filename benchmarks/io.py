"""The data path, `python -m benchmarks.io` (`make bench-io`). Ratios are ours ÷ the baseline's throughput, but where a row says time.

Each mode of mount that this version has is asked for by name (`rafs mount --mode`), and its rows say so. A round runs ours and the
baseline in turn; medians of at least five rounds. Baselines: the same bytes on the local disk (ext4 on the machine of results.md),
read by the same pattern of cli/patterns.py; for cold loads, fetching and decoding the same blobs without a mount (cold_load.py).
"Cold" drops the pages of the mount's files, of the cache's data files and of the local copy, by posix_fadvise after a sync; the host
below may have a cache of its own. Cold loads have the memory that they fill at hand (`ballast.py`), and so have their baselines; what else
is free is held meanwhile, also while present data is read.
What 10,000 files cost is asked by metadata.py; `names` runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from cli.patterns import Piece, drop, faults, parallel, sequential, tensor_places
from tests.support.models import cast_file, directory_bytes, published_model, widen_file
from tests.support.processes import Node

from . import cold_load, metadata
from .ballast import rest
from .cold_load import COPIES, at_hand, copy_range, pieces_of
from .measure import Row, commit, interleave, machine, median, rate, settle, spread, table, timed
from .setting import Setting

_MODES = ("auto", "erofs", "lazy", "fuse", "kernel")
_PARTS = ("present", "names", "cold", "line", "storm")
_LAZY = ("lazy", "kernel")
"""Modes that become plain EROFS when the image is complete."""
_JUST_PULLED, _INCOMPLETE, _AGAIN = ", mounted just after the pull", ", incomplete", ", incomplete, mounted again"
_STORM_PROCESSES = 8
_TARGET = {"kernel": 0.9, "erofs": 0.95}
"""Page cache cold, by mode; 0.6 where a process of ours is in the path."""
_PRESENT_ROUNDS = 11
"""A run takes a fifth of a second, and now and then one takes three times as long, of either side."""
_BLOCK = 4 << 20


def modes_of_this_version() -> list[str]:
    """Return the modes that `rafs mount --mode` names."""
    text = subprocess.run(
        [sys.executable, "-m", "rafsfs", "mount", "--help"], capture_output=True, text=True, check=True
    ).stdout
    named = text[text.index("--mode") :].partition("]")[0]
    return [mode for mode in _MODES if mode in named]


class Present:
    """A mount of which all that is read is here, and a copy on the local disk."""

    def __init__(self, setting: Setting, node: Node, mode: str, local: Path, ref: str, label: str) -> None:
        top = node.mount(ref, f"mnt-{mode}", "--mode", mode)
        self.ours = pieces_of(top)
        self.local = pieces_of(local)
        sequential(self.ours)
        self.state = node.mount_status(top)["mode"]
        self.label = f"{mode} = {self.state}{label}"
        self.data = data_of(node)
        self.rounds = max(_PRESENT_ROUNDS, setting.rounds)
        settle()

    def compare(self, name: str, pattern: Callable[[Sequence[Piece]], int], target: float, *, cold: bool) -> Row:
        """Time a pattern on the mount and on the local copy."""
        size = 0

        def run(pieces: list[Piece], more: list[str]) -> float:
            nonlocal size
            drop([piece.path for piece in pieces] + more)
            if not cold:  # filled from start to end each time: how fast a cache is depends on how its pages came
                pattern(pieces)
            return timed(lambda: size_of(pattern(pieces)))

        def size_of(count: int) -> None:
            nonlocal size
            size = count

        contestants = {"ours": partial(run, self.ours, self.data), "local": partial(run, self.local, [])}
        try:
            for first in contestants.values():  # not measured: it finds memory that the machine's host had taken back
                first()
            seconds = interleave(contestants, self.rounds)
        except OSError as error:  # O_DIRECT on the kernel's EROFS
            return Row(f"[{self.label}] {name}", "-", "-", None, "-", None, str(error.strerror))
        ours, local = median(seconds["ours"]), median(seconds["local"])
        return Row(
            f"[{self.label}] {'page cache cold' if cold else 'warm'}, {name}",
            rate(size, ours),
            f"local disk {rate(size, local)}",
            local / ours,
            f">= {target:g}",
            local / ours >= target,
            f"ours {spread(seconds['ours'])}, local {spread(seconds['local'])}",
        )


def present_rows(setting: Setting) -> list[Row]:
    """Data that are on the node, in each mode: of an image that was pulled before and is not in memory; for EROFS also of one that has just
    been pulled; in lazy and kernel mode also of one that stays incomplete, and of that one mounted again later.
    """
    local = setting.fresh("local")
    shutil.copytree(setting.weights, local)
    settle()
    refs = {"": setting.weights_ref, _JUST_PULLED: setting.weights_ref}
    modes = [mode for mode in modes_of_this_version() if mode in (setting.modes or _MODES)]
    cases = [(mode, "") for mode in modes]
    cases += [
        *((mode, _JUST_PULLED) for mode in modes if mode == "erofs"),
        *((mode, case) for mode in modes if mode in _LAZY for case in (_INCOMPLETE, _AGAIN)),
    ]
    with rest(COPIES * sum(piece.size for piece in pieces_of(local))):
        return [
            row
            for mode, case in cases
            for row in rows_of_mode(setting, mode, case, local, refs.get(case, setting.partly_read_ref))
        ]


def rows_of_mode(setting: Setting, mode: str, case: str, local: Path, ref: str) -> list[Row]:
    """Data that are on the node, in one mode."""
    rows: list[Row] = []
    with setting.node() as node:
        try:
            if case == _AGAIN:
                first = node.mount(ref, "first", "--mode", mode)
                sequential(pieces_of(first))
                node.rafs("umount", str(first))
            elif case != _INCOMPLETE:
                node.rafs("pull", ref, timeout_s=300)
            if case in ("", _AGAIN):
                settle()
                drop(data_of(node))
            present = Present(setting, node, mode, local, ref, case)
        except Exception as error:  # noqa: BLE001 - a mode that this machine lacks is one row
            return [Row(f"[{mode}{case}]", "-", "-", None, "-", None, str(error).splitlines()[-1][:120])]
        target = _TARGET.get(present.state, 0.6)
        rows += [
            present.compare("sequential", sequential, target, cold=True),
            present.compare("parallel pread, 8 x 4 MiB", partial(parallel, threads=8, block=_BLOCK), target, cold=True),
            present.compare(
                "2000 random pages by mmap",
                partial(faults, count=2000),
                0.8 if present.state == "erofs" else target,
                cold=True,
            ),
            present.compare("sequential", sequential, 0.95, cold=False),
        ]
        for threads in (1, 4, 16, 32):
            rows.append(
                present.compare(
                    f"O_DIRECT, {threads} threads of 16 MiB",
                    partial(parallel, threads=threads, block=16 << 20, direct=True),
                    0.6,
                    cold=True,
                )
            )
            if rows[-1].ratio is None:  # refused: for one thread or many
                break
    return rows


def data_of(node: Node) -> list[str]:
    """Return the data files of a node's cache."""
    return [str(path) for path in node.cache.glob("spaces/*/data")]


def touch_tensors(path: str, places: list[tuple[int, int]]) -> None:
    """Touch every page of some tensors through a mapping; runs in a process of its own."""
    import mmap  # noqa: PLC0415 - in the child

    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        for first, stop in places:
            mapped[first:stop:4096]


def read_tensors(path: str, places: list[tuple[int, int]]) -> None:
    """Read some tensors by preads; runs in a process of its own."""
    for first, stop in places:
        copy_range(path, first, stop)


def storm_rows(setting: Setting) -> list[Row]:
    """Processes that fault random tensors of a cold model of 1 GiB, against preads of the same; and what one tensor of ten costs."""
    source = setting.fresh("storm")
    source.mkdir()
    count = 2 if setting.quick else 12
    for number in range(count):
        cast_file(
            published_model() / "model.safetensors", source / f"m{number:02}.safetensors", "F32", scale=1 + number / 7
        )
    ref = f"localhost:{setting.registry.port}/bench/storm:v1"
    with setting.node() as node:
        node.build(source, ref, timeout_s=600)
    size = 0

    def storm(action: Callable[[str, list[tuple[int, int]]], None]) -> float:
        nonlocal size
        settle()
        with setting.node() as node:
            pieces = pieces_of(node.mount(ref))
            work = []
            for number in range(_STORM_PROCESSES):
                piece = pieces[number % len(pieces)]
                places = [place for place in tensor_places(piece) if place[1] - place[0] >= 1 << 19]
                random.Random(number).shuffle(places)
                work.append((piece.path, places))
            size = sum(stop - first for _, places in work for first, stop in places)
            context = multiprocessing.get_context("spawn")
            with context.Pool(_STORM_PROCESSES) as pool:
                pool.starmap(read_tensors, [(path, []) for path, _ in work])  # starts the processes before the clock
                with at_hand(size):
                    return timed(lambda: pool.starmap(action, work, 1))

    seconds = interleave(
        {"faults": partial(storm, touch_tensors), "preads": partial(storm, read_tensors)}, max(5, setting.rounds)
    )
    ours, base = median(seconds["faults"]), median(seconds["preads"])
    rows = [
        Row(
            f"page-fault storm, {_STORM_PROCESSES} processes, random tensors, cold",
            rate(size, ours),
            f"parallel pread {rate(size, base)}",
            base / ours,
            ">= 0.7",
            base / ours >= 0.7,
            f"faults {spread(seconds['faults'])}, preads {spread(seconds['preads'])}",
        )
    ]
    return [*rows, tenth_row(setting, ref, "a model of small tensors, 0.6 to 47 MB"), large_tenth_row(setting, count)]


def large_tenth_row(setting: Setting, times: int) -> Row:
    """Return what one tensor of ten costs of one file whose tensors are as long as those of models of billions of parameters."""
    source = setting.fresh("wide")
    source.mkdir()
    widen_file(published_model() / "model.safetensors", source / "model.safetensors", times)
    ref = f"localhost:{setting.registry.port}/bench/wide:v1"
    with setting.node() as node:
        node.build(source, ref, timeout_s=600)
    return tenth_row(
        setting, ref, f"a model of {directory_bytes(source) / 1e9:.2f} GB, its tensors {times} times as long"
    )


def tenth_row(setting: Setting, ref: str, label: str) -> Row:
    """Return what is fetched for one tensor of every tenth."""
    with setting.node() as node:
        mount = node.mount(ref)
        read = sum(tenth(piece) for piece in pieces_of(mount))
        node.status()
        fetched = node.mount_status(mount)["sources"]["origin"]
    return Row(
        f"{label}: bytes fetched ÷ bytes read, one tensor of every tenth of those of 512 KiB and more",
        f"{fetched / 1e6:.1f} MB",
        f"{read / 1e6:.1f} MB",
        fetched / read,
        "<= 1.3",
        fetched / read <= 1.3,
    )


def tenth(piece: Piece) -> int:
    """Read one large tensor of every tenth of a file; return the bytes."""
    places = [place for place in tensor_places(piece) if place[1] - place[0] >= 1 << 19][::10]
    for first, stop in places:
        copy_range(piece.path, first, stop)
    return sum(stop - first for first, stop in places)


def main() -> int:
    """Run; return 0 when everything ran, whether or not targets are met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.io", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less data")
    parser.add_argument("--only", nargs="+", choices=_PARTS, default=_PARTS)
    parser.add_argument("--dir", type=Path, help="work on this disk (default: the temporary directory)")
    parser.add_argument("--modes", nargs="+", choices=_MODES, default=(), help="present data in these modes alone")
    arguments = parser.parse_args()
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {commit()}", machine(), sep="\n", flush=True)
    parts: dict[str, Callable[[Setting], list[Row]]] = {
        "present": present_rows,
        "names": metadata.run,
        "cold": lambda setting: cold_load.on_loopback(setting, loaded),
        "line": lambda setting: cold_load.behind_a_line(setting, loaded[:1]),
        "storm": storm_rows,
    }
    loaded = [mode for mode in modes_of_this_version() if mode in {"auto", "fuse"}]
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="rafs-bench-", dir=arguments.dir))
        setting = Setting(Path(directory), stack, quick=arguments.quick, modes=arguments.modes)
        for name in arguments.only:
            print(f"... {name}", file=sys.stderr, flush=True)
            rows += parts[name](setting)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
