"""What a swarm survives: the death, silence, lies, isolation and full disks of its members, in the middle of what they read.

Every test ends with every reader holding the right bytes, but for the one whose disk is full, until it is not.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from errno import ENOSPC
from pathlib import Path

import pytest

from tests.support.namespaces import running_rig
from tests.support.processes import Node, kill, needs, read_within, running_node, wait_for
from tests.support.registry import Registry
from tests.support.swarm import READ_S, Swarm, fetched, push, read_all, size_of, together

from .wire import wire_to

MIB = 1 << 20
NAME = "model.safetensors"


def got(node: Node) -> int:
    """Bytes that the reader of a node's mount has caused to be fetched, 0 while its daemon does not say."""
    answer = node.run("status", "--json")
    return sum(json.loads(answer.stdout)["mounts"][0]["sources"].values()) if answer.returncode == 0 else 0


@contextmanager
def reading(source: Path, mounts: list[Path], nodes: list[Node]) -> Iterator[threading.Thread]:
    """Read everything on all mounts; the block runs in the middle of it, its end waits for the readers and checks what they have read."""
    failures: list[BaseException] = []

    def read() -> None:
        try:
            read_all(source, mounts)
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    wait_for(lambda: any(got(node) > 8 * MIB for node in nodes), "8 MiB are read")
    yield reader
    reader.join(READ_S)
    assert not reader.is_alive(), "the readers hang"
    if failures:
        raise failures[0]


def slowly(
    swarm: Swarm, registry: Registry, source: Path, act: Callable[[list[Node]], None], count: int = 3
) -> list[Node]:
    """Read an image on several nodes from a registry that takes some seconds for it; do something in the middle."""
    with wire_to(registry.port, bytes_per_s=8e6) as wire:
        ref = push(swarm.host, source, registry, wire.port)
        nodes = [swarm.node(f"n{n}") for n in range(count)]
        mounts = swarm.mount(nodes, ref)
        with reading(source, mounts, nodes) as reader:
            assert reader.is_alive(), "it is not the middle any more"
            act(nodes)
    return nodes


def test_a_peer_dies(swarm: Swarm, registry: Registry, noise: Path) -> None:
    slowly(swarm, registry, noise, lambda nodes: kill(nodes[0].daemon_pid()))


def test_a_peer_stops_sending_and_keeps_its_connections(swarm: Swarm, registry: Registry, noise: Path) -> None:
    with wire_to(registry.port, bytes_per_s=8e6) as wire:
        ref = push(swarm.host, noise, registry, wire.port)
        nodes = [swarm.node(f"n{n}") for n in range(3)]
        mounts = swarm.mount(nodes, ref)
        with reading(noise, mounts, nodes):
            stopped = nodes[0].daemon_pid()
            os.kill(stopped, signal.SIGSTOP)
            try:
                # The others come to their end without it: they read again what they have, and what they have not yet.
                read_all(noise, mounts[1:])
            finally:
                os.kill(stopped, signal.SIGCONT)


def test_the_scheduler_dies_and_comes_back(swarm: Swarm, registry: Registry, noise: Path) -> None:
    def restart(nodes: list[Node]) -> None:
        kill(swarm.process.pid)
        time.sleep(1)
        swarm.start_scheduler()

    nodes = slowly(swarm, registry, noise, restart)
    wait_for(lambda: len(swarm.state()["peers"]) == len(nodes), "all have announced themselves again", 30)


def test_a_scheduler_that_takes_connections_and_says_nothing_holds_nobody_up(
    node: Node, registry: Registry, noise: Path
) -> None:
    ref = push(node, noise, registry)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        node.env["RAFS_PEER_LISTEN"] = "127.0.0.1:0"
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        mounted = node.mount(ref, "mnt", "--scheduler", address, timeout_s=30)
        read_all(noise, [mounted])
        assert fetched([node])["origin_bytes"] == size_of(node)
        assert node.status()["swarm"]["schedulers"] == {address: False}


def test_the_only_seed_dies(swarm: Swarm, registry: Registry, noise: Path) -> None:
    seed = swarm.seed("seed")
    slowly(swarm, registry, noise, lambda nodes: kill(seed.daemon_pid()))


def test_the_registry_goes_away_and_comes_back(swarm: Swarm, registry: Registry, noise: Path) -> None:
    def away(nodes: list[Node]) -> None:
        registry.stop()
        time.sleep(2)
        registry.start()

    slowly(swarm, registry, noise, away)


def test_a_peer_with_rotten_data_is_found_out(swarm: Swarm, registry: Registry, noise: Path) -> None:
    ref = push(swarm.host, noise, registry)
    liar, honest = swarm.node("liar"), swarm.node("honest")
    read_all(noise, swarm.mount([liar], ref))
    for data in (liar.cache / "spaces").glob("*/data"):
        with data.open("r+b") as file:
            file.write(os.urandom(data.stat().st_size))
    read_all(noise, swarm.mount([honest], ref))
    status = honest.json("status")["swarm"]
    assert [peer["banned"] for peer in status["peers"].values()] == [True]
    assert "wrong chunk" in honest.log()


