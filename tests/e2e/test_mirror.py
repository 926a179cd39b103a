"""Unmodified clients pull ordinary images through their nodes: containerd and skopeo, real registries, nodes in network namespaces."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.namespaces import Rig, running_rig
from tests.support.oci_image import make_oci_image
from tests.support.processes import Node, needs, output_within, running_node, wait_for
from tests.support.registry import Registry, free_port, running_registry, running_token_registry
from tests.support.swarm import Swarm, together

_SIZES = [30 << 20, 3 << 20]


@contextmanager
def containerd(home: Path, rig: Rig, machine: str, registry: str, mirror: str) -> Iterator[list[str]]:
    """Run containerd on a machine with a mirror for a registry; give the start of a `ctr` command line."""
    home.mkdir()
    hosts = home / "certs.d" / registry
    hosts.mkdir(parents=True)
    (hosts / "hosts.toml").write_text(
        f'server = "http://{registry}"\n[host."http://{mirror}"]\n  capabilities = ["pull", "resolve"]\n'
    )
    config = home / "config.toml"
    config.write_text(
        f'version = 2\nroot = "{home}/root"\nstate = "{home}/state"\n'
        'disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n'
        f'[grpc]\n  address = "{home}/c.sock"\n[ttrpc]\n  address = "{home}/t.sock"\n'
    )
    log = (home / "log").open("wb")
    process = subprocess.Popen([*rig.inside(machine), "containerd", "-c", config], stdout=log, stderr=log)
    try:
        wait_for((home / "c.sock").exists, "containerd", 30)
        yield [*rig.inside(machine), "ctr", "--address", f"{home}/c.sock"]
    finally:
        process.terminate()
        process.wait(20)
        log.close()


@pytest.mark.skipif(
    needs("containerd", "ctr", "skopeo", "ip") is not None, reason=str(needs("containerd", "ctr", "skopeo", "ip"))
)
def test_four_nodes_pull_an_image_by_containerd_and_skopeo_and_its_registry_gives_it_once(tmp_path: Path) -> None:
    digest = make_oci_image(tmp_path / "image", _SIZES)
    size = sum(path.stat().st_size for path in (tmp_path / "image" / "blobs" / "sha256").iterdir())
    with running_registry(tmp_path / "registry") as local:
        _skopeo(
            "copy", "--dest-tls-verify=false", f"oci:{tmp_path}/image:v1", f"docker://localhost:{local.port}/lib/app:v1"
        )
        storage = next(path for path in (tmp_path / "registry").rglob("docker") if path.is_dir()).parent
    with ExitStack() as stack:
        rig = stack.enter_context(running_rig())
        for name in ("origin", "scheduler", "n0", "n1", "n2", "n3"):
            rig.add(name, 1000)
        registry = stack.enter_context(rig.registry("origin", storage))
        swarm = Swarm(tmp_path / "swarm", stack, rig)
        mirror = "127.0.0.1:9899"
        nodes = []
        for n in range(4):
            env = {"RAFS_SCHEDULER": swarm.address, "RAFS_MIRROR": mirror, "RAFS_MIRROR_DEFAULT": registry}
            node = swarm.node(f"n{n}", RAFS_PLAIN_HTTP="1", **env)
            started = node.start("daemon", "--cache-dir", node.cache)
            output_within(started, b"mirror serves", 30)
            nodes.append(node)

        def by_containerd(n: int) -> None:
            ctr = stack.enter_context(containerd(tmp_path / f"c{n}", rig, f"n{n}", registry, mirror))
            hosts = tmp_path / f"c{n}" / "certs.d"
            pull = ["image", "pull", "--hosts-dir", hosts, "--snapshotter", "native", f"{registry}/lib/app:v1"]
            _run([*ctr, *map(str, pull)])
            assert digest in _run([*ctr, "image", "ls"])

        def by_skopeo(n: int) -> None:
            out = tmp_path / f"out{n}"
            source = f"docker://{mirror}/lib/app:v1"
            _run([*rig.inside(f"n{n}"), "skopeo", "copy", "--src-tls-verify=false", source, f"dir:{out}"])
            manifest = (out / "manifest.json").read_bytes()
            assert f"sha256:{hashlib.sha256(manifest).hexdigest()}" == digest
            for layer in json.loads(manifest)["layers"]:
                data = (out / layer["digest"].removeprefix("sha256:")).read_bytes()
                assert f"sha256:{hashlib.sha256(data).hexdigest()}" == layer["digest"]

        together([lambda: by_containerd(0), lambda: by_containerd(1), lambda: by_skopeo(2), lambda: by_skopeo(3)])
        fetched = sum(node.json("status")["fetch"].get("origin_bytes", 0) for node in nodes)
        assert 0.99 * size <= fetched <= 1.02 * size, (fetched, size)
        assert rig.sent_bytes("origin") <= 1.25 * size, "with manifests, probes and all that a link carries"


@pytest.fixture
def mirrored(tmp_path: Path) -> Iterator[tuple[Registry, Node, int]]:
    """A registry that asks for tokens, and a node that mirrors it."""
    with running_token_registry(tmp_path / "registry") as registry, ExitStack() as stack:
        port = free_port()
        address = registry.address
        node = stack.enter_context(
            running_node(
                tmp_path / "node",
                env={
                    "RAFS_MIRROR": f"127.0.0.1:{port}",
                    "RAFS_MIRROR_DEFAULT": address,
                    "RAFS_MIRROR_REGISTRY": address,
                },
            )
        )
        make_oci_image(tmp_path / "image", [20 << 20])
        _skopeo(
            "copy", "--dest-tls-verify=false", "--dest-creds", f"{registry.username}:{registry.password}",
            f"oci:{tmp_path}/image:v1", f"docker://{address}/lib/app:v1",
        )  # fmt: skip
        started = node.start("daemon", "--cache-dir", node.cache)
        output_within(started, b"mirror serves", 30)
        yield registry, node, port


def test_credentials_are_the_clients_own_and_ranges_are_answered(
    mirrored: tuple[Registry, Node, int], tmp_path: Path
) -> None:
    registry, node, port = mirrored
    where = f"docker://127.0.0.1:{port}/lib/app:v1"
    refused = subprocess.run(
        ["skopeo", "copy", "--src-tls-verify=false", where, f"dir:{tmp_path}/no"], capture_output=True, check=False
    )
    assert refused.returncode != 0
    credentials = f"{registry.username}:{registry.password}"
    _skopeo("copy", "--src-tls-verify=false", "--src-creds", credentials, where, f"dir:{tmp_path}/yes")
    manifest = json.loads((tmp_path / "yes" / "manifest.json").read_bytes())
    layer = manifest["layers"][0]
    data = (tmp_path / "yes" / layer["digest"].removeprefix("sha256:")).read_bytes()

    def ask(method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    blob = f"/v2/lib/app/blobs/{layer['digest']}?ns={registry.address}"
    status, headers, _ = ask("GET", blob)
    assert status == 401, "what another client has fetched is not for everybody"
    token = _token(headers["www-authenticate"], credentials)
    bearer = {"Authorization": f"Bearer {token}"}
    assert ask("HEAD", blob, **bearer)[:1] == (200,)
    assert ask("HEAD", blob, **bearer)[1]["content-length"] == str(len(data))
    status, headers, body = ask("GET", blob, Range="bytes=1000-17999999", **bearer)
    assert (status, body == data[1000:18_000_000]) == (206, True)
    assert headers["content-range"] == f"bytes 1000-17999999/{len(data)}"
    assert ask("GET", blob, Range=f"bytes={len(data)}-", **bearer)[0] == 416
    assert ask("GET", blob, Range="bytes=-5", **bearer)[2] == data[-5:]
    assert ask("GET", blob, **{"If-None-Match": f'"{layer["digest"]}"'}, **bearer)[0] == 304
    assert ask("GET", "/v2/")[0] == 401, "clients learn here how the registry wants to be asked"
    assert ask("GET", "/v2/lib/app/blobs/sha256:00?ns=localhost:1")[0] == 400
    assert ask("GET", f"/v2/lib/app/blobs/{layer['digest']}?ns=127.0.0.1:22")[0] == 400
    assert ask("POST", "/v2/lib/app/blobs/uploads/")[0] == 405
    assert node.json("status")["fetch"]["origin_bytes"] <= 1.01 * sum(
        path.stat().st_size for path in (tmp_path / "yes").iterdir()
    )
    assert token not in node.log()


def _token(challenge: str, credentials: str) -> str:
    fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    url = f"{fields['realm']}?service={fields['service']}&scope={fields['scope']}"
    basic = base64.b64encode(credentials.encode()).decode()
    request = urllib.request.Request(url, headers={"Authorization": f"Basic {basic}"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        found = json.load(answer)
    text: str = found.get("token") or found["access_token"]
    return text


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (command, done.stdout[-1500:], done.stderr[-1500:])
    return done.stdout


def _skopeo(*arguments: str) -> None:
    _run(["skopeo", "--insecure-policy", *arguments])
