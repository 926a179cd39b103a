"""A kubelet without Kubernetes: real gRPC to the driver, real directories and mount propagation, pods that are processes in mount
namespaces.

Decided here: what the manifests promise. The cache directory and the pods' directory are shared mounts of the host; driver and
daemon run in mount namespaces of their own whose mounts come back to the host (Bidirectional); a pod sees what is mounted later
(HostToContainer). Rule: everything is below one directory, and all of it is unmounted and ended at the end.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc

from rafsfs.csi._pb import csi_pb2 as pb
from rafsfs.csi._pb import csi_pb2_grpc

from .processes import Node, mountpoints_below, output_within, running_node, wait_for

CALL_S = 60.0
BIDIRECTIONAL = ("unshare", "--mount", "--propagation", "unchanged", "--")
HOST_TO_CONTAINER = ("unshare", "--mount", "--propagation", "slave", "--")


def mount_capability(*flags: str, mode: int = pb.VolumeCapability.AccessMode.SINGLE_NODE_WRITER) -> pb.VolumeCapability:
    """A directory, as the kubelet asks for it."""
    return pb.VolumeCapability(
        mount=pb.VolumeCapability.MountVolume(mount_flags=flags), access_mode=pb.VolumeCapability.AccessMode(mode=mode)
    )


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
        self.pages = 0
        self._channel: grpc.Channel | None = None

    def start(self, *options: str) -> None:
        """Start a driver; of one that was killed, the next."""
        command = (
            "csi",
            "--endpoint",
            f"unix://{self.socket}",
            "--node-id",
            "node-1",
            "--role",
            "all",
            "--allow-loopback",
        )
        arguments = (*command, "--http", "127.0.0.1:0", *self._options, *options)
        with (self.home / "driver.log").open("ab") as log:
            self.driver = subprocess.Popen(
                [*BIDIRECTIONAL, *self.node.command(*arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.node.env,
            )
        said = output_within(self.driver, b"serving", 90)
        self.pages = int(said.split(b"port ")[1].split()[0])
        self.disconnect()
        self._channel = grpc.insecure_channel(f"unix://{self.socket}")

    def start_daemon(self) -> None:
        """Start the node daemon where it runs in a cluster: in a container of its own."""
        self._end_daemon()
        with (self.home / "daemon.log").open("ab") as log:
            self._daemon = subprocess.Popen(
                [*BIDIRECTIONAL, *self.node.command("daemon", "--cache-dir", self.node.cache)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.node.env,
            )
        wait_for((self.node.cache / "daemon.sock").exists, "the daemon's socket", 30)

    def _end_daemon(self) -> None:
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon.wait(10)
            self._daemon = None

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
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait(10)
            assert process.stdout is not None
            process.stdout.close()

    def close(self) -> None:
        """End and unmount everything."""
        self.disconnect()
        if self.driver is not None:
            self.kill_driver()
        self._end_daemon()
        for _ in range(3):
            for place in mountpoints_below(self.home):
                subprocess.run(["umount", "-l", place], check=False, stderr=subprocess.DEVNULL)


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
