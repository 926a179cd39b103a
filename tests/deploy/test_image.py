"""The image that the Dockerfile makes, built here and run by runc as the manifests say: root read-only, users and rights as there.

It takes minutes and packages of the network, so it runs when asked for: `make image`.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import rafsfs
from rafsfs.csi._pb import csi_pb2 as pb
from tests.support.compare import compare_trees
from tests.support.kubelet import CONTAINER, Installation, running_kubelet
from tests.support.processes import mountpoints_below, wait_for
from tests.support.registry import Registry, running_registry

from .conftest import ROOT

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif("RAFS_TEST_IMAGE" not in os.environ, reason="builds an image for minutes; `make image` runs it"),
]
_SCRIPT = ROOT / "scripts" / "image.sh"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The image's root directory. RAFS_TEST_IMAGE may name a directory, which stays, and makes the next build faster."""
    kept = os.environ["RAFS_TEST_IMAGE"]
    work = Path(kept) if kept.startswith("/") else tmp_path_factory.mktemp("image")
    try:
        built = subprocess.run([_SCRIPT, work], stdout=subprocess.PIPE, text=True, check=True, timeout=1500)
        yield Path(built.stdout.splitlines()[-1])
    finally:
        if not kept.startswith("/"):
            subprocess.run([_SCRIPT, work, "clean"], check=False, timeout=120)


class Containers:
    """Runs commands of the image by runc: on the host's network, in namespaces of their own else."""

    def __init__(self, root: Path, home: Path) -> None:
        self._root = root
        self._home = home

    def line(self, arguments: Sequence[str], *, shared: Path | None = None) -> list[str]:
        """Return the command line of a container. `shared`: a directory of the host whose mounts are seen both ways; then it is
        privileged and root, else it is what the image says and has no rights.
        """
        name = f"rafs-{uuid.uuid4().hex[:8]}"
        bundle = self._home / name
        bundle.mkdir(parents=True)
        (bundle / "config.json").write_text(json.dumps(self._config(arguments, shared)))
        # In process ids of its own: who kills it ends runc and all that it runs.
        return [*CONTAINER, "runc", "--root", str(self._home / "state"), "run", "--bundle", str(bundle), name]

    def _config(self, arguments: Sequence[str], shared: Path | None) -> dict[str, Any]:
        capabilities: dict[str, Any] = {}
        mounts: list[dict[str, Any]] = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
            *(
                {"destination": path, "type": "bind", "source": path, "options": ["bind", "ro"]}
                for path in ("/etc/hosts", "/etc/resolv.conf")
            ),
        ]
        if shared is None:
            mounts.append(
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}
            )
        else:
            names = _capabilities()
            capabilities = dict.fromkeys(("bounding", "effective", "permitted"), names)
            mounts += [
                {"destination": path, "type": "bind", "source": path, "options": ["rbind"]} for path in ("/dev", "/sys")
            ]
            mounts.append(
                {"destination": str(shared), "type": "bind", "source": str(shared), "options": ["rbind", "rshared"]}
            )
        user = 65532 if shared is None else 0
        environment = {"PATH": "/opt/rafs/bin:/usr/bin:/bin:/usr/sbin:/sbin", "PYTHONDONTWRITEBYTECODE": "1"}
        if shared is not None:
            environment["HOME"] = str(shared)
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": user, "gid": user},
                "args": ["rafs", *arguments],
                "env": [f"{name}={value}" for name, value in environment.items()],
                "cwd": "/data",
                "noNewPrivileges": shared is None,
                "capabilities": capabilities,
            },
            "root": {"path": str(self._root), "readonly": True},
            "mounts": mounts,
            "linux": {
                "namespaces": [{"type": "mount"}, {"type": "pid"}],
                "rootfsPropagation": "rshared" if shared is not None else "private",
                "resources": {"devices": [{"allow": True, "access": "rwm"}]},
            },
        }


def _capabilities() -> list[str]:
    """Return the names of all that this machine lets root have."""
    header = Path("/usr/include/linux/capability.h").read_text()
    found = re.findall(r"^#define (CAP_[A-Z_]+)\s+(\d+)$", header, re.MULTILINE)
    bound = re.search(r"^CapBnd:\s+(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert bound is not None
    return [name for name, number in found if int(bound[1], 16) >> int(number) & 1]


@pytest.fixture
def containers(image: Path, tmp_path: Path) -> Containers:
    return Containers(image, tmp_path / "runc")


def run(containers: Containers, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(containers.line(arguments), capture_output=True, text=True, timeout=60, check=False)


def test_it_runs_as_nobody_with_its_root_read_only(containers: Containers, image: Path) -> None:
    said = run(containers, "--version")
    assert (said.returncode, said.stdout) == (0, f"rafs, version {rafsfs.__version__}\n"), said.stderr
    for command in ("daemon", "csi", "scheduler", "holder", "wait", "models"):
        said = run(containers, command, "--help")
        assert said.returncode == 0, said.stderr
    assert not shutil.which("gcc", path=str(image / "usr/bin"))
    assert not list((image / "opt/rafs").rglob("pip"))


def test_a_pod_reads_a_model_through_daemon_holder_and_driver_of_the_image(
    containers: Containers, registry_of_the_host: Registry, tmp_path: Path
) -> None:
    top = tmp_path / "source"
    top.mkdir()
    (top / "weights.bin").write_bytes(random.Random(1).randbytes(9 << 20))
    (top / "config.json").write_text("{}\n")
    with running_kubelet(tmp_path / "host") as kubelet:
        ref = f"localhost:{registry_of_the_host.port}/image/model:v1"
        kubelet.node.build(top, ref)
        kubelet.kill_driver()
        kubelet.end_daemon()
        installed = Installation(
            lambda arguments: containers.line(arguments, shared=kubelet.home), {}, is_container=True
        )
        kubelet.start_holder(installed=installed)
        kubelet.start_daemon("--external-holder", installed=installed)
        kubelet.start(installed=installed)
        info = kubelet.call("Identity", "GetPluginInfo", pb.GetPluginInfoRequest())
        assert info.vendor_version == rafsfs.__version__
        targets = [kubelet.publish(f"csi-{mode}", {"ref": ref, "mode": mode}, mode) for mode in ("auto", "fuse")]
        for target in targets:
            assert compare_trees(top, target) == []
        for mode in ("auto", "fuse"):
            kubelet.unpublish(f"csi-{mode}", mode)
        wait_for(
            lambda: not [p for p in mountpoints_below(kubelet.home) if "/pods/" in p or "/csi/" in p], "nothing is left"
        )


@pytest.fixture
def registry_of_the_host(tmp_path: Path) -> Iterator[Registry]:
    with running_registry(tmp_path / "registry") as registry:
        yield registry
