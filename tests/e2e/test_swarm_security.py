"""A swarm that lets only its own in: real processes, real certificates, loopback."""

from __future__ import annotations

import base64
import json
import ssl
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.processes import kill, wait_for
from tests.support.registry import Registry, running_token_registry
from tests.support.swarm import Swarm, fetched, push, read_all, size_of


def secure(swarm: Swarm, variables: dict[str, str]) -> None:
    """Start the scheduler again, with these settings."""
    kill(swarm.process.pid)
    swarm.host.env.update(variables)
    swarm.start_scheduler()


def test_a_swarm_with_certificates_fetches_once_and_refuses_others(
    tmp_path: Path, registry: Registry, noise: Path
) -> None:
    authority, foreign = Authority(tmp_path / "ca"), Authority(tmp_path / "foreign")
    with ExitStack() as stack:
        swarm = Swarm(tmp_path, stack)
        ref = push(swarm.host, noise, registry)
        secure(swarm, authority.issue("scheduler"))
        nodes = [swarm.node(f"n{n}", **authority.issue(f"n{n}")) for n in range(2)]
        strangers = [swarm.node("bare"), swarm.node("foreign", **foreign.issue("foreign"))]
        read_all(noise, swarm.mount([*nodes, *strangers], ref))
        size = size_of(nodes[0])
        assert fetched(nodes)["origin_bytes"] <= 1.02 * size
        assert fetched(nodes)["peer_bytes"] >= 0.9 * size
        assert fetched(strangers)["origin_bytes"] == 2 * size, "they are left to themselves"
        assert len(swarm.state()["peers"]) == 2
        assert "scheduler" in strangers[1].log()
        assert "not accepted" in strangers[1].log(), "it says what is wrong"

        port = nodes[0].json("status")["swarm"]["port"]
        context = ssl.create_default_context(cafile=str(authority.ca))
        with pytest.raises((ssl.SSLError, urllib.error.URLError, ConnectionError)):
            urllib.request.urlopen(f"https://127.0.0.1:{port}/v1/x", timeout=10, context=context)
        context.load_cert_chain(tmp_path / "ca" / "n1.pem", tmp_path / "ca" / "n1.key")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"https://127.0.0.1:{port}/v1/x", timeout=10, context=context)

        seed = swarm.node("seed", RAFS_SCHEDULER=swarm.address, RAFS_SEED="1", **authority.issue("seed"))
        seed.start("daemon", "--cache-dir", seed.cache)
        wait_for(lambda: len(swarm.state()["peers"]) == 3, "the seed is known")
        done = swarm.host.json("preheat", ref, "--scheduler", swarm.address)
        assert [(node["done_bytes"] == node["data_bytes"] > 0, node["error"]) for node in done["nodes"]] == [(True, "")]
        refused = strangers[1].run("preheat", ref, "--scheduler", swarm.address)
        assert refused.returncode == 20, refused
        assert "certificate" in refused.stderr


def test_a_daemon_with_wrong_files_says_so_in_one_line(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    with ExitStack() as stack:
        node = Swarm(tmp_path, stack).node("n", **{**authority.issue("n"), "RAFS_SWARM_KEY": str(authority.ca)})
        for command in (("daemon",), ("scheduler",), ("preheat", "x/y:z", "--scheduler", "127.0.0.1:1")):
            result = node.run(*command)
            assert result.returncode == 2, result
            assert result.stderr.startswith("rafs: ")
            assert result.stderr.count("\n") == 1, result.stderr


def test_who_may_not_pull_an_image_gets_nothing_of_it_from_its_peers(tmp_path: Path, noise: Path) -> None:
    with ExitStack() as stack:
        registry = stack.enter_context(running_token_registry(tmp_path / "registry"))
        swarm = Swarm(tmp_path, stack)
        login = base64.b64encode(f"{registry.username}:{registry.password}".encode()).decode()
        member, stranger = swarm.node("member"), swarm.node("stranger")
        for node in (swarm.host, member):
            (node.home / ".docker").mkdir()
            (node.home / ".docker" / "config.json").write_text(
                json.dumps({"auths": {registry.address: {"auth": login}}})
            )
        ref = push(swarm.host, noise, registry, name="private")
        read_all(noise, swarm.mount([member], ref))
        (stranger.home / "mnt").mkdir()
        refused = stranger.run("mount", ref, stranger.home / "mnt", "--scheduler", swarm.address)
        assert refused.returncode == 22, refused
        digest = member.json("status")["mounts"][0]["digest"]
        pinned = f"{ref.rpartition(':')[0]}@{digest}"
        assert stranger.run("mount", pinned, stranger.home / "mnt", "--scheduler", swarm.address).returncode == 22

        status = member.json("status")["swarm"]
        for task in status["tasks"]:  # it knows the name of the task, and where it is
            for path in ("have/" + "0" * 32, "0-0/" + "0" * 32, "0-0/" + task[:32], "have/" + task[:32]):
                with pytest.raises(urllib.error.HTTPError, match="404"):
                    urllib.request.urlopen(f"http://127.0.0.1:{status['port']}/v1/{task}/{path}", timeout=10)
        assert status["tasks"]
        assert status["uploaded_bytes"] == 0
        for node in (member, stranger):
            assert registry.password not in node.log()
            assert login not in node.log()
