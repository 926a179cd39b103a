"""`rafs get`: real daemons, a real scheduler, a real web server and registry, on loopback; and what happens when one of them dies or lies.

Every test ends with the right bytes in the directory, or with nothing there and a line that says why.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.compare import compare_trees
from tests.support.processes import Node, kill, output_within, wait_for
from tests.support.registry import Registry
from tests.support.web import Web, WebFile, running_web

from .test_swarm import Swarm, together

SIZE = (40 << 20) + 4097


@pytest.fixture
def web() -> Iterator[Web]:
    with running_web() as web:
        yield web


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    with ExitStack() as stack:
        yield Swarm(tmp_path, stack)


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random(8).randbytes(SIZE)


def get(node: Node, url: str, *options: str, scheduler: str = "") -> dict[str, Any]:
    more = ("--scheduler", scheduler) if scheduler else ()
    return node.json("get", url, node.home / "out", *more, *options)


def got(node: Node, name: str = "m.bin") -> bytes:
    return (node.home / "out" / name).read_bytes()


def get_together(swarm: Swarm, nodes: list[Node], url: str, *options: str) -> list[dict[str, Any]]:
    acts: list[Callable[[], Any]] = [lambda n=n: get(n, url, *options, scheduler=swarm.address) for n in nodes]  # type: ignore[misc]
    return together(acts)


def test_a_file_leaves_its_server_once(swarm: Swarm, web: Web, data: bytes) -> None:
    web.files["/m.bin"] = WebFile(data)
    web.pace.bytes_per_s = 40e6
    nodes = [swarm.node(f"n{n}") for n in range(3)]
    results = get_together(swarm, nodes, web.url("/m.bin"))
    assert [got(node) == data for node in nodes] == [True] * 3
    assert web.bytes_sent <= 1.02 * SIZE
    assert all(result["shared"] for result in results)
    assert sum(result["sources"].get("peer", 0) for result in results) >= 1.9 * SIZE
    late = swarm.node("late")
    result = get(late, web.url("/m.bin"), scheduler=swarm.address)
    assert got(late) == data
    assert result["sources"].get("origin", 0) == 0, "who comes late finds it all"
    state = os.stat(late.home / "out" / "m.bin")
    assert (state.st_mode & 0o777, state.st_mtime) == (0o644, 1_700_000_000)


def test_the_first_fetcher_dies(swarm: Swarm, web: Web, data: bytes) -> None:
    web.files["/m.bin"] = WebFile(data)
    first, second = swarm.node("first"), swarm.node("second")
    web.pace.bytes_per_s = 2e6
    begun = first.start("get", web.url("/m.bin"), first.home / "out", "--scheduler", swarm.address)
    wait_for(lambda: web.bytes_sent > 4e6, "something has come")
    waiting = second.start("get", web.url("/m.bin"), second.home / "out", "--scheduler", swarm.address)
    wait_for(lambda: len(swarm.state()["peers"]) == 2, "the second has come")
    kill(first.daemon_pid())
    web.pace.bytes_per_s = 20e6
    assert begun.wait(20) == 60
    assert not (first.home / "out" / "m.bin").exists()
    assert waiting.wait(60) == 0, output_within(waiting, b"", 1)
    assert got(second) == data
    again = get(first, web.url("/m.bin"), scheduler=swarm.address)
    assert got(first) == data
    assert again["sources"].get("origin", 0) == 0


def sections_noted(node: Node) -> int:
    """Return how many sections of files the cache's records know: a data space is there a moment before the record that names it."""
    records = (node.cache / "files").glob("*.json")
    return sum(len(json.loads(record.read_text())["spaces"]) for record in records)


def test_a_fetch_that_was_killed_goes_on(node: Node, web: Web, data: bytes) -> None:
    web.files["/m.bin"] = WebFile(data)
    web.pace.bytes_per_s = 5e6
    begun = node.start("get", web.url("/m.bin"), node.home / "out")
    wait_for(lambda: sections_noted(node) >= 1, "a section is complete")
    kill(node.daemon_pid())
    begun.wait(20)
    web.pace.bytes_per_s = 0
    assert list((node.home / "out").iterdir()) == []
    result = get(node, web.url("/m.bin"))
    assert got(node) == data
    assert result["sources"]["origin"] <= SIZE - (8 << 20), "what was complete is not fetched again"
    assert list((node.cache / "files").glob("*.new-*")) == []


def test_a_file_that_changes_is_never_a_mixture(node: Node, web: Web, data: bytes) -> None:
    web.files["/m.bin"] = WebFile(data + data)
    web.pace.bytes_per_s = 40e6
    begun = node.start("get", web.url("/m.bin"), node.home / "out", "--json")
    wait_for(lambda: web.bytes_sent > 8e6, "it has begun, and has sections to ask for")
    new = data[::-1]
    web.files["/m.bin"] = WebFile(new)
    web.pace.bytes_per_s = 0
    assert begun.wait(60) == 0
    assert got(node) == new


