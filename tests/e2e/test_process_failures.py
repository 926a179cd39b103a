"""Processes that die and disks that fill, under readers that go on: never a wrong byte, never a hang, repaired by itself."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from blake3 import blake3

from tests.support.processes import Node, drop_page_cache, is_alive, kill, read_within, running_node, wait_for
from tests.support.registry import Registry

from .wire import Wire, wire_to

_READER = Path(__file__).with_name("reader.py")
_PRESENT = (1, 2)


@pytest.fixture
def slow_wire(registry: Registry) -> Iterator[Wire]:
    """The registry at a rate at which the model takes some seconds, so that a kill comes in the middle."""
    with wire_to(registry.port, bytes_per_s=40e6) as wire:
        yield wire


@contextlib.contextmanager
def readers(source: Path, mounted: Path, orders: Sequence[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Run comparing readers of one file; ends those that are left."""
    started = [
        subprocess.Popen(
            [sys.executable, "-S", _READER, source, mounted, order, str(seed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed, order in enumerate(orders)
    ]
    try:
        yield started
    finally:
        for reader in started:
            reader.kill()
            reader.communicate(timeout=10)


def finish(reader: subprocess.Popen[str], timeout_s: float = 60) -> str:
    out, errors = reader.communicate(timeout=timeout_s)
    assert reader.returncode == 0, f"{reader.args!r}: {reader.returncode} {errors}"
    return out


def unverified_chunks(cache: Path) -> list[str]:
    """Hash every chunk that a cache directory marks present; return those that do not match. Needs no code of ours."""
    bad = []
    for space in (cache / "spaces").iterdir():
        table, marks = (space / "chunks").read_bytes(), (space / "present").read_bytes()
        with (space / "data").open("rb") as data:
            for index, mark in enumerate(marks):
                record = table[index * 48 : index * 48 + 48]
                offset, length = int.from_bytes(record[32:40], "little"), int.from_bytes(record[40:44], "little")
                if mark in _PRESENT and blake3(os.pread(data.fileno(), length, offset)).digest() != record[:32]:
                    bad.append(f"{space.name} chunk {index}")
    return bad


def has_chunks(cache: Path, count: int) -> bool:
    marks = [path.read_bytes() for path in cache.glob("spaces/*/present")]
    return sum(len(one) - one.count(0) for one in marks) >= count


def test_a_daemon_killed_in_the_middle_of_reads_costs_no_byte(node: Node, slow_wire: Wire, model: Path) -> None:
    ref = f"localhost:{slow_wire.port}/e2e/model:v1"
    node.build(model, ref, timeout_s=120)
    mounted = node.mount(ref, "mnt", "--mode", "fuse")
    name = "model.safetensors"
    with readers(model / name, mounted / name, ("sequential", "random", "mmap")) as running:
        killed = []
        for enough in (8, 16):
            wait_for(partial(has_chunks, node.cache, enough), f"{enough} chunks are there")
            pid = wait_for(lambda: daemon_or_none(node), "a daemon runs")
            assert any(reader.poll() is None for reader in running), "the kill must come in the middle"
            kill(pid)
            killed.append(pid)
        for reader in running:
            finish(reader)
    assert node.daemon_pid() not in killed
    assert len(node.worker_pids()) == 1
    assert unverified_chunks(node.cache) == []
    status = node.mount_status(mounted)
    assert status["state"] in {"ready", "mounted", "ok", "serving", "active"}
    assert "Traceback" not in node.log()


def daemon_or_none(node: Node) -> int | None:
    with contextlib.suppress(LookupError):
        return node.daemon_pid()
    return None


def test_present_data_is_read_without_a_daemon(node: Node, registry: Registry, model: Path) -> None:
    ref = f"localhost:{registry.port}/e2e/model:v1"
    node.build(model, ref)
    mounted = node.mount(ref, "mnt", "--mode", "fuse")
    name = "model.bf16.safetensors"
    wanted = (model / name).read_bytes()
    assert (mounted / name).read_bytes() == wanted
    kill(node.daemon_pid())
    drop_page_cache(mounted / name)
    assert read_within(mounted / name, 0, len(wanted), 20) == wanted
    assert daemon_or_none(node) is None, "a read of present data needs no daemon"
    # The next command brings one, which knows the mount.
    assert node.mount_status(mounted)["mountpoint"] == str(mounted)
    assert (mounted / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert len(node.worker_pids()) == 1
    assert unverified_chunks(node.cache) == []


def test_bytes_damaged_while_no_daemon_ran_are_not_served_as_verified(
    node: Node, registry: Registry, model: Path
) -> None:
    """What an unclean stop may leave: chunks marked but not yet synced, whose bytes never reached the disk."""
    ref = f"localhost:{registry.port}/e2e/model:v1"
    node.build(model, ref)
    mounted = node.mount(ref)
    name = "model.bf16.safetensors"
    assert read_within(mounted / name, 0, 1 << 20, 20) == (model / name).read_bytes()[: 1 << 20]
    node.rafs("umount", mounted)
    kill(node.daemon_pid())
    for space in (node.cache / "spaces").iterdir():
        marks = bytearray((space / "present").read_bytes())
        with (space / "data").open("r+b") as data:
            for index, mark in enumerate(marks):
                if mark in _PRESENT:
                    record = (space / "chunks").read_bytes()[index * 48 : index * 48 + 48]
                    offset = int.from_bytes(record[32:40], "little")
                    damaged = os.pread(data.fileno(), 1, offset)[0] ^ 1
                    os.pwrite(data.fileno(), bytes([damaged]), offset)
                    marks[index] = 1
        with (space / "present").open("r+b") as present:
            present.write(marks)
    mounted = node.mount(ref)
    wanted = (model / name).read_bytes()
    assert read_within(mounted / name, 0, len(wanted), 30) == wanted
    assert unverified_chunks(node.cache) == []


def test_a_killed_worker_is_mounted_again_by_the_daemon(node: Node, registry: Registry, model: Path) -> None:
    ref = f"localhost:{registry.port}/e2e/model:v1"
    node.build(model, ref)
    mounted = node.mount(ref, "mnt", "--mode", "fuse")
    name = "model.bf16.safetensors"
    wanted = (model / name).read_bytes()
    assert read_within(mounted / name, 0, 100, 20) == wanted[:100]
    (worker,) = node.worker_pids()
    kill(worker)

    def readable() -> bool:
        try:
            return read_within(mounted / name, 0, len(wanted), 10) == wanted
        except OSError as error:
            # What a mount without its process answers; anything else, a hang above all, fails the test.
            if error.errno not in {errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT, errno.EIO}:
                raise
            return False

    wait_for(readable, "the mount is back", 20)
    (successor,) = node.worker_pids()
    assert successor != worker
    assert node.mount_status(mounted)["mountpoint"] == str(mounted)
    assert str(worker) in node.log() or "worker" in node.log(), "the log says what happened"
    node.rafs("umount", mounted)


def test_a_worker_killed_while_no_daemon_runs_is_repaired_by_the_next_command(
    node: Node, registry: Registry, model: Path
) -> None:
    ref = f"localhost:{registry.port}/e2e/model:v1"
    node.build(model, ref)
    mounted = node.mount(ref, "mnt", "--mode", "fuse")
    (worker,) = node.worker_pids()
    kill(node.daemon_pid())
    kill(worker)
    node.status()
    wait_for(lambda: node.worker_pids() and os.path.ismount(mounted), "the mount is back", 20)
    wanted = (model / "config.json").read_bytes()
    assert read_within(mounted / "config.json", 0, len(wanted), 20) == wanted


def test_kernel_mode_without_any_of_its_three_processes_is_found_and_mended_by_the_next_command(
    node: Node, registry: Registry, model: Path
) -> None:
    ref = f"localhost:{registry.port}/e2e/model:v1"
    node.build(model, ref)
    mounted = node.mount(ref, "mnt", "--mode", "kernel")
    name = "model.bf16.safetensors"
    wanted = (model / name).read_bytes()
    assert read_within(mounted / name, 0, 4096, 20) == wanted[:4096]
    doomed = [node.daemon_pid(), *node.worker_pids(), *node.processes("holder.py")]
    assert len(doomed) == 3
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(map(is_alive, doomed)), "all three have ended")
    # docs/operations.md: what was not fetched may read as zeros now. Then a command runs.
    read_within(mounted / name, 0, len(wanted), 20)
    node.status()
    assert "BREACH" in node.log()
    assert read_within(mounted / name, 0, len(wanted), 30) == wanted, "new opens are right"
    node.rafs("umount", mounted)


@pytest.mark.parametrize("first", ["guard", "holder"])
def test_a_daemon_of_kernel_mode_hashes_guarded_files_before_anybody_answers_for_them(
    node: Node, registry: Registry, model: Path, first: str
) -> None:
    """The next daemon reads guarded data files, to hash what was not synced, while the guard that would allow it is dead."""
    ref = f"localhost:{registry.port}/e2e/model:v1"
    node.build(model, ref)
    mounted = node.mount(ref, "mnt", "--mode", "kernel")
    name = "model.bf16.safetensors"
    wanted = (model / name).read_bytes()
    assert read_within(mounted / name, 0, 1 << 20, 20) == wanted[: 1 << 20]
    if first == "holder":  # then what it kept comes out of the guard, and dies with nobody
        for pid in (node.daemon_pid(), *node.processes("holder.py")):
            kill(pid)
        node.status()
    for pid in (node.daemon_pid(), *node.worker_pids()):
        os.kill(pid, signal.SIGKILL)
    for present in (node.cache / "spaces").glob("*/present"):
        with present.open("r+b") as file:
            marks = file.read()
            file.seek(0)
            file.write(marks.replace(b"\2", b"\1"))
    status = node.run("status", "--json", timeout_s=20)
    assert status.returncode == 0, status.stderr
    assert read_within(mounted / name, 0, len(wanted), 30) == wanted
    assert "BREACH" not in node.log()
    assert unverified_chunks(node.cache) == []
    node.rafs("umount", mounted)
    wait_for(lambda: node.processes("holder.py") == [], "nothing is held any more")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    where = tmp_path / "small-disk"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "small-disk", where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


def test_a_full_cache_disk_fails_reads_until_there_is_space_again(
    tmp_path: Path, small_disk: Path, registry: Registry, model: Path
) -> None:
    with running_node(tmp_path / "node", cache=small_disk / "cache") as node:
        ref = f"localhost:{registry.port}/e2e/model:v1"
        node.build(model, ref)
        mounted = node.mount(ref, "mnt", "--deadline", "5")
        name = "model.bf16.safetensors"
        wanted = (model / name).read_bytes()
        daemon = node.daemon_pid()
        with pytest.raises(OSError, match=r"No space left|Input/output error"):
            read_within(mounted / name, 0, len(wanted), 30)
        assert node.daemon_pid() == daemon, "the daemon lives"
        assert read_within(mounted / "config.json", 0, 10_000, 10) == (model / "config.json").read_bytes()
        assert "Traceback" not in node.log()
        subprocess.run(["mount", "-o", "remount,size=512m", small_disk], check=True)
        assert read_within(mounted / name, 0, len(wanted), 30) == wanted
        assert node.daemon_pid() == daemon
        assert unverified_chunks(node.cache) == []


def test_a_second_daemon_says_who_holds_the_cache_directory(node: Node, registry: Registry, tree: Path) -> None:
    ref = f"localhost:{registry.port}/e2e/tree:v1"
    node.build(tree, ref)
    node.mount(ref)
    holder = node.daemon_pid()
    second = node.run("daemon", "--cache-dir", node.cache, timeout_s=20)
    assert second.returncode == 41
    said = (second.stderr + second.stdout).strip().splitlines()
    assert len(said) == 1, said
    assert str(holder) in said[0]
    assert str(node.cache) in said[0]
    assert node.daemon_pid() == holder


def test_many_commands_at_once_start_one_daemon(node: Node, tree: Path, tmp_path: Path) -> None:
    ref = f"oci:{tmp_path / 'layout'}:tree"
    node.build(tree, ref)
    places = [node.home / f"mnt-{number}" for number in range(4)]
    for place in places:
        place.mkdir()
    started = [node.start("mount", ref, place) for place in places]
    for process in started:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0, out
    assert len([pid for pid in node.processes(" daemon ") if pid != 0]) == 1
    assert len(node.status()["mounts"]) == 4


def test_foreground_serves_until_interrupted_and_leaves_nothing(node: Node, tree: Path, tmp_path: Path) -> None:
    ref = f"oci:{tmp_path / 'layout'}:tree"
    node.build(tree, ref)
    where = node.home / "mnt"
    where.mkdir()
    process = node.start("mount", ref, where, "--foreground")
    try:
        wait_for(lambda: os.path.ismount(where), "the mount is there", 20)
        assert (where / "regular" / "size-1").stat().st_size == 1
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert b"Traceback" not in out
    assert not os.path.ismount(where)
    wait_for(lambda: node.worker_pids() == [], "the worker is gone", 10)
    assert node.mount_records() == []
