"""mount --foreground, daemon --stop and cache commands: what they leave behind and what they leave alone."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import Node, is_alive, mountpoints_below, running_node, wait_for, why_no_mount

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.mount,
    pytest.mark.skipif(why_no_mount() is not None, reason=str(why_no_mount())),
]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node of its own."""
    with running_node(tmp_path / "node") as node:
        yield node


def test_foreground_takes_its_own_mount_away_and_no_other(node: Node, ref: str) -> None:
    other = node.mount(ref, "other")
    node.rafs("daemon", "--stop")
    mine = node.home / "mine"
    mine.mkdir()
    process = node.start("mount", ref, mine, "--foreground")
    try:
        wait_for(lambda: str(mine) in mountpoints_below(node.home), "the mount")
        wait_for((mine / "config.json").exists, "its content")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(10)
        if process.stdout:
            process.stdout.close()
    assert mountpoints_below(node.home) == [str(other)]
    assert (other / "config.json").read_text() == '{"layers": 6}\n'
    assert len(node.mount_records()) == 1


def test_stop_returns_when_the_daemon_has_ended_and_mounts_stay(node: Node, ref: str, source: Path) -> None:
    where = node.mount(ref)
    data = (source / "text.txt").read_bytes()
    assert (where / "text.txt").read_bytes() == data
    pid = node.daemon_pid()
    node.rafs("daemon", "--stop")
    assert not is_alive(pid)
    assert (where / "text.txt").read_bytes() == data
    listed = node.json("cache", "ls")
    assert node.processes("rafsfs daemon") == [], "looking at the cache wakes no daemon"
    assert [image["mounted"] for image in listed["images"]] == [True]
    assert all(space["in_use"] for space in listed["spaces"])
    assert node.run("daemon", "--stop").returncode == 60


def test_cache_commands_show_and_free_what_was_pulled(node: Node, ref: str) -> None:
    pulled = node.json("pull", ref)
    assert pulled["fetched_bytes"] + pulled["local_bytes"] == pulled["data_bytes"]
    with_daemon = node.json("cache", "ls")
    node.rafs("daemon", "--stop")
    assert node.json("cache", "ls") == with_daemon, "the same facts with and without a daemon"
    assert node.json("cache", "du")["present_bytes"] == pulled["data_bytes"]
    verified = node.json("cache", "verify")
    assert (verified["bad"], verified["checked"]) == ([], sum(space["chunks"] for space in with_daemon["spaces"]))
    removed = node.json("cache", "rm", ref)
    assert removed["freed_bytes"] == pulled["data_bytes"]
    assert node.json("cache", "ls")["spaces"] == []
    assert node.run("cache", "rm", ref).returncode == 2


def test_a_mountpoint_named_by_a_link_is_the_directory_it_leads_to(node: Node, ref: str) -> None:
    real = node.home / "real"
    (real / "mnt").mkdir(parents=True)
    (node.home / "parent").symlink_to(real)
    (node.home / "direct").symlink_to(real / "mnt")
    for name in ("parent/mnt", "direct"):
        mounted = node.json("mount", ref, node.home / name)
        assert mounted["mountpoint"] == str(real / "mnt")
        assert (node.home / name / "config.json").exists()
        assert node.run("mount", ref, node.home / name).returncode == 51
        node.rafs("umount", node.home / name)
        assert mountpoints_below(node.home) == []


def test_a_mountpoint_that_is_no_text_is_refused_in_one_line(node: Node, ref: str) -> None:
    done = node.run("mount", ref, b"mnt-\xff")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "UTF-8" in done.stderr
