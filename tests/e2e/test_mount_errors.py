"""What cannot be mounted: one clear line, the documented exit code, nothing left behind."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Node, mountpoints_below
from tests.support.registry import Registry, running_token_registry

DOCUMENTED = Path(__file__).resolve().parents[2] / "docs" / "errors.md"


def assert_refused(node: Node, result: Any, code: int, *wanted: str) -> None:
    """The command ended with `code` and one line that holds each of `wanted`; nothing of a mount remains."""
    said = (result.stdout + result.stderr).strip()
    assert result.returncode == code, said
    assert len(said.splitlines()) == 1, said
    assert "Traceback" not in said
    for text in wanted:
        assert text in said, f"{text!r} not in: {said}"
    assert re.search(rf"\b{code}\b", DOCUMENTED.read_text()), "the exit code is documented"
    assert mountpoints_below(node.home) == []
    assert node.mount_records() == []
    assert node.worker_pids() == []
    assert "Traceback" not in node.log()
    if node.processes():
        assert node.status()["mounts"] == []


@pytest.fixture
def image(node: Node, tmp_path: Path) -> str:
    """A small image in a layout."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"x" * 100_000)
    ref = f"oci:{tmp_path / 'layout'}:v1"
    node.build(source, ref)
    return ref


@pytest.fixture
def place(node: Node) -> Path:
    """An empty directory to mount on."""
    where = node.home / "mnt"
    where.mkdir()
    return where


def test_missing_tag_in_a_registry(node: Node, registry: Registry, place: Path) -> None:
    ref = f"localhost:{registry.port}/nobody/nothing:v9"
    assert_refused(node, node.run("mount", ref, place), 21, "v9", "nobody/nothing")


def test_missing_tag_in_a_layout(node: Node, image: str, place: Path) -> None:
    assert_refused(node, node.run("mount", f"{image}-absent", place), 21, "v1-absent")


def test_missing_layout(node: Node, tmp_path: Path, place: Path) -> None:
    assert_refused(node, node.run("mount", f"oci:{tmp_path / 'nowhere'}:v1", place), 21, "nowhere")


def test_registry_that_is_not_there(node: Node, registry: Registry, place: Path) -> None:
    registry.stop()
    ref = f"localhost:{registry.port}/some/thing:v1"
    assert_refused(node, node.run("mount", ref, place), 23, f"localhost:{registry.port}")


def test_reference_that_is_none(node: Node, place: Path) -> None:
    assert_refused(node, node.run("mount", "not a reference", place), 2, "not a reference")


@pytest.mark.parametrize("password", [None, "wrong"])
def test_credentials_that_are_missing_or_wrong(node: Node, tmp_path: Path, place: Path, password: str | None) -> None:
    with running_token_registry(tmp_path / "token-registry") as registry:
        source = tmp_path / "source"
        source.mkdir()
        (source / "file").write_bytes(b"secret")
        ref = f"localhost:{registry.port}/private/model:v1"
        docker = tmp_path / "docker"
        docker.mkdir()

        def log_in(name: str, secret: str) -> None:
            text = base64.b64encode(f"{name}:{secret}".encode()).decode()
            config = {"auths": {f"localhost:{registry.port}": {"auth": text}}}
            (docker / "config.json").write_text(json.dumps(config))

        node.env["DOCKER_CONFIG"] = str(docker)
        log_in(registry.username, registry.password)
        node.build(source, ref)
        if password is None:
            (docker / "config.json").unlink()
        else:
            log_in(registry.username, password)
        result = node.run("mount", ref, place)
        assert_refused(node, result, 22, f"localhost:{registry.port}")
        assert "wrong" not in (result.stdout + result.stderr).replace("wrong credentials", "").replace("or wrong", "")
        log_in(registry.username, registry.password)
        node.rafs("mount", ref, place)
        assert (place / "file").read_bytes() == b"secret"