def test_what_verifying_finds_wrong_is_offered_no_more_and_fetched_again(
    swarm: Swarm, registry: Registry, noise: Path
) -> None:
    ref = push(swarm.host, noise, registry)
    rotten, other = swarm.node("rotten"), swarm.node("other")
    (mounted,) = swarm.mount([rotten], ref)
    read_all(noise, [mounted])
    for data in (rotten.cache / "spaces").glob("*/data"):
        with data.open("r+b") as file:
            file.write(os.urandom(8 * MIB))
    answer = rotten.run("cache", "verify", "--json")
    assert answer.returncode == 12, answer
    found = json.loads(answer.stdout)
    assert 1 < len(found["bad"]) < found["checked"]
    read_all(noise, swarm.mount([other], ref))
    assert fetched([other])["peer_bytes"] >= size_of(other) - 16 * MIB
    assert fetched([other]).get("origin_bytes", 0) <= 16 * MIB
    assert [peer["banned"] for peer in other.json("status")["swarm"]["peers"].values()] == [False]
    assert "wrong chunk" not in other.log()
    again = rotten.mount(ref, "again", "--mode", "fuse")
    read_all(noise, [again])
    assert rotten.json("cache", "verify")["bad"] == []


def test_three_come_late(swarm: Swarm, registry: Registry, noise: Path) -> None:
    with wire_to(registry.port, bytes_per_s=8e6) as wire:
        ref = push(swarm.host, noise, registry, wire.port)
        first = swarm.node("first")
        late = [swarm.node(f"late{n}") for n in range(3)]
        with reading(noise, swarm.mount([first], ref), [first]) as reader:
            assert reader.is_alive(), "it is not the middle any more"
            read_all(noise, swarm.mount(late, ref))
        nodes = [first, *late]
        assert fetched(nodes)["origin_bytes"] <= 1.02 * size_of(first)


def test_a_restarted_daemon_offers_what_it_has(swarm: Swarm, registry: Registry, noise: Path) -> None:
    ref = push(swarm.host, noise, registry)
    first = swarm.node("first")
    (mounted,) = swarm.mount([first], ref)
    part = 24 * MIB
    assert read_within(mounted / NAME, 0, part, READ_S) == (noise / NAME).read_bytes()[:part]
    kill(first.daemon_pid())
    wait_for(lambda: not swarm.state()["tasks"], "the scheduler knows of nobody")
    first.start("daemon", "--cache-dir", first.cache)
    held = part // (4 * MIB) - 1
    wait_for(lambda: any(t["held"] >= held for t in swarm.state()["tasks"].values()), "it announces what it has")
    second = swarm.node("second")
    read_all(noise, [mounted, *swarm.mount([second], ref)])
    # The figures of the first begin anew with its daemon.
    assert fetched([first, second])["origin_bytes"] <= 1.02 * size_of(second) - part


@contextmanager
def small_disk(where: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A file system of `size` bytes; what is given makes it larger."""

    def grow(more: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={more}", where], check=True)

    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", where], check=True)
    try:
        yield grow
    finally:
        subprocess.run(["umount", "-l", where], check=True)


def test_the_disk_of_one_peer_is_full(swarm: Swarm, registry: Registry, noise: Path, tmp_path: Path) -> None:
    ref = push(swarm.host, noise, registry)
    with small_disk(tmp_path / "disk", 32 * MIB) as grow:
        poor = swarm.node("poor", cache=tmp_path / "disk" / "cache")
        others = [swarm.node(f"n{n}") for n in range(2)]
        poor_mount, *mounts = swarm.mount([poor, *others], ref)
        size = (noise / NAME).stat().st_size

        def fill() -> None:
            with pytest.raises(OSError) as error:
                read_within(poor_mount / NAME, 0, size, READ_S)
            assert error.value.errno == ENOSPC

        together([fill, lambda: read_all(noise, mounts)])
        grow(256 * MIB)
        read_all(noise, [poor_mount])
        poor.close()


@pytest.mark.skipif(needs("ip", "tc", "nsenter") is not None, reason=str(needs("ip", "tc", "nsenter")))
def test_a_machine_loses_its_network_and_gets_it_back(tmp_path: Path, registry: Registry, noise: Path) -> None:
    with running_rig() as rig, ExitStack() as stack:
        names = ["peer0", "peer1", "peer2"]
        for name, mbit in {"origin": 64, "scheduler": 1000, **dict.fromkeys(names, 400)}.items():
            rig.add(name, mbit)
        address = stack.enter_context(rig.registry("origin", registry.storage))
        swarm = Swarm(tmp_path, stack, rig)
        with running_node(tmp_path / "builder") as builder:
            ref = push(builder, noise, registry).replace(f"localhost:{registry.port}", address)
        nodes = [swarm.node(name) for name in names]
        mounts = swarm.mount(nodes, ref, "--plain-http")
        with reading(noise, mounts, nodes) as reader:
            assert reader.is_alive(), "it is not the middle any more"
            rig.cut("peer0")
            read_all(noise, mounts[1:])  # the others come to their end without it
            wait_for(lambda: len(swarm.state()["peers"]) == 2, "the scheduler has given it up", 40)
            rig.join("peer0")
        wait_for(lambda: len(swarm.state()["peers"]) == 3, "it is back by itself", 30)