def test_the_scheduler_forgets_all_and_the_file_still_leaves_once(swarm: Swarm, web: Web, data: bytes) -> None:
    web.files["/m.bin"] = WebFile(data)
    nodes = [swarm.node(f"n{n}") for n in range(2)]
    get(nodes[0], web.url("/m.bin"), scheduler=swarm.address)
    kill(swarm.process.pid)
    swarm.start_scheduler()
    wait_for(lambda: any(f["pinned"] == f["sections"] for f in swarm.state()["files"].values()), "it is told again", 30)
    result = get(nodes[1], web.url("/m.bin"), scheduler=swarm.address)
    assert got(nodes[1]) == data
    assert result["sources"].get("origin", 0) == 0


def test_rotten_data_of_a_peer_are_found_out(swarm: Swarm, web: Web, data: bytes) -> None:
    web.files["/m.bin"] = WebFile(data)
    liar, honest = swarm.node("liar"), swarm.node("honest")
    get(liar, web.url("/m.bin"), scheduler=swarm.address)
    for file in (liar.cache / "spaces").glob("*/data"):
        with file.open("r+b") as opened:
            opened.write(os.urandom(file.stat().st_size))
    get(honest, web.url("/m.bin"), scheduler=swarm.address)
    assert got(honest) == data
    assert "wrong chunk" in honest.log()


@pytest.mark.parametrize("digest", [True, False])
def test_a_liar_who_was_first_is_overruled_by_the_server(swarm: Swarm, web: Web, data: bytes, digest: bool) -> None:
    """The first says that the file is something else. With a digest that is always seen; without, when the server is asked for a part."""
    web.files["/m.bin"] = WebFile(data[:-1] + bytes([data[-1] ^ 1]), fixed_tag='"same"')
    liar, honest = swarm.node("liar"), swarm.node("honest")
    get(liar, web.url("/m.bin"), scheduler=swarm.address)
    web.files["/m.bin"].data = data
    if not digest:
        kill(liar.daemon_pid())  # nobody has the wrong bytes any more, but the scheduler has their digests
    options = ("--digest", "sha256:" + hashlib.sha256(data).hexdigest()) if digest else ()
    result = get(honest, web.url("/m.bin"), *options, scheduler=swarm.address)
    assert got(honest) == data
    assert result["reason"]


def test_nothing_appears_that_does_not_match_the_digest(node: Node, web: Web, data: bytes) -> None:
    web.files["/m.bin"] = WebFile(data)
    web.files["/plain.bin"] = WebFile(data, ranges=False)
    wrong = "sha256:" + "0" * 64
    for path in ("/m.bin", "/plain.bin"):
        result = node.run("get", web.url(path), node.home / "out", "--digest", wrong)
        assert result.returncode == 12
        assert hashlib.sha256(data).hexdigest() in result.stderr
        assert result.stderr.count("\n") == 1
    assert list((node.home / "out").iterdir()) == []


def test_a_server_without_ranges_is_streamed_and_not_shared(swarm: Swarm, web: Web, data: bytes) -> None:
    node = swarm.node("n")
    for name, file in {
        "plain": WebFile(data, ranges=False),
        "endless": WebFile(data, ranges=False, length=False),
        "new": WebFile(data, etag=False, mtime=4e9),
        "empty": WebFile(b""),
    }.items():
        web.files[f"/{name}"] = file
        result = get(node, web.url(f"/{name}"), scheduler=swarm.address)
        assert got(node, name) == file.data, name
        assert not result["shared"], name
        assert result["reason"], name
    said = node.run("get", web.url("/plain"), node.home / "other", "--scheduler", swarm.address)
    assert "not shared with other nodes: its server gives no parts of it" in said.stderr


def test_a_private_file_is_shared_only_if_that_is_wanted_and_with_who_may_read_it(
    swarm: Swarm, web: Web, data: bytes
) -> None:
    secret = "Bearer a-secret-that-is-in-no-log"
    web.files["/m.bin"] = WebFile(data, authorization=secret)
    web.files["/away.bin"] = WebFile(b"", redirect=f"http://localhost:{web.port}/open.bin")
    web.files["/open.bin"] = WebFile(data)
    nodes = [swarm.node(f"n{n}") for n in range(3)]
    for node in nodes:
        (node.home / "headers").write_text(f"Authorization: {secret}\n")
    header = ("--header", "@headers")
    alone = get(nodes[0], web.url("/m.bin"), *header, scheduler=swarm.address)
    assert (alone["shared"], alone["sources"]["origin"]) == (False, SIZE)
    assert swarm.state()["files"] == {}
    assert nodes[0].run("get", web.url("/m.bin"), nodes[0].home / "x").returncode == 22
    get(nodes[0], web.url("/m.bin"), *header, "--share", "--force", scheduler=swarm.address)
    second = get(nodes[1], web.url("/m.bin"), *header, "--share", scheduler=swarm.address)
    assert got(nodes[1]) == data
    assert (second["shared"], second["sources"].get("origin", 0)) == (True, 0)
    web.files["/m.bin"].authorization = ""  # whoever can read it only without its secret part has another key
    before = len(web.requests)
    get(nodes[2], web.url("/away.bin"), *header, scheduler=swarm.address)
    sent = [headers.get("authorization") for path, headers in web.requests[before:] if path == "/open.bin"]
    assert sent
    assert set(sent) == {None}, "credentials go to the host of the URL alone"
    files = [
        path for node in nodes for path in node.cache.rglob("*") if path.is_file() and path.stat().st_size < 1 << 20
    ]
    assert not any(b"a-secret" in path.read_bytes() for path in files)


