"""What does reading cached data through a mount cost against the same files on the local disk?

Three states, ours and local in turn. Warm: everything in the page cache. FUSE cold: the pages of the mount's files are
dropped, those of the cache's data files are not: what FUSE itself costs; the local file has its pages. Disk cold: the
pages of the mount's files, of the cache's data files and of the local files are dropped, all by posix_fadvise DONTNEED
after a sync. Below the guest there may be another cache, the host's, for both alike.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from .measure import Row, drop, files_below, interleave, median, rate, read_all, settle, spread, timed
from .setting import Setting


def touch_all(paths: list[Path]) -> None:
    """Read one byte of every page of the files through mmap, as a loader of weights does."""
    for path in paths:
        size = path.stat().st_size
        if not size:
            continue
        fd = os.open(path, os.O_RDONLY)
        try:
            with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapped:
                mapped[::4096]
        finally:
            os.close(fd)


def run(setting: Setting) -> list[Row]:
    """Measure."""
    local = setting.fresh("local")
    shutil.copytree(setting.weights, local)
    size = setting.weights_bytes
    rows: list[Row] = []
    with setting.node() as node:
        mounted = files_below(node.mount(setting.weights_ref))
        here = files_below(local)
        read_all(mounted)
        read_all(here)
        settle()
        data = list(node.cache.glob("spaces/*/data"))

        def nothing() -> None:
            """Leave the caches as they are."""

        states: list[tuple[str, Callable[[], None], Callable[[], None], str, float | None]] = [
            ("warm", nothing, nothing, ">= 0.95", 0.95),
            ("FUSE cold, data files warm", lambda: drop(mounted), nothing, "-", None),
            ("disk cold", lambda: drop([*mounted, *data]), lambda: drop(here), ">= 0.6", 0.6),
        ]
        for name, before_ours, before_local, target, least in states:
            for how, read in (("read", read_all), ("mmap touch", touch_all)):

                def ours(before: Callable[[], None] = before_ours, read: Callable[..., object] = read) -> float:
                    before()
                    return timed(lambda: read(mounted))

                def disk(before: Callable[[], None] = before_local, read: Callable[..., object] = read) -> float:
                    before()
                    return timed(lambda: read(here))

                ours(nothing)
                disk(nothing)
                seconds = interleave({"ours": ours, "local": disk}, setting.rounds + 2)
                mine, theirs = median(seconds["ours"]), median(seconds["local"])
                judged = least if how == "read" else None
                rows.append(
                    Row(
                        f"cached, {name}, {how}, {size / 1e6:.0f} MB",
                        rate(size, mine),
                        f"local disk {rate(size, theirs)}",
                        theirs / mine,
                        target if judged else "-",
                        None if judged is None else theirs / mine >= judged,
                        f"ours {spread(seconds['ours'])}, local {spread(seconds['local'])}",
                    )
                )
    return rows
