"""A cache that is smaller than what passes through it: quota, eviction, pins, a full disk, seeds. Real daemons, every reader gets the right
bytes.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.compare import compare_trees
from tests.support.processes import Node, kill, read_within, running_node, wait_for
from tests.support.registry import Registry
from tests.support.swarm import Swarm, fetched, read_all

MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four directories of 8 MiB of noise each."""
    top = tmp_path_factory.mktemp("quota")
    found = []
    for number in range(4):
        (top / str(number)).mkdir()
        (top / str(number) / "weights.bin").write_bytes(os.urandom(SIZE))
        found.append(top / str(number))
    return found


@pytest.fixture
def images(tmp_path: Path, sources: list[Path]) -> Iterator[Callable[[Node], list[str]]]:
    def build(node: Node) -> list[str]:
        refs = [f"oci:{tmp_path / 'layout'}:v{number}" for number in range(len(sources))]
        for source, ref in zip(sources, refs, strict=True):
            node.build(source, ref)
        return refs

    return build


def held(node: Node) -> list[int]:
    """Which of the images of `images` have data on a node, fully."""
    listed = node.json("cache", "ls")
    digests = {space["images"][0] for space in listed["spaces"] if space["images"] and space["present_bytes"] >= SIZE}
    return sorted(
        int(re.findall(r":v(\d)", ref)[0])
        for image in listed["images"]
        if image["digest"] in digests
        for ref in image["references"][:1]
    )


def test_the_least_recently_used_goes_and_what_is_mounted_or_pinned_stays(
    tmp_path: Path, images: Callable[[Node], list[str]], sources: list[Path]
) -> None:
    with running_node(tmp_path / "node", env={"RAFS_QUOTA": "26MiB"}) as node:
        refs = images(node)
        mounted = node.mount(refs[0])
        assert compare_trees(sources[0], mounted) == []
        node.rafs("pull", refs[1])
        node.rafs("cache", "pin", refs[1])
        node.rafs("pull", refs[2])
        node.rafs("pull", refs[3])
        assert held(node) == [0, 1, 3]
        assert compare_trees(sources[0], mounted) == []
        full = node.run("pull", refs[2])
        assert full.returncode == 0, "what was pulled last gives way"
        assert held(node) == [0, 1, 2]
        second = node.mount(refs[2], "second")
        refused = node.run("pull", refs[3])
        assert refused.returncode == 42, refused
        assert "quota of 26.0 MiB is full" in refused.stderr
        third = node.mount(refs[3], "third")
        assert compare_trees(sources[3], third) == [], "the quota is soft for who reads"
        assert compare_trees(sources[2], second) == []
        wait_for(lambda: "quota exceeded" in node.log(), "the log says so")
        node.rafs("umount", mounted)
        wait_for(lambda: held(node) == [1, 2, 3], "what is not in use any more goes at once")
        assert node.json("cache", "du")["pinned_bytes"] >= SIZE
        assert node.run("cache", "rm", refs[1]).returncode == 40
        node.rafs("cache", "unpin", refs[1])
        dry = node.json("cache", "gc", "--to", "1MiB", "--dry-run")
        assert [space["bytes"] >= SIZE for space in dry["evicted"]] == [True]
        assert held(node) == [1, 2, 3]
        node.rafs("cache", "gc", "--to", "1MiB")
        assert held(node) == [2, 3]
        assert compare_trees(sources[2], second) == []
        kill(node.daemon_pid())
        node.rafs("pull", refs[0])
        node.rafs("pull", refs[1])
        assert held(node) == [1, 2, 3], "what is mounted is in use after a crash, too"
        assert compare_trees(sources[3], third) == []


def test_an_image_larger_than_the_quota_is_refused_by_name(tmp_path: Path, images: Callable[[Node], list[str]]) -> None:
    with running_node(tmp_path / "node", env={"RAFS_QUOTA": "4MiB"}) as node:
        refs = images(node)
        refused = node.run("pull", refs[0])
        assert refused.returncode == 42
        assert "raise --quota" in refused.stderr
        assert node.json("cache", "ls")["quota_bytes"] == 4 * MIB


