"""The holder as a process: what it does while there is nothing to do."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

import rafsfs.erofs
from tests.support.processes import wait_for

pytestmark = pytest.mark.io
_HOLDER = Path(rafsfs.erofs.__file__).with_name("holder.py")


def waits_for_ever(pid: int) -> bool:
    """Tell whether a process is in poll without a timeout."""
    try:
        words = Path(f"/proc/{pid}/syscall").read_text().split()
    except OSError:
        return False
    number, timeout = words[0], words[3] if len(words) > 3 else ""
    return (number == "7" and int(timeout, 16) & 0xFFFFFFFF == 0xFFFFFFFF) or (number == "73" and int(timeout, 16) == 0)


@pytest.mark.parametrize("said", [b"list", b"rest", b"put"])
def test_with_nothing_held_and_nobody_connected_it_sleeps(tmp_path: Path, said: bytes) -> None:
    path = tmp_path / "holder.sock"
    process = subprocess.Popen([sys.executable, "-I", "-S", _HOLDER, path, tmp_path / "log", "stay"])
    try:
        wait_for(path.exists, "the holder's socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(str(path))
            connection.send(said)
            connection.recv(4096)
        wait_for(lambda: waits_for_ever(process.pid), "the holder sleeps")
    finally:
        process.kill()
        process.wait(10)
