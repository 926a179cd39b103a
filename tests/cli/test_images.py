"""build, inspect, ls, cat, check and export as users run them, on a layout: no daemon, no mount, no server."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import rafs_command
from tests.support.series import moved, save, small_model

from .conftest import Rafs, Refused

pytestmark = pytest.mark.io

BUILD_KEYS = {
    *("ref", "digest", "files", "input_bytes", "data_bytes", "stored_bytes"),
    *("new_chunks", "reused_chunks", "reused_bytes", "seconds"),
}
INSPECT_KEYS = {
    "digest",
    "files",
    "data_bytes",
    "stored_bytes",
    "chunks",
    "codecs",
    "bootstrap_bytes",
    "chunk_map_bytes",
}


def test_build_says_what_programs_rely_on(rafs: Rafs, source: Path) -> None:
    ref = f"oci:{rafs.home / 'layout'}:v1"
    built = rafs.json("build", source, "-t", ref)
    assert built.keys() >= BUILD_KEYS
    assert built["ref"] == ref
    assert built["files"] == 6, "regular files, hard links once"
    assert built["input_bytes"] == sum(
        {p.stat().st_ino: p.stat().st_size for p in source.rglob("*") if p.is_file()}.values()
    )
    assert built["stored_bytes"] < built["data_bytes"] < built["input_bytes"], "one copy is shared, the text compresses"
    again = rafs.json("build", source, "-t", ref)
    assert again["digest"] == built["digest"]


def test_one_file_is_an_image_too(rafs: Rafs, source: Path) -> None:
    ref = f"oci:{rafs.home / 'layout'}:one"
    assert rafs("build", source / "config.json", "-t", ref).returncode == 0
    assert rafs("ls", ref).stdout == "config.json\n"


def test_excluded_files_are_left_out(rafs: Rafs, source: Path) -> None:
    ref = f"oci:{rafs.home / 'layout'}:v1"
    assert rafs("build", source, "-t", ref, "--exclude", "*.bin", "--exclude", "sub/deep").returncode == 0
    names = rafs("ls", "-R", ref).stdout.splitlines()
    assert "text.txt" in names
    assert not {"weights.bin", "sub/copy.bin", "sub/deep"} & set(names)


def test_inspect_says_what_programs_rely_on(rafs: Rafs, ref: str) -> None:
    found = rafs.json("inspect", ref)
    assert found.keys() >= INSPECT_KEYS
    assert sum(codec["chunks"] for codec in found["codecs"].values()) == found["chunks"]
    assert sum(codec["data_bytes"] for codec in found["codecs"].values()) == found["data_bytes"]
    assert sum(codec["stored_bytes"] for codec in found["codecs"].values()) == found["stored_bytes"]
    assert set(found["codecs"]) == {"raw", "zstd"}
    assert found["digest"] in rafs("inspect", ref).stdout


def test_ls_lists_a_directory_a_file_and_everything(rafs: Rafs, ref: str, source: Path) -> None:
    assert rafs("ls", ref).stdout.splitlines() == [
        "config.json",
        "fifo",
        "not \\xff utf-8",
        "sub",
        "text.txt",
        "weights.bin",
    ]
    assert rafs("ls", ref, "/sub/").stdout.splitlines() == ["copy.bin", "deep", "hard", "link"]
    assert rafs("ls", ref, "config.json").stdout == "config.json\n"
    assert len(rafs("ls", "-R", ref).stdout.splitlines()) == len(list(source.rglob("*")))


def test_ls_long_tells_what_stat_tells(rafs: Rafs, ref: str, source: Path) -> None:
    line = next(line for line in rafs("ls", "-l", ref).stdout.splitlines() if line.endswith("config.json")).split()
    status = (source / "config.json").stat()
    assert line[:5] == [
        stat.filemode(status.st_mode), "1", str(status.st_uid), str(status.st_gid), str(status.st_size)
    ]  # fmt: skip
    assert line[5] == "2023-11-14T22:13:20Z"
    assert "link -> ../config.json" in rafs("ls", "-l", ref, "sub").stdout


def test_ls_json_keeps_names_that_are_no_text(rafs: Rafs, ref: str) -> None:
    entries = {entry["path"]: entry for entry in rafs.json("ls", ref)}
    assert bytes.fromhex(entries["not \\xff utf-8"]["path_hex"]) == b"not \xff utf-8"
    assert "path_hex" not in entries["text.txt"]


def test_cat_gives_exactly_the_bytes(rafs: Rafs, ref: str, source: Path) -> None:
    for name in ("weights.bin", "config.json", "sub/deep/empty", "sub/hard"):
        done = subprocess.run(
            [*rafs_command(), "cat", ref, name],
            capture_output=True,
            check=True,
            env={**os.environ, "HOME": str(rafs.home)},
        )
        assert done.stdout == (source / name).read_bytes()


def test_cat_of_what_is_no_file_is_refused(refused: Refused, ref: str) -> None:
    assert "sub" in refused(2, "cat", ref, "sub")
    assert "link" in refused(2, "cat", ref, "sub/link")
    assert "absent" in refused(21, "cat", ref, "absent")
    assert "absent" in refused(21, "ls", ref, "absent")


def test_export_gives_the_directory_back(rafs: Rafs, ref: str, source: Path) -> None:
    target = rafs.home / "out"
    done = rafs("export", ref, target)
    assert (done.returncode, done.stdout) == (0, "")
    assert {p.relative_to(target) for p in target.rglob("*")} == {p.relative_to(source) for p in source.rglob("*")}
    for path in [source, *source.rglob("*")]:
        one, other = path.lstat(), (target / path.relative_to(source)).lstat()
        assert (one.st_mode, one.st_mtime_ns, one.st_nlink) == (other.st_mode, other.st_mtime_ns, other.st_nlink), path
        if path.is_symlink():
            assert os.readlink(path) == os.readlink(target / path.relative_to(source))
        elif path.is_file():
            assert path.read_bytes() == (target / path.relative_to(source)).read_bytes()
    assert (target / "weights.bin").stat().st_ino == (target / "sub" / "hard").stat().st_ino


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that other users get into; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory(prefix="rafs-test-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="makes files of other owners, which needs root")
def test_export_by_an_ordinary_user_leaves_out_what_needs_root(rafs: Rafs, open_directory: Path) -> None:
    source = open_directory / "source"
    (source / "closed").mkdir(parents=True)
    (source / "closed" / "setuid").write_bytes(b"x" * 10_000)
    os.chmod(source / "closed" / "setuid", 0o4755)
    os.link(source / "closed" / "setuid", source / "zz")
    os.chmod(source / "closed", 0o600)
    os.mknod(source / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    ref = f"oci:{open_directory / 'layout'}:v1"
    assert rafs("build", source, "-t", ref).returncode == 0
    user = open_directory / "user"
    user.mkdir()
    os.chown(user, 65534, 65534)
    target = user / "out"
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *rafs_command(), "export", ref, target],
        capture_output=True, text=True, check=False, cwd="/", env={**os.environ, "HOME": str(user)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 device nodes" in done.stderr
    assert sorted(os.listdir(target)) == ["closed", "zz"]
    assert stat.S_IMODE((target / "closed").stat().st_mode) == 0o600
    assert (target / "zz").stat().st_ino == (target / "closed" / "setuid").stat().st_ino
    assert stat.S_IMODE((target / "zz").stat().st_mode) == 0o755, "not set-user-id to another user than the image says"


def test_export_into_what_is_there_is_refused(refused: Refused, ref: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    assert "not empty" in refused(2, "export", ref, tmp_path / "full")
    assert "mine" in refused(2, "export", ref, tmp_path / "full" / "mine")
    assert os.listdir(tmp_path / "full") == ["mine"]


def damaged(layout: Path, target: Path) -> tuple[str, Path]:
    """Copy a layout; return a reference into the copy, and the path of the image's one blob."""
    shutil.copytree(layout, target)
    index = json.loads((target / "index.json").read_text())
    manifest = json.loads((target / "blobs" / index["manifests"][0]["digest"].replace(":", "/")).read_text())
    (blob,) = [one for one in manifest["layers"] if one["mediaType"] == "application/vnd.rafs.blob.v1"]
    return f"oci:{target}:v1", target / "blobs" / blob["digest"].replace(":", "/")


