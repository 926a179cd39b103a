"""The checker says nothing of sound bootstraps and names what is wrong with others."""

from __future__ import annotations

import struct

import pytest

from rafsfs.format.bootstrap import Bootstrap
from rafsfs.format.bootstrap_writer import write_bootstrap
from rafsfs.format.check import check_bootstrap

from .erofs_trees import golden

SOUND = write_bootstrap(*golden())
READER = Bootstrap(SOUND)
META = 4096


def place(path: bytes) -> int:
    nid = READER.resolve(path)
    assert nid is not None
    return META + nid * 32


def findings(offset: int, form: str, *values: int | bytes) -> str:
    data = bytearray(SOUND)
    struct.pack_into(form, data, offset, *values)
    return "\n".join(check_bootstrap(data))


def test_sound_bootstrap_has_no_findings() -> None:
    assert list(check_bootstrap(SOUND)) == []


@pytest.mark.parametrize(
    ("path", "field", "form", "value", "expected"),
    [
        (b"config.json", 44, "<I", 9, "link count 9, 3 names"),
        (b"!d", 44, "<I", 9, "!d: has link count 9, expected 3"),
        (b"char", 4, "<H", 0o10600, "char: entry has type 3"),
        (b"fifo", 8, "<Q", 7, "fifo: inode"),
        (b"one piece", 64 + 4, "<I", 100_000, "one piece: chunk index at block 100000"),
        (b"one piece", 64 + 2, "<H", 3, "one piece: chunk index names device 3 of 2"),
        (b"hole", 16, "<I", 0x60, "hole: chunk format 0x60"),
        (b"link", 8, "<Q", 0, "link: symlink"),
        (b"long link", 16, "<I", 1, "long link: inode"),
        (b"attributes", 64 + 12, "<BB", b"\x01\x09", "attributes: xattr entry at 12 has name index 9"),
        (b"empty", 2, "<H", 60_000, "empty: inode"),
        (b"!d/\xff\xfe", 40, "<I", 10**9, "\\xff\\xfe: inode"),
    ],
)
def test_damage_is_found_and_located(path: bytes, field: int, form: str, value: int, expected: str) -> None:
    values = tuple(value) if isinstance(value, bytes) else (value,)
    assert expected in findings(place(path) + field, form, *values)


def test_wrong_inode_count_is_found() -> None:
    count = READER.inode_count
    assert f"counts 1 inodes, {count} were found" in findings(1024 + 16, "<Q", 1)


def test_bad_device_tag_is_found() -> None:
    assert "device 2" in findings(1152 + 128, "64s", b"x" * 64)


def test_wrong_dot_dot_is_found() -> None:
    data = bytearray(SOUND)
    start = place(b"!d") + 64
    assert data[start + 12 * 1 : start + 12 * 1 + 8] == struct.pack("<Q", READER.root_nid)
    struct.pack_into("<Q", data, start + 12, READER.resolve(b"!d"))
    assert any("b'..' leads to inode" in finding for finding in check_bootstrap(data))


def test_what_is_no_bootstrap_is_one_finding() -> None:
    assert len(list(check_bootstrap(b"hello"))) == 1


def test_findings_are_cut_off_where_asked() -> None:
    data = bytearray(SOUND)
    for path, inode in READER.walk():
        if path:
            struct.pack_into("<I", data, META + inode.nid * 32 + 44, 77)
    found = list(check_bootstrap(data, max_findings=5))
    assert len(found) == 6
    assert "more than 5" in found[-1]
