"""A mount that shows a part of an image: in every mode, after a restart, and without fetching the rest."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.processes import Node, kill, wait_for
from tests.support.registry import Registry

_BIG = 6 << 20


@pytest.fixture
def published(registry: Registry, node: Node, tmp_path: Path) -> tuple[str, Path]:
    top = tmp_path / "model"
    (top / "original").mkdir(parents=True)
    for name in ("model.safetensors", "pytorch_model.bin", "original/consolidated.pth"):
        (top / name).write_bytes(random.Random(name).randbytes(_BIG))
    (top / "config.json").write_text('{"a": 1}')
    ref = f"localhost:{registry.port}/views/model:v1"
    node.build(top, ref, "--codec", "raw")
    return ref, top


@pytest.mark.parametrize("mode", ["fuse", "lazy"])
def test_a_mount_shows_and_fetches_a_part_of_an_image(published: tuple[str, Path], node: Node, mode: str) -> None:
    ref, top = published
    where = node.mount(ref, "mnt", "--mode", mode, "--prefetch", "all", "--exclude", "*.bin", "--exclude", "original/")
    assert sorted(path.name for path in where.iterdir()) == ["config.json", "model.safetensors"]
    assert (where / "model.safetensors").read_bytes() == (top / "model.safetensors").read_bytes()
    done = wait_for(lambda: (s := node.mount_status(where))["present_bytes"] == s["data_bytes"] and s, "it is complete")
    assert _BIG <= done["data_bytes"] <= 1.3 * _BIG
    assert node.json("status")["fetch"]["origin_bytes"] <= 1.3 * _BIG
    kill(node.daemon_pid())
    node.rafs("status")
    assert sorted(path.name for path in where.iterdir()) == ["config.json", "model.safetensors"]
    assert node.mount_status(where)["data_bytes"] == done["data_bytes"]
    node.rafs("umount", where)


def test_a_view_that_shows_nothing_is_refused_in_one_line(published: tuple[str, Path], node: Node) -> None:
    ref, _ = published
    (node.home / "mnt").mkdir()
    done = node.run("mount", ref, node.home / "mnt", "--include", "*.gguf")
    assert done.returncode == 2
    assert "no file of the image" in done.stderr
    assert done.stderr.count("\n") == 1
