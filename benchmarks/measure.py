"""How benchmarks measure: interleaved rounds, medians, ratios, and caches dropped by name.

Rule: ours and its baseline run in turn, in the same process conditions, on the same data, so that a machine which slows
down for a while slows both. What is dropped from the page cache is dropped file by file (posix_fadvise DONTNEED after a
sync), never the whole machine's.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MIB: Final = 1 << 20
_READ: Final = 1 << 20
"""Bytes per read call of every reader here."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result: a figure, what it is measured against, and what it should reach."""

    question: str
    ours: str
    baseline: str
    ratio: float | None
    target: str
    met: bool | None
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return the columns as text."""
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f}"
        met = {True: "yes", False: "NO", None: "-"}[self.met]
        return self.question, self.ours, self.baseline, ratio, self.target, met, self.note


HEADINGS: Final = ("what", "ours", "baseline", "ratio", "target", "met", "note")


def table(rows: Iterable[Row]) -> str:
    """Return rows as a Markdown table."""
    lines = [HEADINGS, tuple("---" for _ in HEADINGS), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def interleave(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every contestant once per round, in an order that turns; return the seconds each one reports."""
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds[name].append(contestants[name]())
    return seconds


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> str:
    """Return smallest and largest of a set of seconds, as text."""
    return f"{min(values):.3g}-{max(values):.3g} s"


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that `action` takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def busy_s() -> float:
    """Return the seconds that the machine's processors have worked since it started, all of them together."""
    user, nice, system, _, _, irq, softirq = (int(word) for word in Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def rate(size: int, seconds: float) -> str:
    """Return a throughput as text."""
    return f"{size / seconds / 1e6:.0f} MB/s"


def files_below(directory: Path) -> list[Path]:
    """Return the regular files below a directory, in order of name."""
    return sorted(path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def read_all(paths: Iterable[Path]) -> int:
    """Read files from start to end into one buffer, 1 MiB at a time; return the bytes."""
    buffer = memoryview(bytearray(_READ))
    total = 0
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            while got := os.readv(fd, [buffer]):
                total += got
        finally:
            os.close(fd)
    return total


def drop(paths: Iterable[Path]) -> None:
    """Drop the pages of these files from the page cache of the file systems that the paths name."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def settle() -> None:
    """Write out what is dirty, so that nobody pays for somebody else's writes and clean pages can be dropped."""
    os.sync()


def machine() -> str:
    """Return one line on this machine."""
    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = int(Path("/proc/meminfo").read_text().split()[1]) // (1 << 20)
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} x {model}, {memory} GiB, Linux {platform.release()}, Python {platform.python_version()}, "
        f"load before the run {load:.1f}"
    )


def commit() -> str:
    """Return the commit that is measured, `unknown` outside a repository."""
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or "unknown"
