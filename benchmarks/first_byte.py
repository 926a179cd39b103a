"""How long from `rafs mount` to the first byte, with the daemon up?

The large image has 100 GiB in 1 MiB chunks (102,400 of them): its metadata in full, its data one stored chunk. Baseline:
one round trip to the registry (GET /v2/ on a fresh connection), of which the target allows four, and the start of a
Python interpreter that imports what the command line needs, of which the target says nothing.
"""

from __future__ import annotations

import http.client
import os
import subprocess
from functools import partial
from pathlib import Path

from tests.support.processes import wait_for

from .measure import Row, interleave, median, spread, timed
from .setting import Setting


def first_byte(path: Path) -> None:
    """Open a file and read its first byte."""
    fd = os.open(path, os.O_RDONLY)
    try:
        assert len(os.pread(fd, 1, 0)) == 1
    finally:
        os.close(fd)


def run(setting: Setting) -> list[Row]:
    """Measure."""
    images = {
        "weights": (setting.weights_ref, "model.safetensors"),
        "100 GiB": (setting.large_ref, "model-00003.safetensors"),
    }
    port = setting.registry.port

    def round_trip() -> float:
        def ask() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/v2/")
            connection.getresponse().read()
            connection.close()

        return timed(ask)

    def mount_and_read(name: str) -> float:
        ref, file = images[name]
        with setting.node() as node:
            node.start("daemon", "--cache-dir", node.cache)
            wait_for(lambda: node.run("status").returncode == 0 and (node.cache / "daemon.sock").exists(), "a daemon")
            where = node.home / "mnt"
            where.mkdir()
            return timed(lambda: first_byte(node.mount(ref) / file))

    def command_start() -> float:
        with setting.node() as node:
            return timed(
                lambda: subprocess.run([*node.command("--help")], check=True, capture_output=True, env=node.env)
            )

    seconds = interleave(
        {
            "round trip": round_trip,
            "command": command_start,
            **{name: partial(mount_and_read, name) for name in images},
        },
        setting.rounds,
    )
    trip, command = median(seconds["round trip"]), median(seconds["command"])
    limit = 0.3 + 4 * trip
    return [
        Row(
            f"mount to first byte, daemon up, {name}",
            f"{median(seconds[name]):.3f} s",
            f"0.3 s + 4 round trips of {trip * 1000:.1f} ms",
            median(seconds[name]) / limit,
            "<= 1.0",
            median(seconds[name]) <= limit,
            f"{spread(seconds[name])}; `rafs --help` alone takes {command:.3f} s",
        )
        for name in images
    ]
