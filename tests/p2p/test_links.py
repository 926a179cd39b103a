"""Several schedulers behind one name: real sockets, one killed and started again."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import p2p.link as link_module
from p2p.link import Link, Links, pick_family
from p2p.protocol.messages import VERSION, Hello, Kind
from p2p.swarm import SwarmSettings, open_swarm
from rafsfs.store.cache import Cache
from scheduler.server import Scheduler, SchedulerSettings
from tests.support.registry import free_port

LIMIT_S = 60.0
HOSTS = ("127.0.0.1", "127.0.0.2")
TASKS = [bytes([number]) * 32 for number in range(40)]


class Names(trio.abc.HostnameResolver):
    """A name service that lists what a test says."""

    def __init__(self) -> None:
        self.listed: list[str] = []

    async def getaddrinfo(self, host: Any, port: Any, *_: int, **__: int) -> Any:
        if host != b"schedulers.example" and host != "schedulers.example":
            raise socket.gaierror("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.listed]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        raise NotImplementedError


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await trio.sleep(0.01)


async def start(nursery: trio.Nursery, host: str, port: int) -> trio.CancelScope:
    scope = trio.CancelScope()
    ready = trio.Event()

    async def run() -> None:
        with scope:
            await Scheduler(SchedulerSettings(host=host, port=port), random.Random(1)).run(lambda *ports: ready.set())

    nursery.start_soon(run)
    await ready.wait()
    return scope


def peer_links(name: str) -> tuple[Links, list[str], list[str]]:
    up: list[str] = []
    lost: list[str] = []
    hello = Hello(VERSION, name, 1, Kind.PEER)
    links = Links(
        hello,
        lambda link, message: None,
        lambda link, task, rulings: None,
        lambda link: up.append(link.host),
        lambda link: lost.append(link.host),
    )
    return links, up, lost


def shares(links: Links) -> dict[bytes, str]:
    found = {task: links.home(task) for task in TASKS}
    return {task: link.host for task, link in found.items() if isinstance(link, Link)}


def homes(links: Links) -> set[str]:
    return set(shares(links).values())


@pytest.mark.io
@pytest.mark.logs_warnings
async def test_a_name_with_two_schedulers_falls_through_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "_RESOLVE_S", 0.05)
    names = Names()
    names.listed = list(HOSTS)
    trio.socket.set_custom_hostname_resolver(names)
    port = free_port()
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            scopes = {host: await start(nursery, host, port) for host in HOSTS}
            (one, _, lost), (other, _, _) = peer_links("one"), peer_links("other")
            nursery.start_soon(one.follow, "schedulers.example", port)
            nursery.start_soon(other.follow, "schedulers.example", port)
            await until(lambda: homes(one) == homes(other) == set(HOSTS))
            for task in TASKS:
                mine, theirs = one.home(task), other.home(task)
                assert mine is not None
                assert theirs is not None
                assert mine.address == theirs.address, "peers agree"
            before = shares(one)

            scopes[HOSTS[0]].cancel()
            await until(lambda: homes(one) == homes(other) == {HOSTS[1]})
            assert lost == [HOSTS[0]]
            await start(nursery, HOSTS[0], port)
            await until(lambda: homes(one) == homes(other) == set(HOSTS))
            assert shares(one) == before

            names.listed = [HOSTS[1]]
            await until(lambda: [link.host for link in one.links] == [HOSTS[1]])
            names.listed = []  # a name service that has failed is no reason to leave
            await trio.sleep(0.5)
            assert homes(one) == {HOSTS[1]}
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("found", "picked"),
    [
        ([], []),
        ([(socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.1")], ["127.0.0.1"]),
        ([(socket.AF_INET6, "fd00::2"), (socket.AF_INET6, "fd00::1")], ["fd00::1", "fd00::2"]),
        (
            [(socket.AF_INET, "10.0.0.2"), (socket.AF_INET, "10.0.0.1"), (socket.AF_INET, "10.0.0.2")],
            ["10.0.0.1", "10.0.0.2"],
        ),
    ],
)
def test_one_family_counts(found: list[tuple[int, str]], picked: list[str]) -> None:
    assert pick_family(found) == picked


def test_who_says_many_addresses_is_not_believed_for_ever() -> None:
    assert (
        len(pick_family([(socket.AF_INET, f"10.0.{n >> 8}.{n & 255}") for n in range(5000)]))
        == link_module.MOST_SCHEDULERS
    )


@pytest.mark.io
@pytest.mark.logs_warnings
async def test_without_a_scheduler_only_few_read_the_registry_at_once(tmp_path: Path) -> None:
    """Of a node. What of it a registry sees is the sum over all nodes: so many times two, whatever they prefetch."""
    with trio.fail_after(LIMIT_S), contextlib.closing(Cache.open(str(tmp_path / "cache"))) as cache:
        async with open_swarm(cache, SwarmSettings(host="127.0.0.1")) as peer, trio.open_nursery() as nursery:
            inside: list[int] = []
            most: list[int] = []

            async def read(number: int) -> None:
                async with peer.guard():
                    inside.append(number)
                    most.append(len(inside))
                    await trio.sleep(0.01)
                    inside.remove(number)

            async with trio.open_nursery() as readers:
                for number in range(12):
                    readers.start_soon(read, number)
            assert max(most) == 12, "no scheduler has been named: there is no swarm to be careful for"

            port = free_port()
            await peer.use(f"127.0.0.1:{port}")
            most.clear()
            async with trio.open_nursery() as readers:
                for number in range(12):
                    readers.start_soon(read, number)
            assert (max(most), len(most)) == (2, 12)

            await start(nursery, "127.0.0.1", port)
            await until(lambda: peer.figures()["rafs_swarm_schedulers"] == {"up": 1, "down": 0})
            most.clear()
            async with trio.open_nursery() as readers:
                for number in range(12):
                    readers.start_soon(read, number)
            assert max(most) == 12
            nursery.cancel_scope.cancel()
