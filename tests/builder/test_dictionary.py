"""The chunk dictionary: what was noted is found; full, damaged or closed to us, it costs bytes and never a build."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder import dictionary
from builder.dictionary import ChunkDictionary, DictionaryEntry
from rafsfs.types import Digest


def digest(number: int) -> bytes:
    return number.to_bytes(4, "big") * 8


def blob(number: int) -> Digest:
    return Digest.of(b"%d" % number)


def opened(path: Path) -> ChunkDictionary:
    found = ChunkDictionary.open(str(path))
    assert found is not None
    return found


def note(where: ChunkDictionary, number: int, chunks: range, store: str = "host:5000/models/a") -> None:
    where.note_blob(blob(number), 1 << 30, store, [(digest(n), n * 100, 100, 1, 2) for n in chunks])


@pytest.mark.io
def test_what_was_noted_is_found_by_the_next_build(tmp_path: Path) -> None:
    first = opened(tmp_path / "d")
    note(first, 1, range(5))
    note(first, 2, range(5, 8))
    first.close()
    second = opened(tmp_path / "d")
    found = second.find([digest(n) for n in (0, 6, 9)])
    assert found == [
        DictionaryEntry(blob(1), 1 << 30, 0, 100, 1, 2),
        DictionaryEntry(blob(2), 1 << 30, 600, 100, 1, 2),
        None,
    ]
    assert os.stat(tmp_path / "d").st_mode & 0o077 == 0


@pytest.mark.io
def test_a_newer_place_wins_and_repositories_add_up(tmp_path: Path) -> None:
    where = opened(tmp_path / "d")
    note(where, 1, range(3), "host:5000/models/a")
    note(where, 1, range(0), "host:5000/models/b")
    note(where, 1, range(0), "elsewhere/models/c")
    note(where, 2, range(1))
    assert where.repositories(blob(1), "host:5000") == ["models/a", "models/b"]
    assert where.repositories(blob(1), "host") == []
    assert where.repositories(blob(3), "host:5000") == []
    newest = where.find([digest(0)])[0]
    assert newest is not None
    assert newest.blob == blob(2)


@pytest.mark.io
@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, 40), max_size=20)), max_size=8))
def test_it_is_a_mapping(tmp_path_factory: pytest.TempPathFactory, notes: list[tuple[int, set[int]]]) -> None:
    where = opened(tmp_path_factory.mktemp("d"))
    expected: dict[int, int] = {}
    for number, chunks in notes:
        where.note_blob(blob(number), 1 << 20, "h/r", [(digest(n), n, 1 + n, 0, 0) for n in sorted(chunks)])
        expected |= dict.fromkeys(chunks, number)
    for n, entry in enumerate(where.find([digest(n) for n in range(41)])):
        assert (entry.blob if entry else None) == (blob(expected[n]) if n in expected else None)
    where.close()


@pytest.mark.io
@pytest.mark.logs_warnings
def test_a_full_one_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dictionary, "_MAP_SIZE", 1 << 20)
    where = opened(tmp_path / "d")
    for number in range(40):
        note(where, number, range(number * 1000, number * 1000 + 1000))
    assert "begins anew" in caplog.text
    assert all(where.find([digest(39_000), digest(39_999)])), "what was noted last is there"
    assert where.find([digest(0)]) == [None]
    where.note_blob(blob(99), 1 << 20, "h/r", [(digest(n), n, 1, 0, 0) for n in range(50_000)])
    assert where.find([digest(60_000)]) == [None], "one that never fits is left out, and nothing breaks"


@pytest.mark.io
@pytest.mark.logs_warnings
@pytest.mark.parametrize("content", [b"", b"not a database", os.urandom(1 << 16)], ids=["empty", "text", "noise"])
def test_a_damaged_one_begins_anew(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    where = opened(tmp_path / "d")
    note(where, 1, range(5))
    where.close()
    (tmp_path / "d" / "data.mdb").write_bytes(content)
    again = opened(tmp_path / "d")
    assert again.find([digest(1)]) == [None]
    note(again, 1, range(5))
    assert again.find([digest(1)]) != [None]
    assert not content or "begins anew" in caplog.text


@pytest.mark.io
@pytest.mark.logs_warnings
def test_one_that_cannot_be_opened_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "d").write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert ChunkDictionary.open(str(tmp_path / "d")) is None
    assert str(tmp_path / "d") in caplog.text


@pytest.mark.io
def test_entries_that_lie_are_left_out(tmp_path: Path) -> None:
    where = opened(tmp_path / "d")
    where.note_blob(
        blob(1), 1000, "h/r", [(digest(0), 990, 11, 0, 0), (digest(1), 990, 10, 0, 0), (digest(2), 0, 0, 0, 0)]
    )
    assert [entry is not None for entry in where.find([digest(n) for n in range(3)])] == [False, True, False]


_WRITER = """
import sys
from builder.dictionary import ChunkDictionary
from rafsfs.types import Digest
where = ChunkDictionary.open(sys.argv[1])
for number in range(200):
    where.note_blob(Digest.of(sys.argv[2].encode() + b"%d" % number), 1 << 20, "h/r", [((sys.argv[2] * 32).encode(), 0, 1, 0, 0)])
"""


@pytest.mark.io
def test_several_builds_at_once(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, tmp_path / "d", name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    where = opened(tmp_path / "d")
    blobs = [entry.blob for entry in where.find([(name * 32).encode() for name in "abc"]) if entry]
    assert blobs == [Digest.of(name.encode() + b"199") for name in "abc"]
