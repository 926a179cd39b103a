"""Kills of every process of a node, under readers, in each mode: `python -m tests.soak.kills --mode lazy --kills 200 --seed 1`.

Each round mounts a cold cache behind a slow registry, so that kills meet reads that miss, beside one file that is fetched first, whose
readers wait for nobody but our processes: their longest read over a kill is its *stall*. Readers compare every byte. After each kill the
node must come back by itself (where docs/mounts.md says that a command is needed, one is run), and errors may come only over kills
for which docs/mounts.md names them. Never killed together: all three of kernel mode, whose result is documented and tested apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

import trio

from rafsfs.daemon.connection import open_connection
from rafsfs.erofs.generation import from_record
from rafsfs.errors import DaemonError
from tests.e2e.wire import wire_to
from tests.support.processes import Node, is_alive, read_within, running_node, wait_for
from tests.support.registry import running_registry

from .readers import Job, Readers, Seen

_MIB = 1 << 20
FILES = {"first.bin": 12 * _MIB, "second.bin": 6 * _MIB}
PRESENT = {"present.bin": 4 * _MIB}
"""Read before the kills begin."""
UNREAD = {"unread.bin": 2 * _MIB}
"""Never read. What is fetched ahead of readers may bring it all the same: the image is complete then, its mount a plain one, and the
round over."""
RATE = 1.5e6
"""Bytes a second from the registry: the files take as long as a round."""
FULL = 1e12
"""Before the kills of a round and after them."""
CHUNK = "256KiB"
PER_ROUND = 10
CALM = 0.7
"""Of the kills, how many wait for readers to go on before the next one; the others may come upon a successor that takes over."""
BACK_S = 30.0
COMMAND_S = 0.5
"""Before a command is run, where one is needed."""
VICTIMS: Final[dict[str, list[tuple[str, ...]]]] = {
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
NAMES = {"daemon": "rafsfs daemon", "holder": "holder.py"}


def comes_back_by_itself(mode: str, victims: set[str]) -> bool:
    """Tell whether no command is needed after these deaths: the holder, or else a live daemon, sees to it (docs/mounts.md)."""
    return mode in {"lazy", "kernel"} and not victims >= {"holder", "daemon"}


def may_fail(mode: str, victims: set[str]) -> bool:
    """Tell whether docs/mounts.md names errors for these deaths."""
    return {
        "fuse": "worker" in victims,
        "erofs": False,
        "lazy": victims == {"worker", "holder", "daemon"},
        "kernel": "worker" in victims,
    }[mode]


@dataclass
class Kill:
    """One kill: who, from when until the node was whole again."""

    victims: tuple[str, ...]
    started: float
    whole: float = 0.0
    is_calm: bool = True
    """Whether nobody was killed again before the readers went on; its stall is then its own."""


@dataclass
class Report:
    """What came of it."""

    kills: list[Kill] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    wrong: list[str] = field(default_factory=list)

    def misplaced(self, mode: str) -> list[str]:
        """Return the errors where none may be: of operations over no kill that may cause them."""
        allowed = [kill for kill in self.kills if may_fail(mode, set(kill.victims))]
        return [
            f"{one.job.way} of {one.job.mounted.name} at {one.started:.3f} for {one.seconds:.3f} s: errno {one.errno}"
            for one in self.seen.operations
            if one.errno and not any(one.overlaps(kill.started, kill.whole) for kill in allowed)
        ]

    def stalls(self, *, present: bool) -> dict[str, list[float]]:
        """Return for each kind of kill the longest operation over each; `present`: of files that are on the node."""
        found: dict[str, list[float]] = {}
        for number, kill in enumerate(self.kills):
            if not kill.is_calm or (number and not self.kills[number - 1].is_calm):
                continue
            over = [
                one.seconds
                for one in self.seen.operations
                if one.job.is_present == present and one.overlaps(kill.started, kill.whole)
            ]
            found.setdefault("+".join(kill.victims), []).append(max(over, default=0.0))
        return found

    def summary(self, mode: str) -> dict[str, Any]:
        """Return the sums."""
        stalls = self.stalls(present=True)
        misplaced = self.misplaced(mode)
        every = [value for values in stalls.values() for value in values]
        missing = [value for values in self.stalls(present=False).values() for value in values]
        back = [kill.whole - kill.started for kill in self.kills]
        return {
            "mode": mode,
            "kills": len(self.kills),
            "by_victims": Counter("+".join(kill.victims) for kill in self.kills),
            "reads": self.seen.reads,
            "wrong": [*self.wrong, *self.seen.wrong],
            "errors": sum(one.errno > 0 for one in self.seen.operations),
            "sigbus": sum(one.errno < 0 for one in self.seen.operations),
            "errors_where_none_may_be": len(misplaced),
            "first_misplaced": misplaced[:3],
            "stall_s": _spread(every),
            "stall_by_victims_s": {victims: _spread(values) for victims, values in sorted(stalls.items())},
            "stall_of_missing_s": _spread(missing),
            "whole_again_s": _spread(back),
        }


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"median": round(statistics.median(values), 3), "worst": round(max(values), 3)}


def _pids(node: Node, role: str) -> list[int]:
    return node.worker_pids() if role == "worker" else node.processes(NAMES[role])


def _wait_whole(node: Node, mode: str, readers: Readers, *, by_itself: bool, is_calm: bool) -> None:
    """Wait until the node is as it should be, `is_calm`: and a reader of what is present goes on. Raises TimeoutError."""
    roles = {"fuse": ("daemon", "worker"), "erofs": ("daemon",)}.get(mode, ("daemon", "worker", "holder"))
    end = time.monotonic() + BACK_S
    asked_at = time.monotonic() + COMMAND_S
    while not _is_plain(node, mode) and not (
        all(_pids(node, role) for role in roles)
        and _modes(node) is not None
        and (mode in {"fuse", "erofs"} or _is_held(node))
    ):
        if time.monotonic() > end:
            found = {role: _pids(node, role) for role in roles}
            raise TimeoutError(f"{mode}: not back within {BACK_S:g} s: {found}, held: {_held(node)}\n{node.log()}")
        if not by_itself and time.monotonic() > asked_at:
            node.run("status", timeout_s=BACK_S)
            asked_at = time.monotonic() + 5.0
        time.sleep(0.02)
    if is_calm:
        again = time.monotonic()
        wait_for(lambda: readers.have_read_present_since(again), f"readers go on\n{node.log()}", BACK_S)


def _modes(node: Node) -> set[str] | None:
    """Return the modes of the mounts once the daemon has taken over all of them and they are ready, else None."""

    async def ask() -> set[str] | None:
        found: dict[str, Any] = {"mounts": [{"state": "unknown"}]}
        try:
            with trio.move_on_after(1):
                async with open_connection(str(node.cache)) as connection:
                    found = await connection.call("status", {})
        except* DaemonError:  # killed between the greeting and the answer: the connection's tasks end with it
            pass
        is_ready = all(mount["state"] == "ready" for mount in found["mounts"])
        return {mount["mode"] for mount in found["mounts"]} if is_ready else None

    return trio.run(ask)


def _is_plain(node: Node, mode: str) -> bool:
    """Tell whether the image has become complete: the kernel serves it alone, and there is nobody left to kill but the daemon."""
    return mode in {"lazy", "kernel"} and _modes(node) == {"erofs"}


def _is_held(node: Node) -> bool:
    """Tell whether the holder has again what every generation on record needs."""
    wanted: set[str] = set()
    for path in node.mount_records():
        with contextlib.suppress(OSError, ValueError):
            spec = json.loads(path.read_bytes())
            for record in filter(None, map(from_record, spec["generations"])):
                wanted |= {*record.held_names(spec["id"]), record.pid_name(spec["id"]), *record.names}
    return bool(wanted) and wanted <= _held(node)


def _held(node: Node) -> set[str]:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
            line.settimeout(5)
            line.connect(str(node.cache / "holder.sock"))
            line.send(b"list")
            return set(line.recv(1 << 20).decode().split())
    except OSError:
        return set()


def _rounds(mode: str, kills: int, seed: int, home: Path, report: Report, until: float, log: TextIO | None) -> None:
    rng = random.Random(seed)
    source = home / "source"
    source.mkdir()
    for name, size in {**FILES, **PRESENT, **UNREAD}.items():
        (source / name).write_bytes(rng.randbytes(size))
    with running_registry(home / "registry") as registry, wire_to(registry.port, bytes_per_s=FULL) as wire:
        direct, slow = f"localhost:{registry.port}/soak/image:v1", f"localhost:{wire.port}/soak/image:v1"
        with running_node(home / "builder") as builder:
            builder.build(source, direct, "--chunking", "fixed", "--chunk-size", CHUNK)
        number = 0
        while len(report.kills) < kills and not report.wrong and not report.seen.wrong and time.monotonic() < until:
            number += 1
            place = home / f"round{number}"
            with running_node(place) as node:
                if mode == "erofs":
                    node.rafs("pull", direct, timeout_s=120)
                reference = direct if mode == "erofs" else slow
                mounted = node.mount(reference, "mnt", "--mode", mode, "--deadline", "30")
                for name, size in PRESENT.items():
                    read_within(mounted / name, 0, size, 60)
                wire.bytes_per_s = RATE
                jobs = [
                    Job(source / n, mounted / n, seed, w, is_present=False) for n in FILES for w in ("read", "mmap")
                ]
                jobs += [Job(source / name, mounted / name, seed, "drop", is_present=True) for name in PRESENT]
                readers = Readers(jobs, place, report.seen)
                try:
                    for _ in range(min(PER_ROUND, kills - len(report.kills))):
                        if _is_plain(node, mode):
                            print(f"round {number}: the image is complete", file=sys.stderr)
                            break
                        _kill_some(node, mode, rng, report, readers)
                finally:
                    readers.end()
                    if log is not None:
                        log.write(node.log())
                    wire.bytes_per_s = FULL
                for name, size in {**FILES, **PRESENT}.items():
                    if read_within(mounted / name, 0, size, 60) != (source / name).read_bytes():
                        report.wrong.append(f"round {number}: {name} differs at the end")
                _unmount(node, mounted)
                if "Traceback" in node.log() or "BREACH" in node.log():
                    report.wrong.append(f"round {number}: {node.log()[-4000:]}")


def _unmount(node: Node, mounted: Path) -> None:
    """Take the mount away; nothing stays of it, unless somebody beside us has a copy in a mount namespace."""
    done = node.run("umount", mounted)
    if done.returncode:
        raise AssertionError(f"umount: {done.stderr}")
    if "mount namespace that has a copy" not in done.stderr:
        try:
            wait_for(lambda: not node.mount_records() and not node.worker_pids(), "nothing is left", 20)
        except TimeoutError as error:
            kept_by = node.run("status").stdout
            raise AssertionError(f"{error}\n{done.stderr}\n{kept_by}\n{node.log()[-6000:]}") from error


def _kill_some(node: Node, mode: str, rng: random.Random, report: Report, readers: Readers) -> None:
    victims = rng.choice(VICTIMS[mode])
    time.sleep(rng.uniform(0.02, 0.5))
    pause = rng.choice((0.0, 0.0, 0.01, 0.05))
    chosen = [(role, _pids(node, role)) for role in victims]
    is_calm = rng.random() < CALM
    print(f"{len(report.kills) + 1} kills {chosen}", file=sys.stderr, flush=True)
    kill = Kill(victims, time.monotonic(), is_calm=is_calm)
    report.kills.append(kill)
    for number, (_, pids) in enumerate(chosen):
        if number:
            time.sleep(pause)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for _, pids in chosen:
        for pid in pids:
            wait_for(lambda pid=pid: not is_alive(pid), f"{victims} end")  # type: ignore[misc]
    _wait_whole(node, mode, readers, by_itself=comes_back_by_itself(mode, set(victims)), is_calm=is_calm)
    kill.whole = time.monotonic()
    readers.look()
    print(
        f"{kill.started:.3f} {time.strftime('%H:%M:%S')} {len(report.kills)} killed {'+'.join(victims)} {chosen}"
        f" whole after {kill.whole - kill.started:.2f} s",
        file=sys.stderr,
    )


def soak(
    mode: str, kills: int, seed: int, home: Path, *, seconds: float = 86400.0, log: TextIO | None = None
) -> Report:
    """Kill until `kills` are done, a byte was wrong, or the time is over; return what came of it. `log` gets the node's log."""
    report = Report()
    _rounds(mode, kills, seed, home, report, time.monotonic() + seconds, log)
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
    parser.add_argument("--seconds", type=float, default=86400.0, help="begin no round after so long")
    parser.add_argument("--log", type=argparse.FileType("w"), help="write the logs of all daemons there")
    options = parser.parse_args()
    started = time.monotonic()
    with _home() as home:
        report = soak(options.mode, options.kills, options.seed, home, seconds=options.seconds, log=options.log)
    summary = report.summary(options.mode)
    print(json.dumps(summary | {"seed": options.seed, "seconds": round(time.monotonic() - started)}))
    return 1 if summary["wrong"] or summary["errors_where_none_may_be"] else 0


if __name__ == "__main__":
    sys.exit(main())
