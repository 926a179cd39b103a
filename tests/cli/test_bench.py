"""`rafs bench`: on a mount and on a reference; patterns read what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.patterns import Piece, faults, load_tensors, parallel, sequential, tensor_places
from tests.support.processes import Node, mountpoints_below, running_node, why_no_mount
from tests.support.weights import Array, save_safetensors

MIB = 1 << 20


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    directory = tmp_path / "weights"
    directory.mkdir()
    arrays = {f"t{n}": Array("U8", (size,), bytes([n]) * size) for n, size in enumerate((MIB, 3 * MIB, 100_000))}
    save_safetensors(directory / "model.safetensors", arrays)
    (directory / "config.json").write_text("{}")
    return directory


def test_patterns_read_all_of_what_they_are_given(weights: Path) -> None:
    path = weights / "model.safetensors"
    piece = Piece(str(path), path.stat().st_size)
    assert sequential([piece]) == piece.size
    assert parallel([piece], threads=3, block=MIB) == piece.size
    assert load_tensors([piece]) == 4 * MIB + 100_000
    assert load_tensors([piece], step=2) == MIB + 100_000
    assert faults([piece], count=50) == 50 * 4096
    assert sequential([Piece(str(path), 1000)]) == 1000


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{}"])
def test_what_is_no_safetensors_has_no_tensors(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    assert tensor_places(Piece(str(tmp_path / "file"), len(data))) == []


@pytest.mark.e2e
@pytest.mark.mount
@pytest.mark.skipif(why_no_mount() is not None, reason=str(why_no_mount()))
def test_a_reference_and_a_mount_are_measured_and_nothing_is_left_behind(tmp_path: Path, weights: Path) -> None:
    with running_node(tmp_path / "node") as node:
        ref = f"oci:{tmp_path / 'layout'}:v1"
        node.build(weights, ref)
        local = tmp_path / "local"
        local.mkdir()
        rows = node.json("bench", ref, "--local", local, timeout_s=120)["rows"]
        assert [row["pattern"] for row in rows[:2]] == ["mount to first byte", "safetensors, all tensors"]
        assert all(row["seconds"] > 0 for row in rows)
        assert all(row["ratio"] for row in rows[2:])
        assert list(local.iterdir()) == []
        assert mountpoints_below(local) == []
        mounted = check_mount(node, ref, local)
        assert "safetensors, all tensors" in mounted


def check_mount(node: Node, ref: str, local: Path) -> str:
    where = node.mount(ref)
    printed = node.rafs("bench", where, "--local", local, "--size", "2MiB", timeout_s=120)
    result = node.run("bench", node.home / "nothing:here:", "--local", local)
    assert result.returncode != 0
    assert len(result.stderr.splitlines()) == 1
    assert "sequential read" in printed
    return node.rafs("bench", where, "--local", local, timeout_s=120)
