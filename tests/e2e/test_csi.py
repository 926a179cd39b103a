"""Volumes as pods have them: the driver, the node daemon, a kubelet that speaks real gRPC, pods in mount namespaces of their own.

Every test ends with nothing mounted and nothing recorded.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from rafsfs.csi._pb import csi_pb2 as pb
from tests.support.compare import compare_trees
from tests.support.go_tools import go_program
from tests.support.kubelet import Kubelet, mount_capability, running_kubelet
from tests.support.processes import kill, mountpoints_below, output_within, wait_for
from tests.support.registry import Registry, running_token_registry

_SANITY = Path(__file__).parents[1] / "support" / "csi_sanity"
_READER = """
import hashlib, os, sys, time
print("started", flush=True)
for turn in range(1000):
    digest = hashlib.blake2b()
    for name in sorted(os.listdir(sys.argv[1])):
        with open(os.path.join(sys.argv[1], name), "rb") as file:
            digest.update(file.read())
    print(digest.hexdigest(), flush=True)
    time.sleep(0.5)
"""


@pytest.fixture
def kubelet(tmp_path: Path) -> Iterator[Kubelet]:
    with running_kubelet(tmp_path / "host") as kubelet:
        yield kubelet
        wait_for(lambda: not left_over(kubelet), "nothing is left", 30)


def left_over(kubelet: Kubelet) -> list[str]:
    """Whatever is still there of volumes."""
    places = [p for p in mountpoints_below(kubelet.home) if "/pods/" in p or "/csi/" in p]
    return places + [str(p) for p in (kubelet.node.cache / "csi" / "volumes").glob("*.json")]


def daemon_of(kubelet: Kubelet) -> int | None:
    with contextlib.suppress(LookupError):
        return kubelet.node.daemon_pid()
    return None


def source(tmp_path: Path, name: str = "source", size: int = 6 << 20) -> Path:
    top = tmp_path / name
    (top / "sub").mkdir(parents=True)
    (top / "config.json").write_text('{"a": 1}\n')
    (top / "weights.bin").write_bytes(random.Random(name).randbytes(size))
    (top / "sub" / "more.bin").write_bytes(random.Random(name + "2").randbytes(70_000))
    return top


def code(error: pytest.ExceptionInfo[grpc.RpcError]) -> grpc.StatusCode:
    return error.value.code()  # type: ignore[attr-defined, no-any-return]


def published(registry: Registry, kubelet: Kubelet, top: Path, name: str = "model") -> str:
    ref = f"localhost:{registry.port}/csi/{name}:v1"
    kubelet.node.build(top, ref)
    return ref


@pytest.fixture(scope="session")
def csi_sanity() -> Path:
    return go_program(_SANITY, "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity")


def test_csi_sanity_passes(kubelet: Kubelet, registry: Registry, tmp_path: Path, csi_sanity: Path) -> None:
    parameters = tmp_path / "parameters.yaml"
    parameters.write_text(f"ref: {published(registry, kubelet, source(tmp_path))}\n")
    done = subprocess.run(
        [
            csi_sanity, "-csi.endpoint", f"unix://{kubelet.socket}", "-csi.testvolumeparameters", parameters,
            "-csi.mountdir", kubelet.home / "mount", "-csi.stagingdir", kubelet.home / "stage", "-ginkgo.no-color",
        ],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert "33 Passed | 0 Failed" in done.stdout, done.stdout[-2000:]


def test_ten_pods_of_one_model_fetch_it_once_and_read_on_when_the_driver_dies(
    kubelet: Kubelet, registry: Registry, tmp_path: Path
) -> None:
    top = source(tmp_path)
    shutil.rmtree(top / "sub")
    ref = published(registry, kubelet, top)
    size = sum(path.stat().st_size for path in top.iterdir())
    expected = hashlib.blake2b(b"".join(path.read_bytes() for path in sorted(top.iterdir()))).hexdigest().encode()
    targets = [kubelet.publish(f"csi-{n}", {"ref": ref}, f"pod-{n}") for n in range(10)]
    assert len([p for p in mountpoints_below(kubelet.node.cache) if "/csi/mounts/" in p]) == 1
    readers = [kubelet.pod(target, _READER) for target in targets]
    running = [reader.__enter__() for reader in readers]
    try:
        for process in running:
            assert expected in output_within(process, b"\n" + expected, 60)
        kubelet.kill_driver()
        kubelet.start()
        kubelet.publish("csi-0", {"ref": ref}, "pod-0")  # as the kubelet does after a restart
        for process in running:
            said = output_within(process, expected, 30)
            assert set(said.split()) <= {expected, b"started"}
        fetched = kubelet.node.json("status")["fetch"]["origin_bytes"]
        assert fetched <= size
    finally:
        for reader in readers:
            reader.__exit__(None, None, None)
    with pytest.raises(OSError, match="Read-only"):
        (targets[0] / "new").write_text("no")
    for n in range(10):
        kubelet.unpublish(f"csi-{n}", f"pod-{n}")
    assert not any(target.exists() for target in targets)


def test_who_may_not_pull_may_not_read_what_another_pod_has_fetched(kubelet: Kubelet, tmp_path: Path) -> None:
    with running_token_registry(tmp_path / "registry") as registry:
        ref = f"{registry.address}/csi/private:v1"
        top = source(tmp_path)
        auth = base64.b64encode(f"{registry.username}:{registry.password}".encode()).decode()
        good = {".dockerconfigjson": json.dumps({"auths": {registry.address: {"auth": auth}}})}
        bad_auth = base64.b64encode(f"{registry.username}:wrong".encode()).decode()
        bad = {".dockerconfigjson": json.dumps({"auths": {registry.address: {"auth": bad_auth}}})}
        config = kubelet.node.home / ".docker"
        config.mkdir()
        (config / "config.json").write_text(good[".dockerconfigjson"])
        kubelet.node.build(top, ref)
        shutil.rmtree(config)
        target = kubelet.publish("csi-good", {"ref": ref, "prefetch": "all"}, "good", secrets=good)
        assert compare_trees(top, target) == []
        for secrets in (bad, {}):
            with pytest.raises(grpc.RpcError) as error:
                kubelet.publish("csi-bad", {"ref": ref}, "bad", secrets=secrets)
            assert code(error) is grpc.StatusCode.UNAUTHENTICATED
        kubelet.publish("csi-good", {"ref": ref, "prefetch": "all"}, "good", secrets=good)
        page = kubelet.page("/v1/pods/uid-good/volumes")["volumes"][0]
        pinned = f"{ref.partition('@')[0]}@{page['digest']}"
        registry.stop()
        other = kubelet.publish("csi-other", {"ref": pinned}, "other", secrets=good)
        assert compare_trees(top, other) == []
        with pytest.raises(grpc.RpcError) as error:
            kubelet.publish("csi-bad", {"ref": pinned}, "bad", secrets=bad)
        assert code(error) is grpc.StatusCode.UNAVAILABLE
        secret = registry.password
        registry.start()
    log = (kubelet.home / "driver.log").read_text() + (kubelet.home / "daemon.log").read_text()
    assert secret not in log
    assert auth not in log
    for path in (kubelet.node.cache / "csi" / "auth").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0
    for volume, pod in (("csi-good", "good"), ("csi-other", "other"), ("csi-bad", "bad")):
        kubelet.unpublish(volume, pod)
    assert list((kubelet.node.cache / "csi" / "auth").iterdir()) == []


def test_credentials_are_rotated_under_a_reader_and_nothing_is_mounted_anew(kubelet: Kubelet, tmp_path: Path) -> None:
    def secret_of(password: str) -> tuple[str, dict[str, str]]:
        auth = base64.b64encode(f"ada:{password}".encode()).decode()
        return auth, {".dockerconfigjson": json.dumps({"auths": {registry.address: {"auth": auth}}})}

    with running_token_registry(tmp_path / "registry", life_s=1) as registry:  # no token is used twice
        assert registry.tokens is not None
        top = source(tmp_path, size=24 << 20)
        ref = f"{registry.address}/csi/private:v1"
        _, first = secret_of(registry.password)
        (kubelet.node.home / ".docker").mkdir()
        (kubelet.node.home / ".docker" / "config.json").write_text(first[".dockerconfigjson"])
        kubelet.node.build(top, ref)
        shutil.rmtree(kubelet.node.home / ".docker")
        target = kubelet.publish("csi-1", {"ref": ref}, secrets=first)
        before = _mount_at(target)
        wanted = (top / "weights.bin").read_bytes()
        with (target / "weights.bin").open("rb", buffering=0) as file:
            assert file.read(1 << 20) == wanted[: 1 << 20]
            auth, second = secret_of("new")
            registry.tokens.basic = f"Basic {auth}"
            kubelet.publish("csi-1", {"ref": ref}, secrets=second)
            assert _mount_at(target) == before
            assert os.pread(file.fileno(), 1 << 20, 23 << 20) == wanted[23 << 20 :]
            assert registry.tokens.authorizations[-1] == registry.tokens.basic
        assert compare_trees(top, target) == []
        with pytest.raises(grpc.RpcError) as error:
            kubelet.publish("csi-1", {"ref": ref}, secrets=first)
        assert code(error) is grpc.StatusCode.UNAUTHENTICATED
        assert _mount_at(target) == before, "what is mounted stays, whatever a later publish brings"
        kubelet.unpublish("csi-1")


def _mount_at(target: Path) -> str:
    """The kernel's number of the mount at a path, which no other mount has while it lives."""
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    (number,) = [fields[0] for fields in lines if fields[4] == str(target)]
    return number


