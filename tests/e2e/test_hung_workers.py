"""A worker that lives and does nothing: it is found by its silence, and its readers get what they wait for."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

from tests.support.processes import Node, read_within


def test_a_reader_of_a_hung_flat_server_gets_right_bytes_from_its_successor(node: Node, tmp_path: Path) -> None:
    """It takes the half minute after which silence counts, most of it waiting."""
    data = random.Random(1).randbytes(48 << 20)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "weights.bin").write_bytes(data)
    ref = f"oci:{tmp_path}/layout:v1"
    node.build(tmp_path / "source", ref)
    mounted = node.mount(ref, "mnt", "--mode", "lazy") / "weights.bin"
    assert read_within(mounted, 0, 4096, 20) == data[:4096]
    (worker,) = node.worker_pids()
    os.kill(worker, signal.SIGSTOP)
    assert read_within(mounted, 40 << 20, 1 << 20, 100) == data[40 << 20 : 41 << 20]
    assert worker not in node.worker_pids()
    assert "worker hangs and is killed" in node.log()
    assert mounted.read_bytes() == data