def test_a_sound_image_checks_clean(rafs: Rafs, ref: str) -> None:
    assert rafs.json("check", ref)["findings"] == []
    found = rafs.json("check", ref, "--data")
    assert (found["findings"], found["bad_chunks"]) == ([], [])
    assert found["chunks_checked"] == rafs.json("inspect", ref)["chunks"]


def test_check_data_names_bad_chunks_by_blob_chunk_and_files(rafs: Rafs, layout: Path, tmp_path: Path) -> None:
    ref, blob = damaged(layout, tmp_path / "damaged")
    with blob.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert rafs("check", ref).returncode == 0, "without --data only metadata and presence are looked at"
    done = rafs("check", ref, "--data", "--json")
    assert done.returncode == 12
    (bad,) = json.loads(done.stdout)["bad_chunks"]
    assert bad["blob"] == f"sha256:{blob.name}"
    assert set(bad["files"]) <= {"weights.bin", "sub/hard", "sub/copy.bin"}
    assert bad["files"]
    said = rafs("check", ref, "--data").stdout
    assert blob.name in said
    assert bad["files"][0] in said


@pytest.mark.parametrize("how", ["short", "gone"])
def test_check_finds_a_blob_that_is_not_whole(rafs: Rafs, layout: Path, tmp_path: Path, how: str) -> None:
    ref, blob = damaged(layout, tmp_path / "damaged")
    if how == "short":
        os.truncate(blob, blob.stat().st_size - 10)
    else:
        blob.unlink()
    done = rafs("check", ref)
    assert done.returncode == 12, done.stderr
    assert blob.name in done.stdout
    done = rafs("check", ref, "--data", "--json")
    assert done.returncode == 12, done.stderr
    bad = json.loads(done.stdout)["bad_chunks"]
    assert bad
    assert len(bad) < rafs.json("inspect", ref)["chunks"] or how == "gone"


