"""Kills of every process of a node, under readers, in each mode: `python -m tests.soak.kills --mode lazy --kills 200 --seed 1`.

Each round mounts a cold cache behind a slow registry, so that kills meet reads that miss; readers compare every byte, by read and by mmap.
After each kill the node must come back by itself (where docs/mounts.md says that a command is needed, one is run). Never killed
together: all three of kernel mode, whose result is documented and tested apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.wire import wire_to
from tests.support.processes import Node, is_alive, read_within, running_node, wait_for
from tests.support.registry import running_registry

_READER = Path(__file__).with_name("reader.py")
_MIB = 1 << 20
FILES = {"first.bin": 24 * _MIB, "second.bin": 12 * _MIB}
UNREAD = {"unread.bin": 2 * _MIB}
"""Never read, so that the image stays incomplete and the mode what it is."""
RATE = 8e6
PER_ROUND = 10
BACK_S = 30.0
VICTIMS = {
    "fuse": [("daemon",), ("worker",), ("daemon", "worker"), ("worker", "daemon")],
    "erofs": [("daemon",)],
    "lazy": [
        ("daemon",), ("worker",), ("holder",), ("daemon", "worker"), ("worker", "daemon"), ("holder", "worker"), ("worker", "holder"),
        ("daemon", "holder"), ("holder", "daemon"), ("worker", "holder", "daemon"), ("daemon", "holder", "worker"),
    ],
    "kernel": [
        ("daemon",), ("worker",), ("holder",), ("daemon", "worker"), ("worker", "daemon"), ("holder", "worker"), ("worker", "holder"),
        ("daemon", "holder"), ("holder", "daemon"),
    ],
}  # fmt: skip
NAMES = {"daemon": "rafsfs daemon", "worker": ".worker", "holder": "holder.py"}


@dataclass
class Report:
    """What came of it."""

    kills: int = 0
    by_victims: Counter[str] = field(default_factory=Counter)
    reads: int = 0
    errors: int = 0
    """Reads or opens that failed with an errno."""
    sigbus: int = 0
    errors_where_none_may_be: int = 0
    longest_stall_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


class _Readers:
    """Readers of a mount, started again when a SIGBUS ends one."""

    def __init__(self, source: Path, mounted: Path, seed: int, report: Report) -> None:
        self._report = report
        self._jobs = [
            (str(source / name), str(mounted / name), str(seed * 10 + number), way)
            for number, (name, way) in enumerate((n, w) for n in FILES for w in ("read", "mmap"))
        ]
        self._running = [self._start(job) for job in self._jobs]
        self._seen = [{"reads": 0, "errors": 0, "longest_s": 0.0} for _ in self._jobs]

    def _start(self, job: tuple[str, ...]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-S", str(_READER), *job], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def look(self) -> None:
        for number, reader in enumerate(self._running):
            if reader.poll() is None:
                continue
            out, said = reader.communicate()
            self._count(number, out)
            if reader.returncode == -signal.SIGBUS:
                self._report.sigbus += 1
            else:
                self._report.wrong.append(f"{self._jobs[number]}: {reader.returncode} {said.strip()}")
            self._running[number] = self._start(self._jobs[number])

    def _count(self, number: int, out: str) -> None:
        for line in out.splitlines()[-1:]:
            with contextlib.suppress(ValueError):
                last = json.loads(line)
                self._report.reads += last["reads"]
                self._report.errors += last["errors"]
                self._report.longest_stall_s = max(self._report.longest_stall_s, last["longest_s"])

    def end(self) -> None:
        self.look()
        for number, reader in enumerate(self._running):
            reader.kill()
            out, _ = reader.communicate(timeout=20)
            self._count(number, out)


def _pids(node: Node, role: str) -> list[int]:
    if role == "worker":
        return node.worker_pids()
    return node.processes(NAMES[role])


def _whole(node: Node, mode: str, rng: random.Random) -> None:
    """Wait until the node is as it should be; run a command if it does not come to be so by itself."""
    roles = {"fuse": ("daemon", "worker"), "erofs": ("daemon",)}.get(mode, ("daemon", "worker", "holder"))
    end = time.monotonic() + BACK_S
    asked_at = time.monotonic() + 3.0
    while not all(_pids(node, role) for role in roles):
        if time.monotonic() > end:
            raise TimeoutError(
                f"{mode}: not back within {BACK_S:g} s: { {r: _pids(node, r) for r in roles} }\n{node.log()}"
            )
        if time.monotonic() > asked_at:
            node.run("status", timeout_s=BACK_S)
            asked_at = time.monotonic() + 5.0
        time.sleep(0.02)
    if mode in {"lazy", "kernel"}:
        # A copy of every descriptor is with holder and daemon again: `status` waits for what was taken over.
        node.run("status", timeout_s=BACK_S)
        time.sleep(0.3)


def _rounds(mode: str, kills: int, seed: int, home: Path, report: Report) -> None:
    rng = random.Random(seed)
    source = home / "source"
    source.mkdir()
    for name, size in {**FILES, **UNREAD}.items():
        (source / name).write_bytes(rng.randbytes(size))
    with running_registry(home / "registry") as registry, wire_to(registry.port, bytes_per_s=RATE) as wire:
        direct, slow = f"localhost:{registry.port}/soak/image:v1", f"localhost:{wire.port}/soak/image:v1"
        with running_node(home / "builder") as builder:
            builder.build(source, direct)
        number = 0
        while report.kills < kills and not report.wrong:
            number += 1
            with running_node(home / f"round{number}") as node:
                if mode == "erofs":
                    node.rafs("pull", direct, timeout_s=120)
                    mounted = node.mount(direct, "mnt", "--mode", "erofs")
                else:
                    mounted = node.mount(slow, "mnt", "--mode", mode, "--deadline", "30")
                readers = _Readers(source, mounted, seed * 1000 + number, report)
                try:
                    for _ in range(min(PER_ROUND, kills - report.kills)):
                        _kill_some(node, mode, rng, report, readers)
                    readers.look()
                finally:
                    readers.end()
                for name, size in FILES.items():
                    got = wait_for(lambda p=mounted / name, s=size: _read_or_none(p, s), f"{name} can be read", 60)  # type: ignore[misc]
                    if got != (source / name).read_bytes():
                        report.wrong.append(f"round {number}: {name} differs at the end")
                node.rafs("umount", mounted, "--lazy")
                if "Traceback" in node.log() or "BREACH" in node.log():
                    report.wrong.append(f"round {number}: {node.log()[-4000:]}")


def _read_or_none(path: Path, size: int) -> bytes | None:
    """Read a file; None while the mount is on its way back, which by pyfuse3 takes it out of the tree for a moment."""
    try:
        return read_within(path, 0, size, 60)
    except OSError:
        return None


def _kill_some(node: Node, mode: str, rng: random.Random, report: Report, readers: _Readers) -> None:
    victims = rng.choice(VICTIMS[mode])
    time.sleep(rng.uniform(0.02, 0.5))
    pause = rng.choice((0.0, 0.0, 0.01, 0.05))
    killed = []
    for role in victims:
        for pid in _pids(node, role):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        time.sleep(pause)
    for pid in killed:
        wait_for(lambda pid=pid: not is_alive(pid), f"{victims} end")  # type: ignore[misc]
    print(f"{time.strftime('%H:%M:%S')} {report.kills + 1} killed {'+'.join(victims)} {killed}", file=sys.stderr)
    report.kills += 1
    report.by_victims["+".join(victims)] += 1
    readers.look()
    _whole(node, mode, rng)


def soak(mode: str, kills: int, seed: int, home: Path) -> Report:
    """Kill until `kills` are done or a byte was wrong; return what came of it."""
    report = Report()
    _rounds(mode, kills, seed, home, report)
    return report


@contextlib.contextmanager
def _home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rafs-soak-", ignore_cleanup_errors=True) as home:
        yield Path(home)


def main() -> int:
    """Run a soak from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=sorted(VICTIMS), required=True)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()
    with _home() as home:
        report = soak(options.mode, options.kills, options.seed, home)
    print(
        json.dumps(
            {**vars(report), "mode": options.mode, "seed": options.seed, "seconds": round(time.monotonic() - started)}
        )
    )
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
