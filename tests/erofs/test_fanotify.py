"""Bytes of fanotify events, and the journal that outlives a guard."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafsfs.erofs.fanotify import JOURNAL_SLOTS, Journal, make_journal, parse_events
from rafsfs.errors import FormatError


def event(fd: int, pid: int, offset: int, count: int, mask: int = 0x100000) -> bytes:
    info = struct.pack("<BBHIQQ", 6, 0, 24, 0, offset, count)
    return struct.pack("<IBBHQii", 48, 3, 0, 24, mask, fd, pid) + info


@given(
    st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 1 << 22), st.integers(0, 1 << 44), st.integers(0, 1 << 30)))
)
def test_events_are_read_as_they_were_written(wanted: list[tuple[int, int, int, int]]) -> None:
    data = b"".join(event(*one) for one in wanted)
    found = list(parse_events(memoryview(data)))
    assert [(e.descriptor, e.pid, e.offset, e.length) for e in found] == wanted
    assert all(e.sound for e in found)


@given(st.binary(max_size=200))
def test_any_bytes_give_events_or_a_format_error(data: bytes) -> None:
    try:
        list(parse_events(memoryview(data)))
    except FormatError:
        return


@pytest.mark.parametrize("data", [event(5, 1, 0, 1, mask=0x20), event(5, 1, 0, 1)[:24].replace(b"\x30", b"\x18", 1)])
def test_what_is_not_a_read_with_a_range_is_not_sound(data: bytes) -> None:
    (found,) = parse_events(memoryview(data))
    assert not found.sound


def test_a_journal_tells_a_successor_what_was_left_open() -> None:
    memory = make_journal()
    first, second = Journal(os.dup(memory)), Journal(memory)
    first.note(7, 2, 4711, 1 << 40, 4096)
    first.note(JOURNAL_SLOTS - 1, 0, 1, 0, 1)
    first.note(9, 1, 1, 5, 5)
    first.clear(9)
    assert second.live() == {7: (2, 4711, 1 << 40, 4096), JOURNAL_SLOTS - 1: (0, 1, 0, 1)}
    first.close()
    second.close()
