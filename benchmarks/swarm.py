"""How long until the last of N nodes has read an image, with the swarm and without? `make bench-swarm`.

Rig: network namespaces on one machine; the registry (docker-registry) at 200 Mbit/s, each node at 400 Mbit/s (--mbit), scheduler at 1
Gbit/s. Image: 256 MiB of noise in one file, so that what crosses a link is what is read. Each node has a daemon and a FUSE mount of its
own, starts with nothing, and reads the file from its first byte to its last; clock from the first open to the last byte of the last node.
Floor: one node alone, without a scheduler, in the same round; with seeds, so much less of it as they had fetched when the clock began,
since the first mount sets them to work. Bytes from the registry are counted twice: as chunks, by all daemons together (what is judged),
and at the registry's link, with headers of packets and of HTTP, the image's metadata, and what was sent again. CPU is that of the nodes
(daemon and FUSE worker; it hardly depends on what else the machine does) and that of the whole machine (which says whether the links were
what was measured, or the machine).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.support.namespaces import Rig, running_rig
from tests.support.processes import Node, output_within, running_node, wait_for
from tests.support.registry import running_registry

from .ballast import Ballast, rest
from .measure import Row, commit, machine, median, spread, table

_SIZE = 256 << 20
_ORIGIN_MBIT = 200
_PEER_MBIT = 400
_MEMORY = 600 << 20
"""Of a node: the image in its cache and in the page cache of its mount, and some to spare."""
_LOOK_S = 0.25


def _read(path: Path) -> int:
    done = 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(1 << 20):
            done += len(data)
    return done


@dataclass(frozen=True)
class Result:
    """One run."""

    last_s: float
    """From the first open to the last byte of the last node."""
    origin: float
    """Bytes of chunks that all nodes together took from the registry, in sizes of the image."""
    link: float
    """Bytes that the registry's link carried, in sizes of the image."""
    cpu_s: float
    """Of the whole machine."""
    daemon_s: float
    """CPU seconds of a daemon, mean of the nodes that read."""
    worker_s: float
    """CPU seconds of a FUSE worker, likewise."""
    ahead: float
    """What the registry's link had carried when the clock began, in sizes of the image: the first mount sets seeds to work."""


class Field:
    """The rig with its registry and scheduler."""

    def __init__(
        self,
        directory: Path,
        rig: Rig,
        stack: contextlib.ExitStack,
        peers: int,
        seeds: int,
        mode: str,
        mbit: tuple[int, int] = (_ORIGIN_MBIT, _PEER_MBIT),
    ) -> None:
        self.directory = directory
        self.rig = rig
        self._mode = mode
        self._stack = stack
        self._count = 0
        origin = rig.add("origin", mbit[0])
        rig.add("scheduler", 1000)
        for number in range(peers):
            rig.add(f"peer{number}", mbit[1])
        for number in range(seeds):
            rig.add(f"seed{number}", mbit[1])
        self.ref = f"{origin}:5000/bench/noise:v1"
        self._publish()

    def _publish(self) -> None:
        source = self.directory / "source"
        source.mkdir()
        (source / "noise.bin").write_bytes(os.urandom(_SIZE))
        with running_registry(self.directory / "registry") as local, running_node(self.directory / "builder") as node:
            node.build(source, f"localhost:{local.port}/bench/noise:v1", "--chunking", "fixed", timeout_s=300)
            storage = local.storage
        self._stack.enter_context(self.rig.registry("origin", storage))

    def scheduler(self, stack: contextlib.ExitStack) -> str:
        """Start a scheduler; return its address."""
        self._count += 1
        node = stack.enter_context(
            running_node(self.directory / f"scheduler-{self._count}", inside=self.rig.inside("scheduler"))
        )
        process = node.start("scheduler", "--listen", f"{self.rig.addresses['scheduler']}:0")
        port = re.findall(rb"port ([0-9]+)", output_within(process, b"port", 20) + b" ")[0].decode()
        return f"{self.rig.addresses['scheduler']}:{port}"

    @contextlib.contextmanager
    def node(self, name: str, scheduler: str) -> Iterator[Node]:
        """A node on a machine, its daemon running."""
        self._count += 1
        env = {"RAFS_PEER_LISTEN": f"{self.rig.addresses[name]}:0", "RAFS_READAHEAD": "64MiB"}
        if scheduler:
            env |= {
                "RAFS_SCHEDULER": scheduler,
                "RAFS_PLAIN_HTTP": "1",
                **({"RAFS_SEED": "1"} if name.startswith("seed") else {}),
            }
        home = self.directory / f"{name}-{self._count}"
        try:
            with running_node(home, env=env, inside=self.rig.inside(name)) as node:
                node.start("daemon", "--cache-dir", node.cache)
                wait_for((node.cache / "daemon.sock").exists, "a daemon", 60)
                yield node
        finally:
            shutil.rmtree(home, ignore_errors=True)

    def run(self, peers: int, seeds: int, *, swarm: bool) -> Result:
        """Start everything anew, read the image on all nodes at once."""
        with contextlib.ExitStack() as stack:
            scheduler = self.scheduler(stack) if swarm else ""
            seeders = [stack.enter_context(self.node(f"seed{number}", scheduler)) for number in range(seeds)]
            nodes = [stack.enter_context(self.node(f"peer{number}", scheduler)) for number in range(peers)]
            before = self.rig.sent_bytes("origin")
            ballast = stack.enter_context(contextlib.closing(Ballast(_MEMORY * (peers + seeds))))
            ballast.hold()
            with ThreadPoolExecutor(peers) as pool:
                arguments = (self.ref, "mnt", "--plain-http", "--mode", self._mode)
                mounts = list(pool.map(lambda node: node.mount(*arguments), nodes))
            ended: list[float] = []
            errors: list[BaseException] = []

            def read(path: Path) -> None:
                try:
                    assert _read(path / "noise.bin") == _SIZE
                    ended.append(time.perf_counter())
                except BaseException as error:  # noqa: BLE001 - shown by the caller
                    errors.append(error)

            daemons = Meter([node.daemon_pid() for node in nodes])
            workers = Meter([pid for node in nodes for pid in node.worker_pids()])
            with daemons, workers, ballast.giving():
                ahead = self.rig.sent_bytes("origin") - before
                started, cpu = time.perf_counter(), _busy()
                threads = [threading.Thread(target=read, args=(mounted,)) for mounted in mounts]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(600)
            if errors or len(ended) != peers:
                raise RuntimeError(f"{len(ended)} of {peers} nodes have read: {errors[:1]}")
            last, cpu = max(ended) - started, _busy() - cpu
            daemon, worker = daemons.seconds, workers.seconds
            link = self.rig.sent_bytes("origin") - before
            origin = sum(node.status()["fetch"].get("origin_bytes", 0) for node in [*seeders, *nodes])
            return Result(last, origin / _SIZE, link / _SIZE, cpu, daemon / peers, worker / peers, ahead / _SIZE)


