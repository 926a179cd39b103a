"""Response heads: what is accepted, what is refused, and that nothing else ever happens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs.net.http_head import ProtocolError, parse_head


def head_of(*lines: str) -> bytes:
    return "\r\n".join(lines).encode("latin-1")


def test_an_ordinary_head() -> None:
    head = parse_head(head_of("HTTP/1.1 206 Partial Content", "Content-Length: 12", "X-A:  b \t", "x-a: c"))
    assert (head.status, head.length, head.chunked, head.keep_alive) == (206, 12, False, True)
    assert head.headers.get("X-a") == "b"
    assert head.headers.get_all("x-A") == ["b", "c"]
    assert head.headers.get("y") is None


@pytest.mark.parametrize(
    ("lines", "keep_alive"),
    [
        (("HTTP/1.1 200 OK", "Connection: close"), False),
        (("HTTP/1.1 200 OK", "Connection: TE, Close"), False),
        (("HTTP/1.0 200 OK",), False),
        (("HTTP/1.0 200 OK", "Connection: keep-alive"), True),
        (("HTTP/1.1 200",), True),
    ],
)
def test_when_a_connection_is_kept(lines: tuple[str, ...], keep_alive: bool) -> None:
    assert parse_head(head_of(*lines)).keep_alive is keep_alive


def test_two_framings_at_once_end_the_connection() -> None:
    head = parse_head(head_of("HTTP/1.1 200 OK", "Transfer-Encoding: chunked", "Content-Length: 5"))
    assert (head.chunked, head.length, head.keep_alive) == (True, None, False)


@pytest.mark.parametrize(
    "lines",
    [
        ("HTTP/2 200 OK",),
        ("ICY 200 OK",),
        ("",),
        ("HTTP/1.1 20 OK",),
        ("HTTP/1.1 099 OK",),
        ("HTTP/1.1 200 OK", "no colon"),
        ("HTTP/1.1 200 OK", "bad name: x"),
        ("HTTP/1.1 200 OK", " folded: x"),
        ("HTTP/1.1 200 OK", "a: b\nc: d"),
        ("HTTP/1.1 200 OK", "Content-Length: 5", "Content-Length: 6"),
        ("HTTP/1.1 200 OK", "Content-Length: 5, 6"),
        ("HTTP/1.1 200 OK", "Content-Length: -5"),
        ("HTTP/1.1 200 OK", "Content-Length: 0x5"),
        ("HTTP/1.1 200 OK", "Content-Length: 9999999999999999999"),
        ("HTTP/1.1 200 OK", "Transfer-Encoding: gzip, chunked"),
        ("HTTP/1.1 200 OK", *(f"a{n}: b" for n in range(300))),
    ],
)
def test_heads_that_are_refused(lines: tuple[str, ...]) -> None:
    with pytest.raises(ProtocolError):
        parse_head(head_of(*lines))


def test_the_same_length_twice_is_one_length() -> None:
    assert parse_head(head_of("HTTP/1.1 200 OK", "Content-Length: 5", "Content-Length: 5")).length == 5


_PIECES = st.sampled_from(
    [b"HTTP/1.1 200 OK", b"\r\n", b"\n", b":", b"content-length", b"transfer-encoding", b"chunked", b" ", b"5", b"\0"]
)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.lists(_PIECES, max_size=30).map(b"".join)))
def test_any_bytes_give_a_head_or_a_protocol_error(data: bytes) -> None:
    try:
        head = parse_head(data)
    except ProtocolError:
        return
    assert 100 <= head.status <= 999
    assert head.length is None or head.length >= 0
