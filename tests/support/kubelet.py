"""A kubelet without Kubernetes: real gRPC to the driver, real directories and mount propagation, pods that are processes in mount
namespaces.

Decided here: what the manifests promise. The cache directory and the pods' directory are shared mounts of the host; driver and
daemon run in mount namespaces of their own whose mounts come back to the host (Bidirectional); a pod sees what is mounted later
(HostToContainer). Rule: everything is below one directory, and all of it is unmounted and ended at the end.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

import rafsfs
from rafsfs.csi._pb import csi_pb2 as pb
from rafsfs.csi._pb import csi_pb2_grpc

from .processes import Node, kill, mountpoints_below, output_within, running_node, wait_for

CALL_S = 60.0
GRACE_S = 30.0
BIDIRECTIONAL = ("unshare", "--mount", "--propagation", "unchanged", "--")
CONTAINER = (*BIDIRECTIONAL[:-1], "--pid", "--fork", "--kill-child", "--mount-proc", "--")
"""With process ids of its own: all that runs in it ends when its first process does."""
HOST_TO_CONTAINER = ("unshare", "--mount", "--propagation", "slave", "--")


def mount_capability(*flags: str, mode: int = pb.VolumeCapability.AccessMode.SINGLE_NODE_WRITER) -> pb.VolumeCapability:
    """A directory, as the kubelet asks for it."""
    return pb.VolumeCapability(
        mount=pb.VolumeCapability.MountVolume(mount_flags=flags), access_mode=pb.VolumeCapability.AccessMode(mode=mode)
    )


@dataclass(frozen=True)
class Installation:
    """Some installation of the project: how its commands are run, in a container of their own or as they are."""

    line: Callable[[Sequence[str]], list[str]]
    env: Mapping[str, str] = field(default_factory=dict)
    is_container: bool = False


def install(directory: Path, version: str) -> Installation:
    """Install the project once more under another version number: as `pip install --target`, its dependencies those of this interpreter."""
    root = Path(__file__).parents[2]
    for package in ("rafsfs", "builder", "p2p", "scheduler", "cli"):
        shutil.copytree(root / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    module = directory / "rafsfs" / "__init__.py"
    text = module.read_text()
    changed = text.replace(f'"{rafsfs.__version__}"', f'"{version}"')
    assert changed != text
    module.write_text(changed)
    command = [sys.executable, "-m", "rafsfs"]
    return Installation(lambda arguments: [*command, *arguments], {"PYTHONPATH": str(directory)})


class Kubelet:
    """One host with its driver."""

    def __init__(self, home: Path, node: Node, options: tuple[str, ...]) -> None:
        self.home = home
        self.node = node
        self.pods = home / "pods"
        self.socket = home / "csi.sock"
        self._options = options
        self.driver: subprocess.Popen[bytes] | None = None
        self._daemon: subprocess.Popen[bytes] | None = None
        self._holder: subprocess.Popen[bytes] | None = None
        self.pages = 0
        self._channel: grpc.Channel | None = None

    def start(self, *options: str, installed: Installation | None = None) -> None:
        """Start a driver; of one that was killed, the next. `installed`: by another installation (`install`)."""
        command = (
            "csi", "--endpoint", f"unix://{self.socket}", "--node-id", "node-1", "--role", "all", "--allow-loopback",
            "--cache-dir", self.node.cache,
        )  # fmt: skip
        arguments = (*command, "--http", "127.0.0.1:0", *self._options, *options)
        with (self.home / "driver.log").open("ab") as log:
            self.driver = subprocess.Popen(
                self._command(BIDIRECTIONAL, installed, *arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**self.node.env, **(installed.env if installed else {})},
                cwd=self.home,
            )
        said = output_within(self.driver, b"serving", 90)
        self.pages = int(said.split(b"port ")[1].split()[0])
        self.disconnect()
        self._channel = grpc.insecure_channel(f"unix://{self.socket}")

    def _command(self, inside: Sequence[str], installed: Installation | None, *arguments: str | Path) -> list[str]:
        if installed is None:
            return [*inside, *self.node.command(*arguments)]
        line = installed.line([str(argument) for argument in arguments])
        return line if installed.is_container else [*inside, *line]

    def start_holder(self, *, installed: Installation | None = None) -> None:
        """Start a holder in a container of its own; `end_holder` or `close` ends it."""
        with (self.home / "daemon.log").open("ab") as log:
            self._holder = subprocess.Popen(
                self._command(CONTAINER, installed, "holder", "--cache-dir", self.node.cache),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.node.env,
            )  # fmt: skip
        wait_for((self.node.cache / "holder.sock").exists, "the holder's socket", 30)

    def end_holder(self) -> None:
        """End it as Kubernetes does."""
        if self._holder is not None:
            _end_container(self._holder)
            self._holder = None

    def start_daemon(self, *options: str, installed: Installation | None = None, container: bool = False) -> None:
        """Start the node daemon where it runs in a cluster: with `container`, in process ids of its own."""
        self.end_daemon()
        inside = CONTAINER if container else BIDIRECTIONAL
        with (self.home / "daemon.log").open("ab") as log:
            self._daemon = subprocess.Popen(
                self._command(inside, installed, "daemon", "--cache-dir", self.node.cache, *options),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self.node.env, **(installed.env if installed else {})},
                cwd=self.home,
            )
        wait_for((self.node.cache / "daemon.sock").exists, "the daemon's socket", 30)

    def end_daemon(self) -> None:
        """SIGKILL to the daemon itself; workers stay."""
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon.wait(10)
            self._daemon = None

    def end_daemon_pod(self) -> None:
        """End a daemon that runs in a container as Kubernetes does: SIGTERM to its first process, then everything in it is gone."""
        assert self._daemon is not None
        _end_container(self._daemon)
        self._daemon = None

    def stop_driver(self) -> None:
        """Stop the driver as Kubernetes does: SIGTERM, then SIGKILL after the time of grace."""
        assert self.driver is not None
        self.driver.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.driver.wait(GRACE_S)
        self.kill_driver()

    def kill_driver(self) -> None:
        """SIGKILL."""
        assert self.driver is not None
        self.driver.kill()
        self.driver.wait(10)
        assert self.driver.stdout is not None
        self.driver.stdout.close()
        self.driver = None

    def disconnect(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def call(self, service: str, method: str, request: Any) -> Any:
        """Call the driver. Raises grpc.RpcError."""
        assert self._channel is not None
        stub = getattr(csi_pb2_grpc, f"{service}Stub")(self._channel)
        return getattr(stub, method)(request, timeout=CALL_S, wait_for_ready=True)

    def target(self, volume: str, pod: str = "pod") -> Path:
        """Where a pod's volume goes; its parent is made, as the kubelet does."""
        parent = self.pods / pod / "volumes" / "kubernetes.io~csi" / volume
        parent.mkdir(parents=True, exist_ok=True)
        return parent / "mount"

    def publish(
        self,
        volume: str,
        attributes: Mapping[str, str],
        pod: str = "pod",
        *,
        secrets: Mapping[str, str] | None = None,
        inline: bool = True,
    ) -> Path:
        """Publish an inline volume for a pod; return its target."""
        target = self.target(volume, pod)
        context = {
            "csi.storage.k8s.io/ephemeral": "true" if inline else "false",
            "csi.storage.k8s.io/pod.name": pod,
            "csi.storage.k8s.io/pod.uid": f"uid-{pod}",
            **attributes,
        }
        request = pb.NodePublishVolumeRequest(
            volume_id=volume,
            target_path=str(target),
            volume_capability=mount_capability(),
            volume_context=context,
            secrets=dict(secrets or {}),
            readonly=True,
        )
        self.call("Node", "NodePublishVolume", request)
        return target

    def unpublish(self, volume: str, pod: str = "pod") -> None:
        """Take it away."""
        request = pb.NodeUnpublishVolumeRequest(volume_id=volume, target_path=str(self.target(volume, pod)))
        self.call("Node", "NodeUnpublishVolume", request)

    def page(self, path: str) -> dict[str, Any]:
        """Return a page of the driver."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.pages}{path}", timeout=20) as answer:
            value: dict[str, Any] = json.load(answer)
        return value

    @contextlib.contextmanager
    def pod(self, target: Path, program: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a Python program in a mount namespace of its own, as a pod that has the volume as its argument."""
        process = subprocess.Popen(
            [*HOST_TO_CONTAINER, sys.executable, "-c", program, str(target)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait(10)
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()

    def close(self) -> None:
        """End and unmount everything."""
        self.disconnect()
        if self.driver is not None:
            self.kill_driver()
        self.end_daemon()
        if self._holder is not None and self._holder.poll() is None:
            self.end_holder()  # with its container, not only what started that
        for _ in range(3):
            for place in mountpoints_below(self.home):
                subprocess.run(["umount", "-l", place], check=False, stderr=subprocess.DEVNULL)


def _end_container(outer: subprocess.Popen[bytes]) -> None:
    first = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0])
    kill(first, signal.SIGTERM, timeout_s=GRACE_S)
    outer.wait(10)


@contextlib.contextmanager
def running_kubelet(home: Path, *options: str) -> Iterator[Kubelet]:
    """Give a host whose driver runs."""
    home.mkdir(parents=True)
    (home / "pods").mkdir()
    subprocess.run(["mount", "--bind", home, home], check=True)
    subprocess.run(["mount", "--make-private", home], check=True)
    subprocess.run(["mount", "--make-shared", home], check=True)
    kubelet = None
    try:
        with running_node(home / "node") as node:
            kubelet = Kubelet(home, node, options)
            try:
                kubelet.start_daemon()
                kubelet.start()
                yield kubelet
            finally:
                kubelet.close()
    finally:
        for place in mountpoints_below(home):
            subprocess.run(["umount", "-l", place], check=False, stderr=subprocess.DEVNULL)
