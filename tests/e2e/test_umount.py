"""Unmounting while others hold on: it succeeds for this mount namespace, says who keeps the mount, and ends when they let go."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.processes import Node, mountpoints_below, read_within, wait_for

COPY = ["unshare", "--mount", "--propagation", "private"]


@pytest.fixture
def lazy_mount(node: Node, model: Path, tmp_path: Path) -> Path:
    """The model, mounted, nothing of it read."""
    ref = f"oci:{tmp_path / 'layout'}:model"
    node.build(model, ref)
    return node.mount(ref, "mnt", "--mode", "lazy")


def test_a_copy_in_another_mount_namespace_is_named_and_served_until_it_goes(
    node: Node, model: Path, lazy_mount: Path
) -> None:
    name = "model.bf16.safetensors"
    program = (
        "import sys,hashlib; print('here',flush=True); sys.stdin.readline()\n"
        "print(hashlib.sha256(open(sys.argv[1],'rb').read()).hexdigest())\n"
    )
    command = [*COPY, "python3", "-c", program, str(lazy_mount / name)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == "here\n"
            done = node.run("umount", lazy_mount)
            assert (done.returncode, mountpoints_below(node.home)) == (0, [])
            assert f"process {other.pid} (python3) is in a mount namespace that has a copy" in done.stderr
            assert node.mount_status(lazy_mount)["state"] == "detached"
            out, _ = other.communicate("\n", timeout=60)
        finally:
            other.kill()
    hashed = subprocess.run(["sha256sum", model / name], check=True, capture_output=True, text=True).stdout
    assert out.split() == hashed.split()[:1], "the copy is served"
    wait_for(lambda: node.mount_records() == [] and node.worker_pids() == [], "nothing is left")
    assert node.status()["mounts"] == []


def test_an_open_file_is_named_when_its_mount_is_taken_away(node: Node, model: Path, lazy_mount: Path) -> None:
    name = "model.bf16.safetensors"
    file = os.open(lazy_mount / name, os.O_RDONLY)
    try:
        busy = node.run("umount", lazy_mount)
        assert busy.returncode != 0
        assert "in use" in busy.stderr
        done = node.run("umount", "--lazy", lazy_mount)
        assert done.returncode == 0
        assert f"process {os.getpid()} " in done.stderr
        assert "has a file open" in done.stderr
        wanted = (model / name).read_bytes()
        assert read_within(f"/proc/{os.getpid()}/fd/{file}", 0, len(wanted), 60) == wanted
    finally:
        os.close(file)
    wait_for(lambda: node.mount_records() == [] and node.worker_pids() == [], "nothing is left")
