"""The back-off schedule, without a clock."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs.net.retry import RetryPolicy, next_wait, parse_retry_after

POLICY = RetryPolicy(retries=3, first_s=0.25, cap_s=8.0, budget_s=20.0)


def wait(
    failures: int = 1,
    *,
    policy: RetryPolicy = POLICY,
    waited_s: float = 0.0,
    left_s: float = math.inf,
    retry_after_s: float | None = None,
    jitter: float = 0.5,
) -> float | None:
    return next_wait(
        policy, failures=failures, waited_s=waited_s, left_s=left_s, retry_after_s=retry_after_s, jitter=jitter
    )


def test_waits_double_up_to_the_cap() -> None:
    policy = RetryPolicy(retries=100, first_s=0.25, cap_s=8.0, budget_s=1e9)
    waits = [wait(n, policy=policy, jitter=1.0) for n in range(1, 10)]
    assert waits == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0]
    assert wait(100, policy=policy) is not None, "also far out, without overflow"


def test_jitter_spreads_and_never_makes_a_hot_loop() -> None:
    assert wait(3, jitter=0.0) == pytest.approx(0.1)
    assert wait(3, jitter=1.0) == pytest.approx(1.0)


def test_the_tries_end() -> None:
    assert wait(3) is not None
    assert wait(4) is None
    assert wait(1, policy=RetryPolicy(retries=0)) is None


def test_a_wait_that_outlasts_the_deadline_or_the_budget_is_not_begun() -> None:
    assert wait(1, left_s=0.01) is None
    assert wait(1, waited_s=19.95) is None


def test_retry_after_is_waited_for_in_full_or_not_at_all() -> None:
    waited = wait(1, retry_after_s=5.0)
    assert waited is not None
    assert 5.0 <= waited <= 5.75
    assert wait(1, retry_after_s=5.0, left_s=4.0) is None
    assert wait(1, retry_after_s=3600.0) is None
    assert wait(1, retry_after_s=0.0) is not None


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 50),
    st.floats(0, 100),
    st.floats(0, 100),
    st.one_of(st.none(), st.floats(0, 1e9)),
    st.floats(0, 0.999),
)
def test_every_wait_fits_and_honours_what_was_asked(
    failures: int, waited_s: float, left_s: float, asked_s: float | None, jitter: float
) -> None:
    policy = RetryPolicy(retries=40, budget_s=50.0)
    found = wait(failures, policy=policy, waited_s=waited_s, left_s=left_s, retry_after_s=asked_s, jitter=jitter)
    if found is not None:
        assert 0 < found < left_s
        assert waited_s + found <= policy.budget_s
        assert asked_s is None or found >= asked_s


def test_retry_after_is_seconds_or_a_date() -> None:
    now = 1_700_000_000.0
    date = format_datetime(datetime.fromtimestamp(now + 30, UTC), usegmt=True)
    assert parse_retry_after("12", now=now) == 12.0
    assert parse_retry_after(" 0 ", now=now) == 0.0
    assert parse_retry_after(date, now=now) == pytest.approx(30.0)
    assert parse_retry_after(date, now=now + 99) == 0.0, "a date that has passed asks for nothing"


@pytest.mark.parametrize("value", [None, "", "soon", "-5", "1.5", "9" * 30, "Mon, 99 Foo 2023 00:00:00 GMT", "²"])
def test_a_retry_after_that_is_none_is_ignored(value: str | None) -> None:
    assert parse_retry_after(value, now=0.0) is None


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_retry_after_gives_seconds_or_nothing(value: str) -> None:
    found = parse_retry_after(value, now=1_700_000_000.0)
    assert found is None or found >= 0.0
