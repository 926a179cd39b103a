"""The main job, by the tools users judge it with: what was built is what is mounted, and little is fetched for little."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.compare import compare_trees
from tests.support.models import directory_bytes
from tests.support.processes import Node, drop_page_cache, mountpoints_below, needs, wait_for
from tests.support.registry import Registry
from tests.support.trees import TERABYTE_DATA, TERABYTE_SIZE, make_tree

Reference = Callable[[str], str]

_NO_TOOLS = needs("diff", "rsync", "setfacl")
tools = pytest.mark.skipif(_NO_TOOLS is not None, reason=str(_NO_TOOLS))


MODES = ("fuse", "erofs", "lazy", "kernel")


def mount_by(node: Node, ref: str, mode: str) -> Path:
    """Mount in a mode; what the mode needs is seen to, and that it is that mode."""
    if mode == "erofs":
        node.rafs("pull", ref, timeout_s=120)
    mounted = node.mount(ref, "mnt", "--mode", mode)
    assert node.mount_status(mounted)["mode"] == mode
    return mounted


def diff(left: Path, right: Path) -> list[str]:
    """Return what diff says, but for special files: of one kind on both sides, it says so and compares nothing."""
    result = subprocess.run(
        ["diff", "-r", "--no-dereference", left, right], check=False, capture_output=True, timeout=120
    )
    assert not result.stderr, result.stderr
    same_kind = re.compile(rb"File .* is a (fifo|socket|(?:block|character) special file) while file .* is a \1")
    return [line.decode(errors="replace") for line in result.stdout.splitlines() if not same_kind.fullmatch(line)]


def rsync(left: Path, right: Path) -> str:
    """Return what a dry run of rsync would change in `right`."""
    command = ["rsync", "-aHAXn", "--itemize-changes", "--checksum", "--delete", "--modify-window=-1"]
    result = subprocess.run(
        [*command, f"{left}/", f"{right}/"], check=False, capture_output=True, text=True, timeout=120, errors="replace"
    )
    return result.stdout + result.stderr


def assert_same(node: Node, source: Path, mounted: Path) -> None:
    assert compare_trees(source, mounted) == []
    assert diff(source, mounted) == []
    # All is read now. rsync tells hard links by device number, which a promotion changes: after it.
    if node.mount_status(mounted)["asked"] == "lazy":
        wait_for(lambda: node.mount_status(mounted)["mode"] == "erofs", "the complete image is promoted")
    assert rsync(source, mounted) == ""
    assert rsync(mounted, source) == ""


@tools
@pytest.mark.parametrize("mode", MODES)
def test_a_tree_with_every_kind_of_inode_is_the_same_through_a_mount(
    node: Node, tree: Path, reference: Reference, mode: str
) -> None:
    ref = reference("tree")
    built = node.build(tree, ref)
    assert built["input_bytes"] >= built["data_bytes"] > built["stored_bytes"] > 0
    mounted = mount_by(node, ref, mode)
    assert_same(node, tree, mounted)
    for name in os.listdir(tree):
        drop_page_cache(mounted / name)
    assert compare_trees(tree, mounted) == [], "a second look, partly from the kernel's caches"
    node.rafs("umount", mounted)
    assert mountpoints_below(node.home) == []
    # What runs beside may hold a copy for a moment, in a mount namespace of its own.
    wait_for(lambda: node.worker_pids() == [] and node.mount_records() == [], "nothing is left", 60)


@tools
@pytest.mark.parametrize("mode", MODES)
def test_a_real_model_is_the_same_through_a_mount(node: Node, model: Path, tmp_path: Path, mode: str) -> None:
    ref = f"oci:{tmp_path / 'layout'}:model"
    built = node.build(model, ref)
    assert built["files"] == sum(len(files) for _, _, files in os.walk(model))
    assert built["input_bytes"] == directory_bytes(model)
    assert built["stored_bytes"] < 0.9 * built["data_bytes"], "real weights shrink"
    mounted = mount_by(node, ref, mode)
    assert_same(node, model, mounted)
    status = node.mount_status(mounted)
    assert status["present_bytes"] == status["data_bytes"]
    assert mode == "erofs" or status["sources"]["origin"] > 0


def test_opening_one_tensor_fetches_less_than_a_tenth_of_the_model(
    node: Node, model: Path, reference: Reference
) -> None:
    ref = reference("model")
    node.build(model, ref)
    mounted = node.mount(ref)
    name = "encoder.layer.3.attention.self.query.weight"
    program = (
        "import sys, hashlib, safetensors\n"
        "with safetensors.safe_open(sys.argv[1], framework='np') as file:\n"
        "    print(hashlib.sha256(file.get_tensor(sys.argv[2]).tobytes()).hexdigest(), len(file.keys()))\n"
    )
    answers = [
        subprocess.run(
            [sys.executable, "-c", program, top / "model.safetensors", name],
            check=True,
            capture_output=True,
            timeout=60,
        ).stdout
        for top in (model, mounted)
    ]
    assert answers[0] == answers[1]
    status = node.mount_status(mounted)
    assert status["data_bytes"] >= 0.99 * directory_bytes(model)
    assert 0 < status["present_bytes"] < 0.10 * status["data_bytes"]
    assert status["sources"]["origin"] < 0.10 * status["data_bytes"]


@pytest.mark.parametrize("mode", ["fuse", "lazy"])
def test_a_file_of_more_than_a_terabyte_is_stored_and_shown_as_its_data(node: Node, tmp_path: Path, mode: str) -> None:
    source = tmp_path / "source"
    make_tree(source, entries=10, terabyte=True)
    ref = f"oci:{tmp_path / 'layout'}:tree"
    built = node.build(source, ref)
    assert built["data_bytes"] < 160 << 20
    mounted = node.mount(ref, "mnt", "--mode", mode)
    assert compare_trees(source, mounted) == []
    fd = os.open(mounted / "sparse" / "terabyte", os.O_RDONLY)
    try:
        assert os.fstat(fd).st_size == TERABYTE_SIZE
        assert mode != "fuse" or os.fstat(fd).st_blocks * 512 < 160 << 20
        for offset, length in TERABYTE_DATA:
            end = offset + length
            assert os.pread(fd, 100, end) == bytes(min(100, TERABYTE_SIZE - end))
        assert os.pread(fd, 1 << 20, TERABYTE_SIZE // 3) == bytes(1 << 20)
    finally:
        os.close(fd)


def test_a_directory_of_100000_entries_is_listed_in_full(node: Node, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    names = [f"{number:x}-{number * 7919 % 100_003:05d}" for number in range(100_000)]
    (source / "many").mkdir()
    for name in names:
        os.close(os.open(source / "many" / name, os.O_CREAT | os.O_WRONLY))
    ref = f"oci:{tmp_path / 'layout'}:many"
    node.build(source, ref)
    mounted = node.mount(ref)
    listed = os.listdir(mounted / "many")
    assert sorted(listed) == sorted(names)
    assert os.lstat(mounted / "many" / names[77_777]).st_size == 0
    assert not (mounted / "many" / "absent").exists()


def test_a_single_file_is_an_image_too(node: Node, tmp_path: Path, model: Path) -> None:
    ref = f"oci:{tmp_path / 'layout'}:one"
    node.build(model / "model.bf16.safetensors", ref)
    mounted = node.mount(ref)
    assert os.listdir(mounted) == ["model.bf16.safetensors"]
    assert (mounted / "model.bf16.safetensors").read_bytes() == (model / "model.bf16.safetensors").read_bytes()


@pytest.mark.parametrize("mode", ["fuse", "lazy"])
def test_a_mount_behaves_as_a_read_only_posix_file_system(node: Node, tree: Path, tmp_path: Path, mode: str) -> None:
    ref = f"oci:{tmp_path / 'layout'}:tree"
    node.build(tree, ref)
    mounted = node.mount(ref, "mnt", "--mode", mode)
    file = mounted / "regular" / "size-3145851"
    wanted = (tree / "regular" / "size-3145851").read_bytes()
    for attempt in (
        lambda: os.open(file, os.O_WRONLY),
        lambda: os.open(mounted / "new", os.O_CREAT | os.O_WRONLY),
        lambda: os.mkdir(mounted / "new"),
        lambda: os.unlink(file),
        lambda: os.rename(file, mounted / "elsewhere"),
        lambda: os.chmod(file, 0o600),
        lambda: os.truncate(file, 0),
        lambda: os.setxattr(file, b"user.x", b"y"),
        lambda: os.symlink("x", mounted / "new"),
    ):
        with pytest.raises(OSError, match="Read-only file system") as raised:
            attempt()
        assert raised.value.errno == errno.EROFS

    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == wanted

    assert os.statvfs(mounted).f_bavail == 0
    assert os.statvfs(mounted).f_namemax == 255
    assert os.statvfs(mounted).f_flag & os.ST_RDONLY

    if mode != "fuse":
        with pytest.raises(OSError, match="Invalid argument"):  # the driver has no O_DIRECT on files
            os.open(file, os.O_RDONLY | os.O_DIRECT)
        return
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 1 << 20) as aligned:
            assert os.preadv(fd, [aligned], 4096) == 1 << 20
            assert aligned[:] == wanted[4096 : 4096 + (1 << 20)]
    finally:
        os.close(fd)
    usage = [
        int(subprocess.run(["du", "-sk", top], check=True, capture_output=True).stdout.split()[0])
        for top in (tree / "sparse", mounted / "sparse")
    ]
    assert usage[1] < 2 * usage[0] + 1024


def test_the_kernel_checks_permissions_of_ordinary_users(node: Node, tree: Path, tmp_path: Path) -> None:
    ref = f"oci:{tmp_path / 'layout'}:tree"
    node.build(tree, ref)
    mounted = node.mount(ref)
    # pytest's directories are for root alone: hand over the open directory.
    fd = os.open(mounted, os.O_RDONLY | os.O_DIRECTORY)
    try:
        program = (
            "import os,sys\n"
            "os.setgroups([]); os.setgid(4242); os.setuid(4242)\n"
            f"fd={fd}\n"
            "for name in ('modes/file-0644','modes/file-0400','modes/dir-0000','modes/dir-0755','modes/file-0000'):\n"
            "    try:\n"
            "        os.close(os.open(name, os.O_RDONLY, dir_fd=fd)); print('yes')\n"
            "    except OSError as error: print(error.errno)\n"
        )
        result = subprocess.run(
            [sys.executable, "-S", "-c", program], check=True, capture_output=True, text=True, pass_fds=[fd], timeout=30
        )
    finally:
        os.close(fd)
    denied = str(errno.EACCES)
    assert result.stdout.split() == ["yes", denied, denied, "yes", denied]


def test_two_mounts_of_one_image_fetch_it_once(node: Node, model: Path, registry: Registry) -> None:
    ref = f"localhost:{registry.port}/e2e/model:v1"
    node.build(model, ref)
    first, second = node.mount(ref, "first"), node.mount(ref, "second")
    assert compare_trees(model, first) == compare_trees(model, second) == []
    mounts = node.status()["mounts"]
    assert len(mounts) == 2
    assert 0 < sum(mount["sources"]["origin"] for mount in mounts) <= mounts[0]["data_bytes"]
    node.rafs("umount", first)
    assert compare_trees(model, second) == []


def test_prefetch_all_completes_the_image_without_a_reader(node: Node, model: Path, registry: Registry) -> None:
    ref = f"localhost:{registry.port}/e2e/model:v1"
    node.build(model, ref)
    mounted = node.mount(ref, "mnt", "--prefetch", "all")

    def complete() -> bool:
        status = node.mount_status(mounted)
        return bool(status["present_bytes"] == status["data_bytes"])

    wait_for(complete, "the image is complete", 60)
    registry.stop()
    assert compare_trees(model, mounted) == []


def test_export_gives_back_the_tree(node: Node, tree: Path, tmp_path: Path) -> None:
    ref = f"oci:{tmp_path / 'layout'}:tree"
    node.build(tree, ref)
    node.rafs("export", ref, tmp_path / "exported")
    assert compare_trees(tree, tmp_path / "exported") == []


def test_status_and_inspect_print_what_programs_rely_on(node: Node, model: Path, tmp_path: Path) -> None:
    ref = f"oci:{tmp_path / 'layout'}:model"
    built = node.build(model, ref)
    assert built.keys() >= {
        "ref", "digest", "files", "input_bytes", "data_bytes", "stored_bytes",
        "new_chunks", "reused_chunks", "reused_bytes", "seconds",
    }  # fmt: skip
    inspected = node.json("inspect", ref)
    assert inspected.keys() >= {
        "digest", "files", "data_bytes", "stored_bytes", "chunks", "codecs", "bootstrap_bytes", "chunk_map_bytes",
    }  # fmt: skip
    for name in ("digest", "files", "data_bytes", "stored_bytes"):
        assert inspected[name] == built[name], name
    codecs = inspected["codecs"].values()
    assert sum(codec["chunks"] for codec in codecs) == inspected["chunks"]
    assert sum(codec["data_bytes"] for codec in codecs) == inspected["data_bytes"]
    mounted = node.mount(ref)
    status = node.status()
    assert status["daemon"].keys() >= {"pid", "version", "cache_dir", "rss_bytes"}
    assert status["daemon"]["pid"] == node.daemon_pid()
    (mount,) = status["mounts"]
    assert mount.keys() >= {
        "ref", "digest", "mountpoint", "mode", "state", "data_bytes", "present_bytes", "sources",
    }  # fmt: skip
    assert mount["sources"].keys() == {"cache", "local", "peer", "origin"}
    assert (mount["mountpoint"], mount["digest"]) == (str(mounted), built["digest"])
    json.dumps(status)


def test_building_the_same_again_sends_and_stores_nothing(node: Node, model: Path, reference: Reference) -> None:
    first = node.build(model, reference("model"))
    second = node.build(model, reference("model"))
    assert second["digest"] == first["digest"]
    assert second["sent_bytes"] == 0