def rewrite(layout: Path, change: Any) -> str:
    """Change the config of the image v1 in a layout and tag the result `changed`; return its reference."""

    def blob(digest: str) -> Path:
        return layout / "blobs" / digest.replace(":", "/")

    def store(data: bytes) -> dict[str, Any]:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        blob(digest).write_bytes(data)
        return {"digest": digest, "size": len(data)}

    index = json.loads((layout / "index.json").read_text())
    (entry,) = [one for one in index["manifests"] if one["annotations"]["org.opencontainers.image.ref.name"] == "v1"]
    manifest = json.loads(blob(entry["digest"]).read_bytes())
    config = json.loads(blob(manifest["config"]["digest"]).read_bytes())
    change(manifest, config)
    manifest["config"] |= store(json.dumps(config).encode())
    changed = json.loads(json.dumps(entry)) | store(json.dumps(manifest).encode())
    changed["annotations"]["org.opencontainers.image.ref.name"] = "changed"
    index["manifests"].append(changed)
    (layout / "index.json").write_text(json.dumps(index))
    return f"oci:{layout}:changed"


def test_image_of_a_newer_version(node: Node, image: str, tmp_path: Path, place: Path) -> None:
    ref = rewrite(tmp_path / "layout", lambda manifest, config: config.update(version=2))
    assert_refused(node, node.run("mount", ref, place), 11, "version 2")


def test_image_that_requires_a_feature_of_the_future(node: Node, image: str, tmp_path: Path, place: Path) -> None:
    ref = rewrite(tmp_path / "layout", lambda manifest, config: config.update(requires=["time-travel"]))
    assert_refused(node, node.run("mount", ref, place), 11, "time-travel")


def test_image_that_is_not_ours(node: Node, image: str, tmp_path: Path, place: Path) -> None:
    ref = rewrite(tmp_path / "layout", lambda manifest, config: manifest.update(artifactType="application/x-other"))
    assert_refused(node, node.run("mount", ref, place), 10, "application/x-other")


def test_bootstrap_that_does_not_match_its_digest(node: Node, image: str, tmp_path: Path, place: Path) -> None:
    layout = tmp_path / "layout"
    index = json.loads((layout / "index.json").read_text())
    manifest = json.loads((layout / "blobs" / index["manifests"][0]["digest"].replace(":", "/")).read_bytes())
    path = layout / "blobs" / manifest["layers"][0]["digest"].replace(":", "/")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert_refused(node, node.run("mount", image, place), 12, "sha256:")


def test_mountpoint_that_is_missing(node: Node, image: str) -> None:
    assert_refused(node, node.run("mount", image, node.home / "absent"), 51, "absent")
    assert not (node.home / "absent").exists()


def test_mountpoint_that_is_a_file(node: Node, image: str) -> None:
    (node.home / "file").write_text("kept")
    assert_refused(node, node.run("mount", image, node.home / "file"), 51, "file")
    assert (node.home / "file").read_text() == "kept"


def test_mountpoint_that_is_not_empty(node: Node, image: str, place: Path) -> None:
    (place / "precious").write_text("kept")
    assert_refused(node, node.run("mount", image, place), 51, str(place), "empty")
    assert (place / "precious").read_text() == "kept"


def test_mountpoint_that_is_in_use(node: Node, image: str, place: Path) -> None:
    node.rafs("mount", image, place)
    second = node.run("mount", image, place)
    assert second.returncode == 51, second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
    assert (place / "file").stat().st_size == 100_000
    assert len(node.status()["mounts"]) == 1


@pytest.mark.parametrize(
    "cover",
    [
        pytest.param("mount --bind /dev/null /dev/fuse", id="not-the-device"),
        pytest.param(
            "d=$(mktemp -d) && mount --bind /dev $d && mount -t tmpfs none /dev && for n in null zero random urandom; "
            "do touch /dev/$n && mount --bind $d/$n /dev/$n; done",
            id="missing",
        ),
    ],
)
def test_no_fuse_on_this_machine(node: Node, image: str, place: Path, cover: str) -> None:
    wrap = ["unshare", "-m", "sh", "-c", f'{cover} && exec "$@"', "sh"]
    result = node.run("mount", image, place, wrap=wrap)
    assert_refused(node, result, 52, "/dev/fuse")


def test_cache_directory_that_cannot_be_made(node: Node, image: str, place: Path) -> None:
    (node.home / "blocked").write_text("a file")
    result = node.run("mount", image, place, "--cache-dir", node.home / "blocked" / "cache")
    assert_refused(node, result, 40, "blocked")


def test_unmounting_what_is_not_mounted(node: Node, image: str, place: Path) -> None:
    result = node.run("umount", place)
    assert_refused(node, result, 50, str(place))
    assert os.listdir(place) == []