def test_what_is_not_there_is_one_line(refused: Refused, layout: Path, ref: str, tmp_path: Path) -> None:
    for command in ("inspect", "ls", "check"):
        assert "v9" in refused(21, command, f"oci:{layout}:v9")
    assert "nowhere" in refused(21, "export", f"oci:{tmp_path / 'nowhere'}:v1", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "127.0.0.1:9" in refused(23, "inspect", "127.0.0.1:9/some/thing:v1", env={"RAFS_REGISTRY_TIMEOUT": "1"})


def rewritten(layout: Path, target: Path, **changes: object) -> str:
    """Copy a layout and change its manifest; return the reference of the result."""
    shutil.copytree(layout, target)
    index = json.loads((target / "index.json").read_text())
    path = target / "blobs" / index["manifests"][0]["digest"].replace(":", "/")
    manifest = json.dumps({**json.loads(path.read_text()), **changes}).encode()
    digest = hashlib.sha256(manifest).hexdigest()
    (target / "blobs" / "sha256" / digest).write_bytes(manifest)
    index["manifests"][0] |= {"digest": f"sha256:{digest}", "size": len(manifest)}
    (target / "index.json").write_text(json.dumps(index))
    return f"oci:{target}:v1"


def test_another_kind_of_artifact_is_named(refused: Refused, layout: Path, tmp_path: Path) -> None:
    ref = rewritten(layout, tmp_path / "other", artifactType="application/x-other")
    assert "application/x-other" in refused(10, "inspect", ref)


def test_an_image_of_a_newer_version_says_so(refused: Refused, layout: Path, tmp_path: Path) -> None:
    ref = rewritten(layout, tmp_path / "newer", artifactType="application/vnd.rafs.image.v2")
    assert "v2" in refused(11, "inspect", ref)


def test_a_place_that_cannot_be_a_layout_is_named(refused: Refused, source: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the layout should be")
    assert str(blocked) in refused(2, "build", source, "-t", f"oci:{blocked}:v1")
    assert blocked.read_text() == "a file where the layout should be"


def test_a_cache_that_is_not_there_is_empty_and_stays_so(rafs: Rafs) -> None:
    empty = {"images": [], "spaces": [], "files": [], "quota_bytes": None}
    assert rafs.json("cache", "ls") == {"cache_dir": str(rafs.home / "cache"), **empty}
    assert rafs.json("cache", "du")["present_bytes"] == 0
    assert rafs.json("status")["mounts"] == []
    assert not (rafs.home / "cache").exists(), "looking makes nothing and starts nothing"


def test_doctor_tells_each_thing_with_its_remedy(rafs: Rafs, ref: str) -> None:
    done = rafs("doctor", ref, "--json")
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert {
        "FUSE",
        "fusermount3",
        "kernel",
        "mode erofs",
        "mode fuse",
        "cache directory",
        "docker config",
        "registry",
    } <= findings.keys()
    assert findings["registry"]["ok"]
    needed = [finding for finding in findings.values() if finding["required"] and not finding["ok"]]
    assert done.returncode == bool(needed)
    assert all(finding["remedy"] for finding in needed)
    missing = rafs("doctor", f"{ref}-absent")
    assert missing.returncode == 1
    assert "MISSING" in missing.stdout


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout with `v1` and `v2` of a small model, the second as differences to the first; read-only by agreement."""
    top = tmp_path_factory.mktemp("series")
    arrays = small_model(1)
    rafs = Rafs(top)
    for number, base in ((1, ()), (2, ("--base", f"oci:{top}/layout:v1"))):
        save(top / f"source-{number}", arrays)
        done = rafs("build", top / f"source-{number}", "-t", f"oci:{top}/layout:v{number}", "--dict", "none", *base)
        assert done.returncode == 0, done.stderr
        arrays = moved(arrays, 2)
    return top / "layout"


def test_a_build_on_a_base_says_what_a_cold_reader_pays(rafs: Rafs, series: Path) -> None:
    source = series.parent / "source-2"
    ref = f"oci:{rafs.home}/layout:v2"
    shutil.copytree(series, rafs.home / "layout")
    out = rafs("build", source, "-t", ref, "--base", f"oci:{rafs.home}/layout:v1", "--dict", "none").stdout
    assert re.search(r"stored as differences to \S+: \S+ \S+ instead of", out)
    assert re.search(r"a node that has none of the earlier images fetches .* more than without --base", out)
    out = rafs("build", source, "-t", ref, "--base", ref, "--dict", "none").stdout
    assert "nothing is stored as a difference" in out
    assert "taken over from" in out


def test_inspect_shows_differences_dtypes_and_origins(rafs: Rafs, series: Path) -> None:
    found = rafs.json("inspect", f"oci:{series}:v2")
    assert found["delta"]["chunks"] > 0
    assert found["delta"]["base_bytes"] > 0
    assert set(found["dtypes"]) >= {"BF16"}
    assert found["by_file"][0]["path"] == "model.safetensors"
    out = rafs("inspect", f"oci:{series}:v2").stdout
    assert "more to fetch for a node that has none of the earlier image" in out
    assert "BF16" in out


def test_diff_tells_what_changed_and_what_is_to_fetch(rafs: Rafs, series: Path) -> None:
    one, two = f"oci:{series}:v1", f"oci:{series}:v2"
    found = rafs.json("diff", one, two)
    assert [change["path"] for change in found["files"] if change["kind"] == "changed"] == ["model.safetensors"]
    assert [change["kind"] for change in found["tensors"]] == ["changed"] * 4
    assert 0 < found["fetch"]["stored_bytes"] < rafs.json("inspect", one)["stored_bytes"]
    out = rafs("diff", one, two).stdout
    assert "layer.3.weight" in out
    assert "to fetch" in out
    same = rafs.json("diff", one, one)
    assert (same["files"], same["tensors"], same["fetch"]["stored_bytes"]) == ([], [], 0)


def test_diff_of_what_is_not_there_is_refused(refused: Refused, series: Path) -> None:
    assert "v9" in refused(21, "diff", f"oci:{series}:v1", f"oci:{series}:v9")


def test_a_dictionary_or_base_that_is_not_there_is_refused(
    refused: Refused, series: Path, source: Path, tmp_path: Path
) -> None:
    for option in ("--dict", "--base"):
        assert "v9" in refused(21, "build", source, "-t", f"oci:{tmp_path}/layout:v1", option, f"oci:{series}:v9")


def test_a_base_is_read_through_cat_and_check_without_a_mount(rafs: Rafs, series: Path) -> None:
    two = f"oci:{series}:v2"
    assert rafs("check", two).returncode == 0
    done = subprocess.run(
        [*rafs_command(), "cat", two, "model.safetensors"], capture_output=True, check=True,
        env={**os.environ, "HOME": str(rafs.home)},
    )  # fmt: skip
    assert done.stdout == (series.parent / "source-2" / "model.safetensors").read_bytes()