def _say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def _busy() -> float:
    user, nice, system = (int(word) for word in Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


class Meter:
    """CPU seconds that processes spend while the block runs. One that ends counts as it was last seen: a mount whose image becomes complete
    needs its server no more.
    """

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._before: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    @property
    def seconds(self) -> float:
        """Of all of them together."""
        return sum(self._last[pid] - self._before[pid] for pid in self._before)

    def __enter__(self) -> Self:
        self._look()
        self._before = dict(self._last)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            self._look()
        self._look()

    def _look(self) -> None:
        for pid in self._pids:
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                self._last[pid] = (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Run and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swarm", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 2])
    parser.add_argument(
        "--direct", type=int, nargs="*", help="N of the runs without a swarm, once each (default: as --peers)"
    )
    parser.add_argument("--mode", default="fuse", help="of the mounts (see rafs mount --help)")
    parser.add_argument(
        "--mbit",
        type=int,
        nargs=2,
        default=(_ORIGIN_MBIT, _PEER_MBIT),
        metavar=("ORIGIN", "NODE"),
        help="rates of the links",
    )
    arguments = parser.parse_args()
    direct = arguments.peers if arguments.direct is None else arguments.direct
    print(f"{commit()}; {machine()}", flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="rafs-swarm-") as directory, contextlib.ExitStack() as stack:
        rig = stack.enter_context(running_rig())
        field = Field(
            Path(directory),
            rig,
            stack,
            max([*arguments.peers, *direct, 1]),
            max(arguments.seeds),
            arguments.mode,
            tuple(arguments.mbit),
        )
        _say("taking what memory is free and not needed")
        stack.enter_context(rest(_MEMORY * (max([*arguments.peers, *direct, 1]) + max(arguments.seeds))))
        floors: list[float] = []
        results: dict[tuple[int, int], list[Result]] = {}
        for number in range(arguments.rounds):
            floors.append(field.run(1, 0, swarm=False).last_s)
            for peers in arguments.peers:
                for seeds in arguments.seeds:
                    result = field.run(peers, seeds, swarm=True)
                    results.setdefault((peers, seeds), []).append(result)
                    _say(f"round {number + 1}: one alone {floors[-1]:.2f} s; {peers} peers, {seeds} seeds: {result}")
        floor = median(floors)
        alone = {peers: field.run(peers, 0, swarm=False) for peers in direct if peers > 1}
        for (peers, seeds), runs in results.items():
            last, origin, link, cpu, daemon, worker, ahead = (
                median([getattr(run, name) for run in runs])
                for name in ("last_s", "origin", "link", "cpu_s", "daemon_s", "worker_s", "ahead")
            )
            share = 1 - ahead if seeds else 1.0
            without = f"; without: {alone[peers].last_s:.1f} s, {alone[peers].origin:.2f} x" if peers in alone else ""
            what = f"{peers} peers, {seeds} seeds"
            rows.append(Row(f"{what}: last node", f"{last:.2f} s", f"one alone {floor:.2f} s{without}",
                            last / floor / share, "<= 1.10", last / floor / share <= 1.10,
                            (f"{ahead:.0%} had gone to the seeds before, which is taken off the floor; " if seeds else "") +
                            f"{spread([run.last_s for run in runs])}, {cpu / last / (os.cpu_count() or 1):.0%} of the CPU; "
                            f"a node: {daemon:.2f} s daemon, {worker:.2f} s worker"))  # fmt: skip
            rows.append(Row(f"{what}: bytes from the registry", f"{origin:.3f} x", "size of the image",
                            origin, "<= 1.02", origin <= 1.02, f"{link:.3f} x at its link"))  # fmt: skip
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