@contextmanager
def small_disk(where: Path, size: int) -> Iterator[Path]:
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


def test_a_full_disk_costs_what_nobody_uses_before_it_costs_a_reader(
    tmp_path: Path, images: Callable[[Node], list[str]], sources: list[Path]
) -> None:
    with small_disk(tmp_path / "disk", 21 * MIB) as disk, running_node(tmp_path / "node", cache=disk / "cache") as node:
        refs = images(node)
        node.rafs("pull", refs[0])
        node.rafs("pull", refs[1])
        mounted = node.mount(refs[2])
        assert compare_trees(sources[2], mounted) == []
        assert held(node) == [2], "all that nobody uses, up to 256 MiB"
        assert "disk full: evicted=2" in node.log()
        second = node.mount(refs[1], "second")
        assert compare_trees(sources[1], second) == []
        third = node.mount(refs[3], "third", "--deadline", "5")
        with pytest.raises(OSError) as caught:
            read_within(third / "weights.bin", 0, SIZE, 30)
        assert caught.value.errno == errno.ENOSPC
        assert compare_trees(sources[2], mounted) == []


def seed_with(swarm: Swarm, stack: ExitStack, name: str, quota: str) -> Node:
    env = {"RAFS_PEER_LISTEN": "127.0.0.1:0", "RAFS_SCHEDULER": swarm.address, "RAFS_SEED": "1", "RAFS_QUOTA": quota}
    return stack.enter_context(running_node(swarm.home / name, env=env))


def test_two_small_seeds_and_three_images(tmp_path: Path, registry: Registry, sources: list[Path]) -> None:
    """Each seed holds two of three images. In quota an image leaves the registry about once; afterwards all are still to be had."""
    with ExitStack() as stack:
        swarm = Swarm(tmp_path, stack)
        seeds = [seed_with(swarm, stack, f"seed{n}", "18MiB") for n in range(2)]
        for seed in seeds:
            seed.start("daemon", "--cache-dir", seed.cache)
        wait_for(lambda: len(swarm.state()["peers"]) == 2, "the seeds are known")
        refs = []
        for number, source in enumerate(sources[:3]):
            refs.append(f"localhost:{registry.port}/swarm/m{number}:v{number}")
            swarm.host.build(source, refs[-1])

        def preheat(ref: str) -> dict[str, Any]:
            return swarm.host.json("preheat", ref, "--scheduler", swarm.address)

        for ref in refs[:2]:
            assert [node["error"] for node in preheat(ref)["nodes"]] == ["", ""]
        assert fetched(seeds)["origin_bytes"] <= 2.1 * SIZE, "each image once, not once per seed"
        assert [held(seed) for seed in seeds] == [[0, 1], [0, 1]]
        assert [node["error"] for node in preheat(refs[2])["nodes"]] == ["", ""]
        assert fetched(seeds)["origin_bytes"] <= 3.15 * SIZE
        for seed in seeds:
            assert seed.status()["cache"]["held_bytes"] <= 18 * MIB
            assert held(seed) == [1, 2]
            assert "disk full" not in seed.log()
        nodes = [swarm.node(f"n{n}") for n in range(2)]
        for ref, source in ((refs[2], sources[2]), (refs[0], sources[0])):
            mounts = swarm.mount(nodes, ref)
            read_all(source, mounts)
            for node, where in zip(nodes, mounts, strict=True):
                node.rafs("umount", where)
        total = fetched([*seeds, *nodes])
        assert total["origin_bytes"] <= 4.2 * SIZE, "only what had been evicted was fetched again"
        kill(seeds[0].daemon_pid())
        seeds[0].start("daemon", "--cache-dir", seeds[0].cache)
        wait_for(lambda: (seeds[0].status().get("swarm") or {}).get("tasks"), "the seed offers what it has again")