def test_a_claim_keeps_the_content_that_its_tag_had(kubelet: Kubelet, registry: Registry, tmp_path: Path) -> None:
    first = source(tmp_path, "first")
    ref = published(registry, kubelet, first)
    capability = mount_capability(mode=pb.VolumeCapability.AccessMode.MULTI_NODE_READER_ONLY)
    request = pb.CreateVolumeRequest(name="pvc-1", volume_capabilities=[capability], parameters={"ref": ref})
    volume = kubelet.call("Controller", "CreateVolume", request).volume
    kubelet.node.build(source(tmp_path, "second"), ref)
    assert kubelet.call("Controller", "CreateVolume", request).volume == volume
    target = kubelet.publish(volume.volume_id, dict(volume.volume_context), inline=False)
    assert compare_trees(first, target) == []
    stats = kubelet.call(
        "Node",
        "NodeGetVolumeStats",
        pb.NodeGetVolumeStatsRequest(volume_id=volume.volume_id, volume_path=str(target)),
    )
    assert not stats.volume_condition.abnormal
    assert stats.usage[0].used == stats.usage[0].total > 6 << 20
    kubelet.unpublish(volume.volume_id)
    kubelet.call("Controller", "DeleteVolume", pb.DeleteVolumeRequest(volume_id=volume.volume_id))


