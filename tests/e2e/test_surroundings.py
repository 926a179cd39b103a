"""What a node's surroundings do to it, in every mode: little memory, a file system that freezes, file systems that lack what a mode needs.

Right bytes or a clean refusal, and all is well when the trouble is over.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cli.patterns import drop
from tests.support.memory_group import memory_group, why_no_memory_group
from tests.support.processes import Node, is_alive, needs, read_within, running_node, wait_for

MODES = ("erofs", "lazy", "kernel", "fuse")
LIMIT = 64 << 20
FILES = {"first.bin": 48 << 20, "second.bin": 48 << 20}
_NO_GROUP = why_no_memory_group()
_NO_TOOLS = needs("mkfs.ext4", "losetup", "fsfreeze")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two files of noise, each with the other too large for the memory that there will be; and the image of them."""
    top = tmp_path_factory.mktemp("surroundings")
    source = top / "source"
    source.mkdir()
    for name, size in FILES.items():
        (source / name).write_bytes(os.urandom(size))
    ref = f"oci:{top / 'layout'}:image"
    with running_node(top / "builder") as builder:
        builder.build(source, ref)
    return source, ref


_COMPARE = """
import mmap, os, sys
source, mounted = sys.argv[1:3]
one, other = os.open(source, os.O_RDONLY), os.open(mounted, os.O_RDONLY)
size = os.fstat(one).st_size
mapped = mmap.mmap(other, size, prot=mmap.PROT_READ)
step = 1 << 20
for at in range(0, size, step):
    wanted = os.pread(one, step, at)
    got = mapped[at : at + step] if at // step % 2 else os.pread(other, step, at)
    if got != wanted:
        sys.exit(f"wrong bytes at {at}")
print("equal", size)
"""


def compare(source: Path, mounted: Path, before: Sequence[str] = (), timeout_s: float = 60) -> str:
    """Compare a file through the mount with its source, by read and by mmap, in a process; return how it ended, in a word."""
    command = [*before, sys.executable, "-S", "-c", _COMPARE, str(source), str(mounted)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout_s)
    assert "wrong bytes" not in done.stderr, done.stderr
    if done.returncode == 0:
        assert done.stdout.split() == ["equal", str(source.stat().st_size)]
        return "equal"
    return "killed" if done.returncode < 0 else "refused" if "OSError" in done.stderr else done.stderr


def mount_by(node: Node, ref: str, mode: str) -> Path:
    if mode == "erofs":
        node.rafs("pull", ref, timeout_s=120)
    return node.mount(ref, "mnt", "--mode", mode, "--deadline", "20")


