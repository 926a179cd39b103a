"""What do `stat` and `ls -lR` of 10,000 files cost through a mount against the local disk?

First look: a fresh mount, nothing in the kernel's caches; again: the kernel has all names and attributes. The local disk is
always measured with its names and attributes in the kernel's caches, the hardest baseline there is.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support.trees import make_flat

from .measure import Row, interleave, median, spread, timed
from .setting import Setting

FILES = 10_000


def stat_all(paths: list[str]) -> None:
    """Call lstat for every path."""
    for path in paths:
        os.lstat(path)


def list_all(directory: Path) -> None:
    """Run `ls -lR`."""
    subprocess.run(["ls", "-lR", directory], check=True, stdout=subprocess.DEVNULL)


def run(setting: Setting) -> list[Row]:
    """Measure."""
    local = setting.fresh("files")
    make_flat(local, FILES, 1_000)
    ref = f"oci:{setting.fresh('layout')}:files"
    with setting.node() as node:
        node.build(local, ref)
    names = [os.path.join(f"d{number % 100:02d}", f"file-{number:06d}") for number in range(FILES)]
    rows: list[Row] = []
    for what in ("stat", "ls -lR"):
        seconds: dict[str, list[float]] = {"first": [], "again": [], "local": []}

        def work(top: Path, what: str = what) -> float:
            if what == "stat":
                paths = [os.path.join(top, name) for name in names]
                return timed(lambda: stat_all(paths))
            return timed(lambda: list_all(top))

        def fresh_mount(seconds: dict[str, list[float]] = seconds) -> float:
            with setting.node() as node:
                top = node.mount(ref)
                first = work(top)
                seconds["again"].append(work(top))
                return first

        work(local)
        found = interleave({"first": fresh_mount, "local": lambda: work(local)}, setting.rounds)
        seconds |= found
        base = median(seconds["local"])
        rows.extend(
            Row(
                f"{what} of {FILES:,} files, {name}",
                f"{median(seconds[name]):.3f} s ({FILES / median(seconds[name]):,.0f}/s)",
                f"local disk {base:.3f} s ({FILES / base:,.0f}/s)",
                median(seconds[name]) / base,
                "-",
                None,
                spread(seconds[name]),
            )
            for name in ("first", "again")
        )
    return rows