def test_a_volume_shows_and_fetches_what_its_pod_wants(kubelet: Kubelet, registry: Registry, tmp_path: Path) -> None:
    top = source(tmp_path)
    ref = published(registry, kubelet, top)
    target = kubelet.publish("csi-part", {"ref": ref, "exclude": '["weights.bin"]', "prefetch": "all"})
    other = kubelet.publish("csi-all", {"ref": ref}, "other")
    assert sorted(os.listdir(target)) == ["config.json", "sub"]
    assert compare_trees(top / "sub", target / "sub") == []
    wait_for(lambda: kubelet.page("/v1/volumes/csi-part")["complete"], "the part is complete")
    assert kubelet.page("/v1/volumes/csi-part")["total_bytes"] < 1 << 20
    assert compare_trees(top, other) == []
    kubelet.unpublish("csi-part")
    kubelet.unpublish("csi-all", "other")


def test_fifty_publishes_at_once(kubelet: Kubelet, registry: Registry, tmp_path: Path) -> None:
    tops = [source(tmp_path, f"m{n}", 1 << 20) for n in range(3)]
    refs = [published(registry, kubelet, top, f"m{n}") for n, top in enumerate(tops)]
    with ThreadPoolExecutor(50) as pool:
        targets = list(pool.map(lambda n: kubelet.publish(f"csi-{n}", {"ref": refs[n % 3]}, f"pod-{n}"), range(50)))
        for n, target in enumerate(targets):
            assert (target / "weights.bin").read_bytes() == (tops[n % 3] / "weights.bin").read_bytes()
        list(pool.map(lambda n: kubelet.unpublish(f"csi-{n}", f"pod-{n}"), range(50)))


