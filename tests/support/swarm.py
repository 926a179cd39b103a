"""A swarm of real processes for tests: a scheduler, nodes that know it, what they have fetched, and trees read on several of them at once.

Rule: a wait has a bound, and what is started belongs to the stack of the test, which ends it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .compare import compare_trees
from .namespaces import Rig
from .processes import Node, output_within, running_node, wait_for
from .registry import Registry

READ_S = 100.0


class Swarm:
    """A scheduler and nodes that know it: on loopback, or each on the machine of its name in a rig, `scheduler` among them."""

    def __init__(self, home: Path, stack: ExitStack, rig: Rig | None = None) -> None:
        self.home = home
        self._stack = stack
        self._rig = rig
        self.host = stack.enter_context(running_node(home / "scheduler", inside=self._inside("scheduler")))
        self.port = 0
        self.admin = 0
        self.start_scheduler()

    def start_scheduler(self) -> None:
        host = self._address("scheduler")
        ports = ("--listen", f"{host}:{self.port}", "--admin", f"{host}:{self.admin}")
        self.process = self.host.start("scheduler", *ports)
        said = output_within(self.process, b"admin on port", 20).decode()
        self.port, self.admin = (int(number) for number in re.findall(r"port (\d+)", said)[:2])

    @property
    def address(self) -> str:
        return f"{self._address('scheduler')}:{self.port}"

    def _address(self, name: str) -> str:
        return self._rig.addresses[name] if self._rig is not None else "127.0.0.1"

    def _inside(self, name: str) -> list[str]:
        return self._rig.inside(name) if self._rig is not None else []

    def node(self, name: str, *, cache: Path | None = None, **env: str) -> Node:
        env = {"RAFS_PEER_LISTEN": f"{self._address(name)}:0", **env}
        return self._stack.enter_context(
            running_node(self.home / name, cache=cache, env=env, inside=self._inside(name))
        )

    def seed(self, name: str) -> Node:
        node = self.node(name, RAFS_SCHEDULER=self.address, RAFS_SEED="1")
        node.start("daemon", "--cache-dir", node.cache)
        wait_for(lambda: any(peer["kind"] == "seed" for peer in self.state()["peers"].values()), "the seed is known")
        return node

    def state(self) -> dict[str, Any]:
        ask = "import sys, urllib.request as r; sys.stdout.buffer.write(r.urlopen(sys.argv[1], timeout=10).read())"
        url = f"http://{self._address('scheduler')}:{self.admin}/swarm"
        command = [*self._inside("scheduler"), sys.executable, "-S", "-c", ask, url]
        found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        return found

    def mount(self, nodes: list[Node], ref: str, *options: str) -> list[Path]:
        return together([lambda n=n: n.mount(ref, "mnt", "--scheduler", self.address, *options) for n in nodes])  # type: ignore[misc]


def together(acts: list[Callable[[], Any]]) -> list[Any]:
    """Do things at once; raise what any of them raised."""
    results: list[Any] = [None] * len(acts)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            results[number] = acts[number]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(READ_S)
        assert not thread.is_alive(), "it takes too long"
    if errors:
        raise errors[0]
    return results


def read_all(source: Path, mounts: list[Path]) -> None:
    for mounted, differences in zip(
        mounts,
        together([lambda m=m: compare_trees(source, m) for m in mounts]),
        strict=True,  # type: ignore[misc]
    ):
        assert differences == [], mounted


def fetched(nodes: list[Node]) -> dict[str, int]:
    """Bytes by origin over all nodes."""
    total: dict[str, int] = {}
    for node in nodes:
        for name, value in node.json("status")["fetch"].items():
            if name.endswith("_bytes"):
                total[name] = total.get(name, 0) + value
    return total


def push(node: Node, source: Path, registry: Registry, port: int = 0, name: str = "model") -> str:
    ref = f"localhost:{port or registry.port}/swarm/{name}:v1"
    node.build(source, f"localhost:{registry.port}/swarm/{name}:v1")
    return ref


def size_of(node: Node) -> int:
    return int(node.json("status")["mounts"][0]["data_bytes"])
