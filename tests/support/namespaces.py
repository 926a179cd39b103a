"""A rig of network namespaces: machines with shaped links around one switch, on one machine.

Decided here: names and addresses, and that both directions of a link are shaped (token bucket). Needs root and iproute2. Processes are put
into a namespace's network alone (nsenter), so that their mounts are seen by all. Rule: whatever happens, the namespaces go at the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .processes import wait_for


@dataclass
class Rig:
    """Machines by name."""

    mark: str
    addresses: dict[str, str] = field(default_factory=dict)
    _wires: dict[str, str] = field(default_factory=dict)

    def namespace(self, name: str) -> str:
        """Return the namespace of a machine."""
        return f"rafs-{self.mark}-{name}"

    def inside(self, name: str) -> list[str]:
        """Return what to put before a command so that it has a machine's network."""
        return ["nsenter", f"--net=/run/netns/{self.namespace(name)}"]

    def add(self, name: str, mbit: int) -> str:
        """Add a machine with a link of `mbit` each way; return its address."""
        address = f"10.77.0.{len(self.addresses) + 1}"
        own, hub = self.namespace(name), self.namespace("hub")
        wire = f"v{len(self.addresses) + 1}"
        burst = str(max(65536, mbit * 1_000_000 // 8 // 100))
        shape = ["root", "tbf", "rate", f"{mbit}mbit", "burst", burst, "latency", "50ms"]
        self._wires[name] = wire
        for command in (
            ["ip", "netns", "add", own],
            ["ip", "-n", hub, "link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", own],
            ["ip", "-n", hub, "link", "set", wire, "master", "br0", "up"],
            ["ip", "-n", own, "addr", "add", f"{address}/24", "dev", "eth0"],
            ["ip", "-n", own, "link", "set", "eth0", "up"],
            ["ip", "-n", own, "link", "set", "lo", "up"],
            ["tc", "-n", own, "qdisc", "add", "dev", "eth0", *shape],
            ["tc", "-n", hub, "qdisc", "add", "dev", wire, *shape],
        ):
            subprocess.run(command, check=True, capture_output=True)
        self.addresses[name] = address
        return address

    def cut(self, name: str) -> None:
        """Take a machine off the switch: what it sends and what is sent to it is lost, and nobody is told."""
        self._link(name, "down")

    def join(self, name: str) -> None:
        """Put it back."""
        self._link(name, "up")

    def _link(self, name: str, state: str) -> None:
        command = ["ip", "-n", self.namespace("hub"), "link", "set", self._wires[name], state]
        subprocess.run(command, check=True, capture_output=True)

    @contextmanager
    def registry(self, name: str, storage: Path) -> Iterator[str]:
        """Run a docker-registry on a machine over the files of another; give its address."""
        address = f"{self.addresses[name]}:5000"
        config = storage.parent / f"{name}.json"
        config.write_text(
            json.dumps(
                {
                    "version": "0.1",
                    "log": {"level": "error", "accesslog": {"disabled": True}},
                    "storage": {"filesystem": {"rootdirectory": str(storage)}},
                    "http": {"addr": address},
                }
            )
        )
        process = subprocess.Popen(
            [*self.inside(name), "docker-registry", "serve", str(config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        check = [*self.inside(name), sys.executable, "-c",
                 f"import urllib.request; urllib.request.urlopen('http://{address}/v2/')"]  # fmt: skip
        try:
            wait_for(
                lambda: subprocess.run(check, check=False, capture_output=True).returncode == 0, "the registry", 30
            )
            yield address
        finally:
            process.kill()
            process.wait()

    def sent_bytes(self, name: str) -> int:
        """Return the bytes that a machine has sent over its link."""
        command = [*self.inside(name), "cat", "/proc/net/dev"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        line = next(line for line in lines if line.strip().startswith("eth0:"))
        return int(line.partition(":")[2].split()[8])


@contextmanager
def running_rig() -> Iterator[Rig]:
    """Give a rig with a switch and no machines."""
    rig = Rig(f"{os.getpid():x}")
    hub = rig.namespace("hub")
    try:
        for command in (
            ["ip", "netns", "add", hub],
            ["ip", "-n", hub, "link", "add", "br0", "type", "bridge"],
            ["ip", "-n", hub, "link", "set", "br0", "up"],
        ):
            subprocess.run(command, check=True, capture_output=True)
        yield rig
    finally:
        for name in [*rig.addresses, "hub"]:
            subprocess.run(["ip", "netns", "del", rig.namespace(name)], check=False, capture_output=True)
