"""Nodes that share what they fetch: real daemons, a real scheduler, a real registry, on loopback. What goes wrong: test_swarm_faults.py.

Every test ends with every reader holding the right bytes.
"""

from __future__ import annotations

import os
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.processes import Node, kill, wait_for
from tests.support.registry import Registry
from tests.support.swarm import Swarm, fetched, push, read_all, size_of, together
from tests.support.weights import Array, save_safetensors


def test_every_byte_leaves_the_registry_once(swarm: Swarm, registry: Registry, noise: Path) -> None:
    ref = push(swarm.host, noise, registry)
    nodes = [swarm.node(f"n{n}") for n in range(3)]
    read_all(noise, swarm.mount(nodes, ref))
    total, size = fetched(nodes), size_of(nodes[0])
    assert total["origin_bytes"] <= 1.02 * size
    assert total["peer_bytes"] >= 1.9 * size
    status = nodes[0].json("status")
    assert status["swarm"]["schedulers"] == {swarm.address: True}
    assert sum(peer["bytes"] for peer in status["swarm"]["peers"].values()) > 0
    late = swarm.node("late")
    read_all(noise, swarm.mount([late], ref))
    assert fetched([late]).get("origin_bytes", 0) == 0, "who comes late finds it all"


def test_without_a_scheduler_no_port_is_opened(node: Node, registry: Registry, noise: Path) -> None:
    ref = push(node, noise, registry)
    mounted = node.mount(ref)
    read_all(noise, [mounted])
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
    swarm: Swarm, registry: Registry, noise: Path
) -> None:
    ref = push(swarm.host, noise, registry)
    kill(swarm.process.pid)
    node = swarm.node("alone")
    read_all(noise, swarm.mount([node], ref))
    assert fetched([node])["origin_bytes"] == size_of(node)
    swarm.start_scheduler()
    wait_for(lambda: len(swarm.state()["tasks"]) == 1, "the node has joined by itself", 30)
    other = swarm.node("other")
    read_all(noise, swarm.mount([other], ref))
    assert fetched([other]).get("origin_bytes", 0) == 0


def test_seeds_fetch_and_preheat_tells_when_it_is_done(swarm: Swarm, registry: Registry, noise: Path) -> None:
    ref = push(swarm.host, noise, registry)
    seed = swarm.seed("seed")
    done = swarm.host.json("preheat", ref, "--scheduler", swarm.address)
    assert [(node["done_bytes"] == node["data_bytes"] > 0, node["error"]) for node in done["nodes"]] == [(True, "")]
    nodes = [swarm.node(f"n{n}") for n in range(2)]
    read_all(noise, swarm.mount(nodes, ref))
    assert fetched(nodes).get("origin_bytes", 0) == 0
    assert fetched([seed])["origin_bytes"] == size_of(nodes[0])
    absent = swarm.host.run("preheat", ref.replace("model", "absent"), "--scheduler", swarm.address)
    assert absent.returncode == 21, absent


def test_a_second_image_costs_the_difference(swarm: Swarm, registry: Registry, noise: Path, tmp_path: Path) -> None:
    ref = push(swarm.host, noise, registry)
    nodes = [swarm.node(f"n{n}") for n in range(2)]
    read_all(noise, swarm.mount(nodes, ref))
    time.sleep(2.5)  # what has come is entered in the index of the node
    more = tmp_path / "more"
    more.mkdir()
    tensors = {f"new.{n}": Array("U8", (1 << 20,), os.urandom(1 << 20)) for n in range(4)}
    save_safetensors(more / "new.safetensors", tensors)
    subprocess.run(["cp", noise / "model.safetensors", more / "model.safetensors"], check=True)
    second = push(swarm.host, more, registry, name="more")
    before = fetched(nodes)
    mounts = together([lambda n=n: n.mount(second, "more", "--scheduler", swarm.address) for n in nodes])  # type: ignore[misc]
    read_all(more, mounts)
    after = fetched(nodes)
    moved = sum(after[name] - before.get(name, 0) for name in ("origin_bytes", "peer_bytes"))
    assert moved <= 2 * (4 << 20) + (2 << 20)


def test_a_token_is_asked_for(tmp_path: Path, registry: Registry, noise: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-secret-of-thirty-characters!\n")
    token.chmod(0o600)
    with ExitStack() as stack:
        swarm = Swarm(tmp_path, stack)
        ref = push(swarm.host, noise, registry)
        kill(swarm.process.pid)
        swarm.host.env["RAFS_SWARM_TOKEN_FILE"] = str(token)
        swarm.start_scheduler()
        nodes = [swarm.node(f"n{n}", RAFS_SWARM_TOKEN_FILE=str(token)) for n in range(2)]
        stranger = swarm.node("stranger")
        read_all(noise, swarm.mount([*nodes, stranger], ref))
        assert fetched(nodes)["origin_bytes"] <= 1.02 * size_of(nodes[0])
        assert fetched([stranger])["origin_bytes"] == size_of(stranger), "it is left to itself"
        port = nodes[0].json("status")["swarm"]["port"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/x", timeout=10)
        assert "a-secret" not in nodes[0].log()