def test_calls_in_any_order_with_crashes_between_end_well(kubelet: Kubelet, registry: Registry, tmp_path: Path) -> None:
    tops = [source(tmp_path, f"m{n}", 1 << 20) for n in range(2)]
    refs = [published(registry, kubelet, top, f"m{n}") for n, top in enumerate(tops)]
    rng = random.Random(20)
    for turn in range(24):
        number = rng.randrange(4)
        volume = f"csi-{number}"
        act = rng.choice(("publish", "publish", "publish", "unpublish", "driver", "daemon", "worker", "half"))
        if act == "publish":
            target = kubelet.publish(volume, {"ref": refs[number % 2]})
            assert (target / "weights.bin").read_bytes() == (tops[number % 2] / "weights.bin").read_bytes(), turn
        elif act == "unpublish":
            kubelet.unpublish(volume)
        elif act == "half":  # the driver dies while it publishes
            caller = threading.Thread(target=_publish_whatever_comes, args=(kubelet, volume, refs[number % 2]))
            caller.start()
            kubelet.kill_driver()
            kubelet.disconnect()
            caller.join(60)
            kubelet.start()
        elif act == "driver":
            kubelet.kill_driver()
            kubelet.start()
        elif act == "daemon":
            kill(wait_for(lambda: daemon_of(kubelet), "a daemon"))
            kubelet.start_daemon()
        else:
            for pid in kubelet.node.worker_pids()[:1]:
                kill(pid)
    for number in range(4):
        kubelet.unpublish(f"csi-{number}")
        kubelet.unpublish(f"csi-{number}")


def _publish_whatever_comes(kubelet: Kubelet, volume: str, ref: str) -> None:
    with contextlib.suppress(grpc.RpcError, ValueError):  # it may be cut off
        kubelet.publish(volume, {"ref": ref})


