"""A view shows what was asked for, nothing else, and is an image like any other."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafsfs.errors import UsageError
from rafsfs.format.bootstrap import Bootstrap
from rafsfs.format.bootstrap_writer import Extent, Node, SpaceSpec, write_bootstrap
from rafsfs.format.check import check_bootstrap
from rafsfs.view import view_of, view_ranges

_DIR = stat.S_IFDIR | 0o755
_FILE = stat.S_IFREG | 0o644


def a_file(block: int, blocks: int = 1) -> Node:
    return Node(
        _FILE, size=blocks * 4096, extents=[Extent(0, blocks * 4096, 0, block * 4096)], xattrs={b"user.a": b"1"}
    )


def an_image() -> Bootstrap:
    weights = a_file(0, 4)
    old = Node(_DIR, children={b"a.safetensors": a_file(8), b"a.bin": a_file(9)})
    root = Node(
        _DIR,
        children={
            b"config.json": Node(_FILE, inline=b"{}"),
            b"model.safetensors": weights,
            b"same.safetensors": weights,
            b"model.bin": a_file(4, 2),
            b"link": Node(stat.S_IFLNK | 0o777, target=b"model.bin"),
            b"old": old,
            b"empty": Node(_DIR),
        },
    )
    return Bootstrap(write_bootstrap(root, [SpaceSpec(b"\7" * 32, 16 * 4096)]))


def names(bootstrap: Bootstrap) -> set[str]:
    return {path.decode() for path, _ in bootstrap.walk()} - {""}


def shown(include: list[str], exclude: list[str]) -> set[str]:
    data = view_of(an_image(), include, exclude)
    view = Bootstrap(data)
    assert not list(check_bootstrap(data))
    return names(view)


def test_without_patterns_a_view_is_the_image() -> None:
    assert shown([], []) == names(an_image())


def test_what_is_excluded_is_not_there() -> None:
    assert shown([], ["*.bin", "old"]) == {"config.json", "model.safetensors", "same.safetensors", "link", "empty"}


def test_what_is_included_comes_with_the_way_to_it_and_nothing_else() -> None:
    assert shown(["*.safetensors"], []) == {"model.safetensors", "same.safetensors", "old", "old/a.safetensors"}
    assert shown(["old/*"], ["*.bin"]) == {"old", "old/a.safetensors"}
    assert shown(["old"], []) == {"old", "old/a.safetensors", "old/a.bin"}


def test_a_view_that_shows_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="no file"):
        view_of(an_image(), ["*.gguf"], [])


def test_files_keep_their_metadata_ranges_and_links() -> None:
    view = Bootstrap(view_of(an_image(), ["*.safetensors", "*.json"], ["old"]))
    one, two = (view.resolve(name) for name in (b"model.safetensors", b"same.safetensors"))
    assert one is not None
    assert one == two
    assert view.inode(one).nlink == 2
    assert view.xattrs(one) == {b"user.a": b"1"}
    assert view.extents(one) == [Extent(0, 4 * 4096, 0, 0)]
    assert view_ranges(view) == {0: [range(4 * 4096)]}
    assert view_ranges(an_image()) == {0: [range(6 * 4096), range(8 * 4096, 10 * 4096)]}


@given(
    st.lists(st.sampled_from(["*.bin", "*.safetensors", "old", "old/**", "**/a.*", "m*", "x", "*/"]), max_size=3),
    st.lists(st.sampled_from(["*.bin", "old/", "old/a.bin", "*.json", "same*", "e*"]), max_size=3),
)
def test_any_view_is_a_sound_image_with_names_of_the_whole_one(include: list[str], exclude: list[str]) -> None:
    try:
        data = view_of(an_image(), include, exclude)
    except UsageError:
        return
    view = Bootstrap(data)
    assert not list(check_bootstrap(data))
    assert names(view) <= names(an_image())
    assert data == view_of(an_image(), include, exclude)


def test_the_kernel_tools_accept_a_view(tmp_path: Path) -> None:
    if shutil.which("fsck.erofs") is None:
        pytest.skip("no fsck.erofs (package erofs-utils)")
    (tmp_path / "boot").write_bytes(view_of(an_image(), [], ["*.bin"]))
    (tmp_path / "data").write_bytes(bytes(16 * 4096))
    done = subprocess.run(
        ["fsck.erofs", f"--device={tmp_path / 'data'}", tmp_path / "boot"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
