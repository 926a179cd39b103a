"""The golden bootstrap: today's writer makes the same bytes, today's reader reads them."""

from __future__ import annotations

from pathlib import Path

from rafsfs.format.bootstrap import Bootstrap, Extent
from rafsfs.format.bootstrap_writer import write_bootstrap

from .erofs_trees import MIB, golden

GOLDEN = Path(__file__).parents[2] / "fixtures" / "bootstrap-v1.erofs"


def test_writer_makes_the_golden_bytes() -> None:
    assert write_bootstrap(*golden()) == GOLDEN.read_bytes()


def test_golden_bootstrap_reads_as_it_always_did() -> None:
    reader = Bootstrap(GOLDEN.read_bytes())
    assert (reader.root_nid, reader.inode_count, reader.size) == (2, 46, 6 * 4096)
    assert [slot.blocks for slot in reader.spaces] == [2048, 769]
    nid = reader.resolve(b"two pieces")
    assert nid is not None
    assert reader.extents(nid) == [Extent(0, 4 * MIB, 0, 4 * MIB), Extent(4 * MIB, MIB, 1, 0)]
