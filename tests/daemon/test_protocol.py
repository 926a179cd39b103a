"""Frames between daemon and clients: any split of the stream, any bytes, errors as their own class."""

from __future__ import annotations

import contextlib
import struct
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs import errors
from rafsfs.daemon.protocol import (
    MAX_FRAME,
    Event,
    FrameReader,
    Hello,
    Message,
    Reply,
    Request,
    encode,
    error_reply,
    raise_error,
)

MESSAGES: list[Message] = [
    Hello(1, "rafs 0", "mount", 7),
    Request(1, "ensure", {"space": b"\0\xff" * 16, "first": 3, "stop": 5}),
    Event(1, {"done": 5}),
    Reply(1, {"list": [1, {"a": None}]}),
    Reply(2, None, "NotFoundError", "no such thing"),
]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 400), max_size=20))
def test_messages_survive_any_split_of_the_stream(cuts: list[int]) -> None:
    stream = b"".join(encode(message) for message in MESSAGES)
    places = sorted({0, len(stream), *(cut % len(stream) for cut in cuts)})
    reader = FrameReader()
    found = []
    for start, stop in pairwise(places):
        found += reader.feed(stream[start:stop])
    assert found == MESSAGES


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_give_messages_or_a_format_error(data: bytes, framed: bool) -> None:
    with contextlib.suppress(errors.FormatError):
        FrameReader().feed(struct.pack("<I", len(data)) + data if framed else data)


def test_a_huge_frame_is_refused_before_it_is_read() -> None:
    with pytest.raises(errors.FormatError):
        FrameReader().feed(struct.pack("<I", MAX_FRAME + 1))


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_comes_out_as_itself(name: str) -> None:
    kind = getattr(errors, name)
    reply = error_reply(3, kind("what failed"))
    with pytest.raises(kind, match="what failed") as caught:
        raise_error(reply)
    assert type(caught.value) is kind


@pytest.mark.parametrize("name", ["SystemExit", "ImageStore", "", "__builtins__"])
def test_a_name_that_is_no_error_of_ours_is_a_daemon_error(name: str) -> None:
    with pytest.raises(errors.DaemonError):
        raise_error(Reply(1, None, name, "x"))