@pytest.mark.skipif(_NO_GROUP is not None, reason=str(_NO_GROUP))
@pytest.mark.parametrize("mode", MODES)
def test_with_little_memory_readers_get_right_bytes_or_an_error(node: Node, image: tuple[Path, str], mode: str) -> None:
    source, ref = image
    mounted = mount_by(node, ref, mode)
    with memory_group(LIMIT) as group:
        assert compare(source / "first.bin", mounted / "first.bin", group.command()) == "equal", (
            "a reader that has 64 MiB"
        )
        group.put(node.processes())
        # The daemon may well be killed by the kernel, with 64 MiB for all; those who serve a mount are spared if they can be.
        assert compare(source / "second.bin", mounted / "second.bin", group.command()) in {"equal", "refused", "killed"}
        assert group.times_at_limit() > 0, "there was too little memory"
    wait_for(lambda: node.run("status").returncode == 0, "a daemon answers")
    wait_for(lambda: compare(source / "second.bin", mounted / "second.bin") == "equal", "the mount is as it was", 30)
    assert compare(source / "first.bin", mounted / "first.bin") == "equal"
    assert "BREACH" not in node.log()
    node.rafs("umount", mounted)


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of its own, in a file."""
    where, file = tmp_path / "ext4", tmp_path / "ext4.img"
    where.mkdir()
    with file.open("wb") as opened:
        opened.truncate(512 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", file], check=True)
    subprocess.run(["mount", "-o", "loop", file, where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["fsfreeze", "-u", where], check=False, capture_output=True)
        subprocess.run(["umount", "-l", where], check=True)


@contextlib.contextmanager
def frozen(where: Path) -> Iterator[None]:
    subprocess.run(["fsfreeze", "-f", where], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "-u", where], check=True)


@pytest.mark.skipif(_NO_TOOLS is not None, reason=str(_NO_TOOLS))
@pytest.mark.parametrize("mode", MODES)
def test_while_the_cache_is_frozen_readers_wait_and_then_get_right_bytes(
    tmp_path: Path, ext4: Path, image: tuple[Path, str], mode: str
) -> None:
    source, ref = image
    with running_node(tmp_path / "node", cache=ext4 / "cache") as node:
        mounted = mount_by(node, ref, mode)
        assert read_within(mounted / "first.bin", 0, 4 << 20, 30) == (source / "first.bin").read_bytes()[: 4 << 20]
        command = [sys.executable, "-S", "-c", _COMPARE, str(source / "second.bin"), str(mounted / "second.bin")]
        with frozen(ext4):
            reader = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            try:
                # Present data need no write; what is missing waits for the thaw, or at the most for the deadline.
                assert read_within(mounted / "first.bin", 0, 4096, 20) == (source / "first.bin").read_bytes()[:4096]
                with contextlib.suppress(subprocess.TimeoutExpired):
                    reader.wait(1.5)
                assert mode == "erofs" or reader.poll() is None, reader.communicate()
            except BaseException:
                reader.kill()
                raise
        out, errors = reader.communicate(timeout=60)
        assert (reader.returncode, out.split()[:1]) == (0, ["equal"]), errors
        assert compare(source / "first.bin", mounted / "first.bin") == "equal"
        node.rafs("umount", mounted)
        assert "Traceback" not in node.log()


@pytest.fixture(params=["tmpfs", "overlay"])
def odd_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A file system that EROFS or fanotify may not be able to work on."""
    where = tmp_path / "odd"
    where.mkdir()
    options = "size=400m"
    if request.param == "overlay":
        for name in ("lower", "upper", "work"):
            (tmp_path / name).mkdir()
        options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    made = subprocess.run(
        ["mount", "-t", request.param, "-o", options, "odd", where], check=False, capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no {request.param} here: {made.stderr.strip()}")
    try:
        yield request.param, where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


def test_on_a_file_system_that_lacks_what_a_mode_needs_it_is_refused_or_right(
    tmp_path: Path, odd_disk: tuple[str, Path], image: tuple[Path, str]
) -> None:
    kind, disk = odd_disk
    source, ref = image
    with running_node(tmp_path / "node", cache=disk / "cache") as node:
        (node.home / "mnt").mkdir()
        outcomes = {}
        for mode in ("kernel", "lazy", "fuse", "auto"):
            tried = node.run("mount", ref, node.home / "mnt", "--mode", mode)
            if tried.returncode:
                assert tried.returncode == 50, tried.stderr
                assert len(tried.stderr.strip().splitlines()) == 1
                assert f"mode {mode} cannot be had here" in tried.stderr
                outcomes[mode] = "refused"
                continue
            assert compare(source / "first.bin", node.home / "mnt" / "first.bin") == "equal"
            outcomes[mode] = node.mount_status(node.home / "mnt")["mode"]
            node.rafs("umount", node.home / "mnt")
        assert outcomes["kernel"] == "refused", f"fanotify has no pre-content events on {kind}"
        assert outcomes["fuse"] == "fuse"
        assert outcomes["auto"] == ("fuse" if outcomes["lazy"] == "refused" else outcomes["lazy"])
        assert "Traceback" not in node.log()
    assert not any(is_alive(pid) for pid in node.processes())


def options(mounted: Path) -> list[str]:
    """Return what the kernel says of the file system that is mounted there."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return next(line for line in lines if f" {mounted} " in line).split()[-1].split(",")


def test_a_complete_image_is_read_past_the_page_cache_unless_it_is_in_it(
    tmp_path: Path, image: tuple[Path, str]
) -> None:
    source, ref = image
    with running_node(tmp_path / "node") as node:
        node.rafs("pull", ref, timeout_s=120)
        just_pulled = node.mount(ref, "just-pulled", "--mode", "erofs")
        assert "directio" not in options(just_pulled)
        node.rafs("umount", str(just_pulled))
        drop([str(path) for path in node.cache.glob("spaces/*/data")])
        later = node.mount(ref, "later", "--mode", "erofs")
        assert "directio" in options(later)
        for name in FILES:
            assert compare(source / name, later / name) == "equal"


def test_in_kernel_mode_an_image_most_of_which_is_here_is_read_past_the_page_cache(
    tmp_path: Path, image: tuple[Path, str]
) -> None:
    """What is fetched afterwards is dirty in the page cache, and right all the same, also over the deaths of the guard."""
    source, ref = image
    with running_node(tmp_path / "node") as node:
        fresh = node.mount(ref, "fresh", "--mode", "kernel")
        assert "directio" not in options(fresh)
        first, second = FILES
        assert compare(source / first, fresh / first) == "equal"
        with (fresh / second).open("rb") as file:
            file.read(4096)
        node.rafs("umount", str(fresh))
        os.sync()
        drop([str(path) for path in node.cache.glob("spaces/*/data")])
        later = node.mount(ref, "later", "--mode", "kernel")
        assert node.mount_status(later)["mode"] == "kernel"
        assert "directio" in options(later)
        killed: list[int] = []
        for turn in range(6):  # what is missing, the guard killed under it; then what is there
            with ThreadPoolExecutor(1) as pool:
                name = (second, first)[turn % 2]
                drop([str(later / name)])
                reading = pool.submit(compare, source / name, later / name)
                for _ in range(4):
                    for pid in node.worker_pids():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                            killed.append(pid)
                    time.sleep(0.1)  # the next guard is there by then, and the reader goes on
                assert reading.result() in {"equal", "refused", "killed"}, (
                    "a guard's death may cost a reader EIO, never a wrong byte"
                )
        assert killed, "there was a guard to kill"
        wait_for(lambda: all(compare(source / name, later / name) == "equal" for name in FILES), "both files", 30)
