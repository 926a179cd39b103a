"""Bytes of the FUSE protocol: any request gives a value or a FormatError, a read never asks past one reply."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafsfs.errors import FormatError
from rafsfs.flat import wire


def request(opcode: int, unique: int, node: int, body: bytes) -> memoryview:
    return memoryview(wire.IN_HEADER.pack(40 + len(body), opcode, unique, node, 0, 0, 0, 0, 0) + body)


@given(st.binary(max_size=120))
def test_any_bytes_give_a_request_or_a_format_error(data: bytes) -> None:
    view = memoryview(data)
    for parse in (wire.parse, wire.parse_read, wire.parse_init):
        try:
            parse(view)
        except FormatError:
            continue


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 63) - 1), st.integers(0, (1 << 32) - 1))
def test_a_read_is_bounded_by_what_one_reply_holds(unique: int, offset: int, size: int) -> None:
    found = request(wire.READ, unique, 2, struct.pack("<QQIIQII", 0, offset, size, 0, 0, 0, 0))
    assert wire.parse(found) == (wire.READ, unique, 2)
    assert wire.parse_read(found) == (offset, min(size, 1 << 20))


def test_a_request_that_is_not_as_long_as_it_says_is_refused() -> None:
    with pytest.raises(FormatError, match="says that it has"):
        wire.parse(memoryview(bytes(request(wire.READ, 1, 2, b"")) + b"x"))


def test_replies_say_how_long_they_are() -> None:
    for reply in (wire.reply(5, b"abc"), wire.reply_error(5), wire.resend(), wire.reply(1, wire.init_out(45, 131072))):
        assert struct.unpack_from("<I", reply)[0] == len(reply)
    assert struct.unpack_from("<iQ", wire.reply_error(1 << 63), 4) == (-5, 1 << 63)
