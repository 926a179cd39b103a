"""Which answers to a range request deliver the range, and where in the body it is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs.net.http_head import ProtocolError, parse_head
from rafsfs.net.ranges import (
    SKIP_LIMIT,
    Delivery,
    RangeRefusedError,
    format_range,
    parse_content_range,
    plan_delivery,
)


def plan(status: int, offset: int, length: int, **headers: str) -> Delivery:
    lines = [f"HTTP/1.1 {status} X", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return plan_delivery(parse_head("\r\n".join(lines).encode()), offset, length)


def test_a_range_is_asked_for_with_both_ends_included() -> None:
    assert format_range(10, 5) == "bytes=10-14"
    assert format_range(0, 1) == "bytes=0-0"


def test_the_range_asked_for_is_delivered_as_it_is() -> None:
    assert plan(206, 10, 5, content_range="bytes 10-14/100", content_length="5") == Delivery(0, 100)
    assert plan(206, 10, 5, content_range="bytes 10-14/*") == Delivery(0, None)


@pytest.mark.parametrize("content_range", ["bytes 0-4/100", "bytes 11-15/100", "bytes 10-13/14", "bytes 10-15/100"])
def test_another_range_than_asked_is_refused(content_range: str) -> None:
    with pytest.raises(RangeRefusedError):
        plan(206, 10, 5, content_range=content_range)


@pytest.mark.parametrize(
    "value",
    [None, "", "bytes */100", "bytes 14-10/100", "bytes 10-14/14", "chunks 10-14/100", "bytes 10-14", "10-14/9"],
)
def test_a_malformed_content_range_is_a_protocol_error(value: str | None) -> None:
    with pytest.raises(ProtocolError):
        parse_content_range(value)


def test_a_whole_answer_is_skipped_to_the_offset() -> None:
    assert plan(200, 10, 5, content_length="100") == Delivery(10, 100)
    assert plan(200, 0, 100, content_length="100") == Delivery(0, 100)
    assert plan(200, 10, 5) == Delivery(10, None)


def test_a_whole_answer_is_refused_where_it_is_too_short_or_the_offset_too_far() -> None:
    with pytest.raises(RangeRefusedError, match="expected at least 101"):
        plan(200, 10, 91, content_length="100")
    with pytest.raises(RangeRefusedError, match="ignores Range"):
        plan(200, SKIP_LIMIT + 1, 5)


def test_lies_about_the_length_and_encodings_are_refused() -> None:
    with pytest.raises(RangeRefusedError):
        plan(206, 10, 5, content_range="bytes 10-14/100", content_length="100")
    with pytest.raises(RangeRefusedError, match="content encoding"):
        plan(206, 10, 5, content_range="bytes 10-14/100", content_encoding="gzip")


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 50),
    st.integers(1, 50),
    st.integers(0, 50),
    st.integers(0, 50),
    st.one_of(st.none(), st.integers(0, 99)),
)
def test_a_partial_answer_is_taken_only_if_it_is_the_range(
    offset: int, length: int, first: int, last: int, total: int | None
) -> None:
    value = f"bytes {first}-{last}/{'*' if total is None else total}"
    try:
        delivery = plan(206, offset, length, content_range=value)
    except (RangeRefusedError, ProtocolError):
        return
    assert (first, last + 1, delivery.skip) == (offset, offset + length, 0)