def test_names_that_lead_out_of_the_directory_are_refused(node: Node, web: Web) -> None:
    web.files["/a/"] = WebFile(b"x" * 10, headers={"Content-Disposition": 'attachment; filename="../../evil"'})
    web.files["/b/"] = WebFile(b"x" * 10)
    web.files["/..%2Fevil"] = WebFile(b"x" * 10)
    assert Path(get(node, web.url("/a/"))["path"]).name == "evil"
    assert [path.name for path in (node.home / "out").iterdir()] == ["evil"]
    for url in ("/b/", "/..%2Fevil"):
        result = node.run("get", web.url(url), node.home / "out")
        assert result.returncode == 2
        assert "--name" in result.stderr
    (node.home / "out" / "link").symlink_to(node.home / "elsewhere")
    assert node.run("get", web.url("/b/"), node.home / "out", "--name", "link").returncode == 2
    get(node, web.url("/b/"), "--name", "link", "--force")
    assert not (node.home / "elsewhere").exists()
    assert (node.home / "out" / "link").read_bytes() == b"x" * 10


@pytest.mark.parametrize("name", ["registry", "oci"])
def test_files_of_an_image_are_as_at_their_source(
    swarm: Swarm, registry: Registry, tree: Path, tmp_path: Path, name: str
) -> None:
    ref = f"localhost:{registry.port}/get/tree:v1" if name == "registry" else f"oci:{tmp_path / 'layout'}:v1"
    swarm.host.build(tree, ref)
    nodes = [swarm.node(f"n{n}") for n in range(2)]
    get_together(swarm, nodes, ref)
    for node in nodes:
        assert compare_trees(tree, node.home / "out") == []
    result = nodes[0].run("get", ref, nodes[0].home / "out")
    assert (result.returncode, "is not empty" in result.stderr) == (2, True)
    result = nodes[0].run("get", ref, nodes[0].home / "some", "no/such*")
    assert result.returncode == 2
    assert "no/such*" in result.stderr


def test_of_an_image_only_what_is_named_is_fetched(node: Node, registry: Registry, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    rng = random.Random(3)
    for path in ("big.bin", "deep/one.bin", "deep/er/two.bin", "deep/er/three.txt"):
        (source / path).write_bytes(rng.randbytes(3 << 20))
    ref = f"localhost:{registry.port}/get/some:v1"
    node.build(source, ref)
    result = node.json("get", ref, node.home / "out", "deep/**/*.bin")
    assert (result["files"], result["bytes"]) == (2, 6 << 20)
    assert result["sources"]["origin"] <= 8 << 20
    found = sorted(str(p.relative_to(node.home / "out")) for p in (node.home / "out").rglob("*") if p.is_file())
    assert found == ["deep/er/two.bin", "deep/one.bin"]
    for path in found:
        assert (node.home / "out" / path).read_bytes() == (source / path).read_bytes()


def test_what_is_got_can_be_removed_from_the_cache(node: Node, web: Web, data: bytes) -> None:
    web.files["/m.bin"] = WebFile(data)
    get(node, web.url("/m.bin?ignored=1"), "--ignore-query", "ignored")
    assert get(node, web.url("/m.bin?ignored=2"), "--ignore-query", "ignored", "--force")["sources"] == {}
    freed = node.json("cache", "rm", web.url("/m.bin"))["freed_bytes"]
    assert freed == SIZE
    assert json.loads(node.rafs("cache", "ls", "--json"))["spaces"] == []
    assert got(node) == data


def test_an_interrupt_leaves_nothing_in_the_directory(node: Node, web: Web, data: bytes) -> None:
    web.files["/m.bin"] = WebFile(data)
    web.pace.bytes_per_s = 10e6
    begun = node.start("get", web.url("/m.bin"), node.home / "out")
    wait_for(lambda: web.bytes_sent > 1e6, "it has begun")
    begun.send_signal(signal.SIGINT)
    assert begun.wait(20) == 130
    assert list((node.home / "out").iterdir()) == []
    assert re.search(r"rafs: interrupted", output_within(begun, b"interrupted", 5).decode())
