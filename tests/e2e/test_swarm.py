"""Nodes that share what they fetch: real daemons, a real scheduler, a real registry, on loopback; and what happens when one of them dies.

Every test ends with every reader holding the right bytes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.compare import compare_trees
from tests.support.processes import Node, kill, output_within, running_node, wait_for
from tests.support.registry import Registry
from tests.support.weights import Array, save_safetensors

from .wire import wire_to

READ_S = 100.0


class Swarm:
    """A scheduler and nodes that know it."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.home = home
        self._stack = stack
        self.host = stack.enter_context(running_node(home / "scheduler"))
        self.port = 0
        self.admin = 0
        self.start_scheduler()

    def start_scheduler(self) -> None:
        ports = ("--listen", f"127.0.0.1:{self.port}", "--admin", f"127.0.0.1:{self.admin}")
        self.process = self.host.start("scheduler", *ports)
        said = output_within(self.process, b"admin on port", 20).decode()
        self.port, self.admin = (int(number) for number in re.findall(r"port (\d+)", said)[:2])

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def node(self, name: str, **env: str) -> Node:
        env = {"RAFS_PEER_LISTEN": "127.0.0.1:0", **env}
        return self._stack.enter_context(running_node(self.home / name, env=env))

    def seed(self, name: str) -> Node:
        node = self.node(name, RAFS_SCHEDULER=self.address, RAFS_SEED="1")
        node.start("daemon", "--cache-dir", node.cache)
        wait_for(lambda: any(peer["kind"] == "seed" for peer in self.state()["peers"].values()), "the seed is known")
        return node

    def state(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/swarm", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
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


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    with ExitStack() as stack:
        yield Swarm(tmp_path, stack)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 MiB of noise in one file and some small ones."""
    top = tmp_path_factory.mktemp("swarm") / "model"
    top.mkdir()
    tensors = {f"layer.{n}": Array("U8", (4 << 20,), os.urandom(4 << 20)) for n in range(16)}
    save_safetensors(top / "model.safetensors", tensors)
    (top / "config.json").write_text("{}")
    return top


def push(node: Node, source: Path, registry: Registry, port: int = 0, name: str = "model") -> str:
    ref = f"localhost:{port or registry.port}/swarm/{name}:v1"
    node.build(source, f"localhost:{registry.port}/swarm/{name}:v1")
    return ref


def size_of(node: Node) -> int:
    return int(node.json("status")["mounts"][0]["data_bytes"])


def test_every_byte_leaves_the_registry_once(swarm: Swarm, registry: Registry, source: Path) -> None:
    ref = push(swarm.host, source, registry)
    nodes = [swarm.node(f"n{n}") for n in range(3)]
    read_all(source, swarm.mount(nodes, ref))
    total, size = fetched(nodes), size_of(nodes[0])
    assert total["origin_bytes"] <= 1.02 * size
    assert total["peer_bytes"] >= 1.9 * size
    status = nodes[0].json("status")
    assert status["swarm"]["schedulers"] == {swarm.address: True}
    assert sum(peer["bytes"] for peer in status["swarm"]["peers"].values()) > 0
    late = swarm.node("late")
    read_all(source, swarm.mount([late], ref))
    assert fetched([late]).get("origin_bytes", 0) == 0, "who comes late finds it all"


def test_without_a_scheduler_no_port_is_opened(node: Node, registry: Registry, source: Path) -> None:
    ref = push(node, source, registry)
    mounted = node.mount(ref)
    read_all(source, [mounted])
    assert node.json("status")["swarm"] is None
    sockets = Path(f"/proc/{node.daemon_pid()}/fd")
    inodes = {
        os.readlink(link)[8:-1] for link in sockets.iterdir() if os.path.islink(link) and "socket:" in os.readlink(link)
    }
    listening = {
        line.split()[9]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    }
    assert not inodes & listening


def test_a_scheduler_that_is_not_there_costs_nothing_but_the_sharing(
    swarm: Swarm, registry: Registry, source: Path
) -> None:
    ref = push(swarm.host, source, registry)
    kill(swarm.process.pid)
    node = swarm.node("alone")
    read_all(source, swarm.mount([node], ref))
    assert fetched([node])["origin_bytes"] == size_of(node)
    swarm.start_scheduler()
    wait_for(lambda: len(swarm.state()["tasks"]) == 1, "the node has joined by itself", 30)
    other = swarm.node("other")
    read_all(source, swarm.mount([other], ref))
    assert fetched([other]).get("origin_bytes", 0) == 0


def test_seeds_fetch_and_preheat_tells_when_it_is_done(swarm: Swarm, registry: Registry, source: Path) -> None:
    ref = push(swarm.host, source, registry)
    seed = swarm.seed("seed")
    done = swarm.host.json("preheat", ref, "--scheduler", swarm.address)
    assert [(node["done_bytes"] == node["data_bytes"] > 0, node["error"]) for node in done["nodes"]] == [(True, "")]
    nodes = [swarm.node(f"n{n}") for n in range(2)]
    read_all(source, swarm.mount(nodes, ref))
    assert fetched(nodes).get("origin_bytes", 0) == 0
    assert fetched([seed])["origin_bytes"] == size_of(nodes[0])
    absent = swarm.host.run("preheat", ref.replace("model", "absent"), "--scheduler", swarm.address)
    assert absent.returncode == 21, absent


def slowly(
    swarm: Swarm, registry: Registry, source: Path, act: Callable[[list[Node]], None], count: int = 3
) -> list[Node]:
    """Read an image on several nodes from a registry that takes some seconds for it; do something in the middle."""
    with wire_to(registry.port, bytes_per_s=12e6) as wire:
        ref = push(swarm.host, source, registry, wire.port)
        nodes = [swarm.node(f"n{n}") for n in range(count)]
        mounts = swarm.mount(nodes, ref)
        failures: list[BaseException] = []

        def read() -> None:
            try:
                read_all(source, mounts)
            except BaseException as error:
                failures.append(error)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        # Killing looks at processes, not at daemons that may be busy.
        wait_for(
            lambda: any(sum(n.json("status")["mounts"][0]["sources"].values()) > 8e6 for n in nodes), "8 MB are read"
        )
        act(nodes)
        reader.join(READ_S)
        assert not reader.is_alive(), "the readers hang"
        if failures:
            raise failures[0]
    return nodes


def test_a_peer_dies(swarm: Swarm, registry: Registry, source: Path) -> None:
    slowly(swarm, registry, source, lambda nodes: kill(nodes[0].daemon_pid()))


def test_a_peer_stops_and_keeps_its_connections(swarm: Swarm, registry: Registry, source: Path) -> None:
    stopped: list[int] = []

    def stop(nodes: list[Node]) -> None:
        stopped.append(nodes[0].daemon_pid())
        os.kill(stopped[0], signal.SIGSTOP)
        threading.Timer(12, os.kill, (stopped[0], signal.SIGCONT)).start()

    slowly(swarm, registry, source, stop)


def test_the_scheduler_dies_and_comes_back(swarm: Swarm, registry: Registry, source: Path) -> None:
    def restart(nodes: list[Node]) -> None:
        kill(swarm.process.pid)
        time.sleep(1)
        swarm.start_scheduler()

    nodes = slowly(swarm, registry, source, restart)
    wait_for(lambda: len(swarm.state()["peers"]) == len(nodes), "all have announced themselves again", 30)


def test_the_only_seed_dies(swarm: Swarm, registry: Registry, source: Path) -> None:
    seed = swarm.seed("seed")
    slowly(swarm, registry, source, lambda nodes: kill(seed.daemon_pid()))


def test_the_registry_goes_away_and_comes_back(swarm: Swarm, registry: Registry, source: Path) -> None:
    def away(nodes: list[Node]) -> None:
        registry.stop()
        time.sleep(2)
        registry.start()

    slowly(swarm, registry, source, away)


def test_a_peer_with_rotten_data_is_found_out(swarm: Swarm, registry: Registry, source: Path) -> None:
    ref = push(swarm.host, source, registry)
    liar, honest = swarm.node("liar"), swarm.node("honest")
    read_all(source, swarm.mount([liar], ref))
    for data in (liar.cache / "spaces").glob("*/data"):
        with data.open("r+b") as file:
            file.write(os.urandom(data.stat().st_size))
    read_all(source, swarm.mount([honest], ref))
    status = honest.json("status")["swarm"]
    assert [peer["banned"] for peer in status["peers"].values()] == [True]
    assert "wrong chunk" in honest.log()


def test_a_second_image_costs_the_difference(swarm: Swarm, registry: Registry, source: Path, tmp_path: Path) -> None:
    ref = push(swarm.host, source, registry)
    nodes = [swarm.node(f"n{n}") for n in range(2)]
    read_all(source, swarm.mount(nodes, ref))
    time.sleep(2.5)  # what has come is entered in the index of the node
    more = tmp_path / "more"
    more.mkdir()
    tensors = {f"new.{n}": Array("U8", (1 << 20,), os.urandom(1 << 20)) for n in range(4)}
    save_safetensors(more / "new.safetensors", tensors)
    subprocess.run(["cp", source / "model.safetensors", more / "model.safetensors"], check=True)
    second = push(swarm.host, more, registry, name="more")
    before = fetched(nodes)
    mounts = together([lambda n=n: n.mount(second, "more", "--scheduler", swarm.address) for n in nodes])  # type: ignore[misc]
    read_all(more, mounts)
    after = fetched(nodes)
    moved = sum(after[name] - before.get(name, 0) for name in ("origin_bytes", "peer_bytes"))
    assert moved <= 2 * (4 << 20) + (2 << 20)


def test_a_token_is_asked_for(tmp_path: Path, registry: Registry, source: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-secret-of-thirty-characters!\n")
    with ExitStack() as stack:
        swarm = Swarm(tmp_path, stack)
        ref = push(swarm.host, source, registry)
        kill(swarm.process.pid)
        swarm.host.env["RAFS_SWARM_TOKEN_FILE"] = str(token)
        swarm.start_scheduler()
        nodes = [swarm.node(f"n{n}", RAFS_SWARM_TOKEN_FILE=str(token)) for n in range(2)]
        stranger = swarm.node("stranger")
        read_all(source, swarm.mount([*nodes, stranger], ref))
        assert fetched(nodes)["origin_bytes"] <= 1.02 * size_of(nodes[0])
        assert fetched([stranger])["origin_bytes"] == size_of(stranger), "it is left to itself"
        port = nodes[0].json("status")["swarm"]["port"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/x", timeout=10)
        assert "a-secret" not in nodes[0].log()
