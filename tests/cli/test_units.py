"""Sizes and durations."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs.errors import UsageError
from rafsfs.units import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("64K", 65536), ("1MiB", 1 << 20), ("4 GiB", 4 << 30), ("1.5M", 3 << 19), ("2tb", 2 << 40)],
)  # fmt: skip
def test_sizes_count_by_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1X", "1e9", "1,5M", "nan", "inf", "٣", "9" * 40])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30), ("0.5", 0.5), ("250ms", 0.25), ("90s", 90), ("5m", 300), ("1h", 3600)],
)
def test_durations_are_seconds_unless_said(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1", "1d", "1e3", "nan", "inf", "5 minutes"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="duration"):
        parse_duration(text)


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_is_a_value_or_a_usage_error(text: str) -> None:
    for parse in (parse_size, parse_duration):
        with contextlib.suppress(UsageError):
            assert parse(text) >= 0


@given(st.integers(0, 1 << 80))
@settings(max_examples=150, deadline=None)
def test_sizes_come_back_within_their_digits(size: int) -> None:
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.06, abs=0)


def test_durations_are_shown_in_the_unit_that_fits() -> None:
    assert [format_duration(x) for x in (0.0123, 2.345, 59.5, 200, -1, float("inf"))] == [
        "12 ms", "2.35 s", "59.5 s", "3 min 20 s", "-", "-"
    ]  # fmt: skip
