"""What do `stat` and `ls -lR` of 10,000 files cost through a mount against the local disk?

Two looks at each. First: names and attributes are in no cache of the kernel, neither ours nor the baseline's: a fresh mount of ours, and an
ext4 of the same files in a file (mkfs.ext4 -d, loop device), whose pages are dropped before it is mounted. Again: both have been looked at
just before. In the mode `auto` and in those that `rafs mount --mode` names; ratios are files per second, ours ÷ ext4.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.trees import make_flat

from .measure import Row, drop, interleave, median, settle, spread, timed
from .setting import Setting

FILES = 10_000
_MODES = ("auto", "fuse")
_TARGET = {"erofs": 0.8}
"""By what the mount turns out to be; the image is small files, which lie in its metadata, so it is complete from the start."""


def stat_all(paths: list[str]) -> None:
    """Call lstat for every path."""
    for path in paths:
        os.lstat(path)


def list_all(directory: Path) -> None:
    """Run `ls -lR`."""
    subprocess.run(["ls", "-lR", directory], check=True, stdout=subprocess.DEVNULL)


def make_ext4(source: Path, image: Path) -> None:
    """Make an ext4 file system of a directory."""
    with image.open("wb") as file:
        file.truncate(256 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-N", str(4 * FILES), "-d", source, image], check=True, capture_output=True)
    settle()


@contextlib.contextmanager
def fresh_ext4(image: Path, top: Path) -> Iterator[Path]:
    """Mount it, with nothing of it in the page cache."""
    drop([image])
    top.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop,ro", image, top], check=True)
    try:
        yield top
    finally:
        subprocess.run(["umount", top], check=True)


def run(setting: Setting) -> list[Row]:
    """Measure."""
    source = setting.fresh("files")
    make_flat(source, FILES, 1_000)
    image = setting.fresh("ext4")
    make_ext4(source, image)
    ref = f"oci:{setting.fresh('layout')}:files"
    with setting.node() as node:
        node.build(source, ref)
    names = [os.path.join(f"d{number % 100:02d}", f"file-{number:06d}") for number in range(FILES)]

    def work(what: str, top: Path) -> float:
        if what == "stat":
            paths = [os.path.join(top, name) for name in names]
            return timed(lambda: stat_all(paths))
        return timed(lambda: list_all(top))

    rows: list[Row] = []
    for mode in _MODES:
        for what in ("stat", "ls -lR"):
            again: dict[str, list[float]] = {"ours": [], "ext4": []}
            state = ""

            def ours(what: str = what, mode: str = mode, again: dict[str, list[float]] = again) -> float:
                nonlocal state
                with setting.node() as node:
                    top = node.mount(ref, "mnt", "--mode", mode)
                    state = node.mount_status(top)["mode"]
                    first = work(what, top)
                    again["ours"].append(work(what, top))
                    return first

            def ext4(what: str = what, again: dict[str, list[float]] = again) -> float:
                with fresh_ext4(image, setting.directory / "ext4-mounted") as top:
                    first = work(what, top)
                    again["ext4"].append(work(what, top))
                    return first

            first = interleave({"ours": ours, "ext4": ext4}, setting.rounds)
            for look, seconds in (("first", first), ("again", again)):
                mine, base = median(seconds["ours"]), median(seconds["ext4"])
                target = _TARGET.get(state)
                rows.append(
                    Row(
                        f"[{mode} = {state}] {what} of {FILES:,} files, {look}",
                        f"{mine:.3f} s ({FILES / mine:,.0f}/s)",
                        f"ext4 {base:.3f} s ({FILES / base:,.0f}/s)",
                        base / mine,
                        "-" if target is None else f">= {target:g}",
                        None if target is None else base / mine >= target,
                        f"ours {spread(seconds['ours'])}, ext4 {spread(seconds['ext4'])}",
                    )
                )
    return rows