def test_a_pod_adds_and_removes_models(kubelet: Kubelet, registry: Registry, tmp_path: Path) -> None:
    tops = [source(tmp_path, f"m{n}", 1 << 20) for n in range(2)]
    refs = [published(registry, kubelet, top, f"m{n}") for n, top in enumerate(tops)]
    target = kubelet.publish("csi-dynamic", {"dynamic": "true"})
    with pytest.raises(OSError, match="Read-only"):
        (target / "mine").write_text("no")
    socket = ("--socket", str(target / "rafs.sock"))
    assert (target / "rafs.sock").stat().st_mode & 0o777 == 0o666, "processes of the pod need not be root"
    node = kubelet.node
    inside = ("unshare", "--mount", "--propagation", "slave", "--")
    for n, ref in enumerate(refs):
        assert node.run("models", "add", ref, f"model-{n}", *socket, wrap=inside).returncode == 0
    assert node.run("models", "add", refs[0], "model-0", *socket).returncode == 0
    assert node.run("models", "add", refs[1], "model-0", *socket).returncode == 2
    assert node.run("models", "add", "oci:/etc", "x", *socket).returncode == 2
    assert node.run("models", "add", refs[1], "../x", *socket).returncode == 2
    kubelet.kill_driver()
    kubelet.start()
    wait_for(lambda: node.run("models", "ls", *socket).returncode == 0, "the next driver serves the socket")
    listed = _ask_as_nobody(target, "GET", "/v1/models")["models"]
    assert [model["name"] for model in listed] == ["model-0", "model-1"]
    assert _ask_as_nobody(target, "PUT", "/v1/models/model-0", {"ref": refs[0]})["name"] == "model-0"
    for n, top in enumerate(tops):
        assert compare_trees(top, target / f"model-{n}") == []
    page = f"http://127.0.0.1:{kubelet.pages}/v1/pods/uid-pod/volumes"
    wait = ("--until", "complete", "--url", page, "--timeout", "30s")
    assert node.run("wait", target / "model-1", *wait).returncode == 0
    request = pb.NodeGetVolumeStatsRequest(volume_id="csi-dynamic", volume_path=str(target))
    stats = kubelet.call("Node", "NodeGetVolumeStats", request)
    assert not stats.volume_condition.abnormal, stats
    assert stats.usage[0].used == stats.usage[0].total > 2 << 20
    assert node.run("models", "rm", "model-0", *socket).returncode == 0
    assert sorted(os.listdir(target)) == ["model-1", "rafs.sock"]
    kubelet.unpublish("csi-dynamic")


_ASK = """
import http.client, json, os, socket, sys
method, path, body = sys.argv[1:]
class Line(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect("/mnt/rafs.sock")
os.setgroups([])
os.setgid(65532)
os.setuid(65532)
line = Line("volume")
line.request(method, path, body)
answer = line.getresponse()
print(answer.read().decode())
sys.exit(answer.status != 200)
"""
"""What any program in a pod can do with the socket, without `rafs` and without being root."""


def _ask_as_nobody(target: Path, method: str, path: str, body: object = None) -> dict[str, Any]:
    text = "" if body is None else json.dumps(body)
    # A pod has its volume somewhere that it can get at, as /mnt here.
    command = 'mount --rbind "$1" /mnt && shift && exec "$@"'
    arguments = [sys.executable, "-c", _ASK, method, path, text]
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "slave", "--", "sh", "-c", command, "sh", str(target), *arguments],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_pages_and_wait_tell_how_far_a_volume_is(kubelet: Kubelet, registry: Registry, tmp_path: Path) -> None:
    top = source(tmp_path)
    target = kubelet.publish("csi-1", {"ref": published(registry, kubelet, top), "subPath": "sub"})
    assert compare_trees(top / "sub", target) == []
    url = f"http://127.0.0.1:{kubelet.pages}/v1/pods/uid-pod/volumes"
    assert kubelet.node.run("wait", target, "--until", "first-byte").returncode == 0
    early = kubelet.node.run("wait", target, "--until", "complete", "--url", url, "--timeout", "1s")
    assert early.returncode == 24, early
    half = kubelet.publish("csi-3", {"ref": published(registry, kubelet, source(tmp_path, "half"), "half")}, "pod")
    assert compare_trees(tmp_path / "half", half) == []
    of_one = ("--url", url, "--timeout", "20s")
    assert kubelet.node.run("wait", half, "--until", "percent=50", *of_one).returncode == 0, (
        "by the volume, not the pod"
    )
    kubelet.unpublish("csi-3")
    again = {"ref": f"localhost:{registry.port}/csi/model:v1", "prefetch": "all"}
    kubelet.publish("csi-2", again, "other")
    done = kubelet.node.run("wait", target, "--until", "complete", "--url", url, "--timeout", "40s")
    assert done.returncode == 0, done
    assert kubelet.page("/v1/volumes/csi-2")["complete"]
    kubelet.unpublish("csi-1")
    kubelet.unpublish("csi-2", "other")
